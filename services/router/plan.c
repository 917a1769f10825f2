/* The parts of `services.router.plan` that every pair passes: the same results as there, in a tenth of the time.
 *
 * Arguments are contiguous arrays of 32 bits; results are bytearrays, which numpy views. ValueError where an index would
 * lie outside: callers have checked what came over the wire.
 */
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <stdint.h>

#define MOST_IDS (1 << 20) /* experts; a table is made for them */

static void *bytes_of(PyObject *array)
{
    return array == NULL ? NULL : PyByteArray_AS_STRING(array);
}

static PyObject *new_array(Py_ssize_t num)
{
    return PyByteArray_FromStringAndSize(NULL, num * 4);
}

/* Whether all have as many numbers as the first. */
static int same_length(const Py_buffer *arrays, int num)
{
    for (int i = 1; i < num; i++)
        if (arrays[i].len != arrays[0].len) {
            PyErr_SetString(PyExc_ValueError, "arrays of different lengths");
            return 0;
        }
    return 1;
}

/* sort_pairs(experts, weights, nodes, top_k) -> (experts, weights, nodes, least node, greatest node)
 *
 * Each row's pairs by ascending expert, equal ones in their order. Rows are short: insertion.
 */
static PyObject *sort_pairs(PyObject *Py_UNUSED(module), PyObject *args)
{
    Py_buffer in[3];
    Py_ssize_t top_k;
    if (!PyArg_ParseTuple(args, "y*y*y*n", &in[0], &in[1], &in[2], &top_k))
        return NULL;
    Py_ssize_t num = in[0].len / 4;
    PyObject *out[3] = {NULL}, *result = NULL;
    if (!same_length(in, 3))
        goto done;
    if (top_k < 1 || num == 0 || num % top_k) {
        PyErr_SetString(PyExc_ValueError, "rows of unequal length");
        goto done;
    }
    for (int i = 0; i < 3; i++)
        if ((out[i] = new_array(num)) == NULL)
            goto done;
    const int32_t *ids = in[0].buf, *weights = in[1].buf, *nodes = in[2].buf;
    int32_t *to_ids = bytes_of(out[0]), *to_weights = bytes_of(out[1]), *to_nodes = bytes_of(out[2]);
    int32_t least = nodes[0], greatest = nodes[0];
    for (Py_ssize_t first = 0; first < num; first += top_k)
        for (Py_ssize_t i = first; i < first + top_k; i++) {
            Py_ssize_t place = i;
            for (; place > first && to_ids[place - 1] > ids[i]; place--) {
                to_ids[place] = to_ids[place - 1];
                to_weights[place] = to_weights[place - 1];
                to_nodes[place] = to_nodes[place - 1];
            }
            to_ids[place] = ids[i];
            to_weights[place] = weights[i];
            to_nodes[place] = nodes[i];
            least = Py_MIN(least, nodes[i]);
            greatest = Py_MAX(greatest, nodes[i]);
        }
    result = Py_BuildValue("OOOii", out[0], out[1], out[2], least, greatest);
done:
    for (int i = 0; i < 3; i++) {
        PyBuffer_Release(&in[i]);
        Py_XDECREF(out[i]);
    }
    return result;
}

/* A worker's pairs of one expert. */
typedef struct {
    int32_t worker, expert;
    Py_ssize_t count, start; /* of pairs; `start` moves on as they are placed */
} Segment;

static int compare(const void *a, const void *b)
{
    const Segment *x = a, *y = b;
    return x->worker != y->worker ? (x->worker > y->worker) - (x->worker < y->worker)
                                  : (x->expert > y->expert) - (x->expert < y->expert);
}

/* The segments of all pairs by ascending worker, then expert. NULL with an exception. Pair i is in the segment
 * ranks[of_pairs[i]].
 *
 * One pass: an expert's last segment is remembered, and another is looked for only when replicas share its rows.
 */
static Segment *segments_of(
    const int32_t *workers, const int32_t *experts, Py_ssize_t num, int32_t *of_pairs, int32_t **ranks,
    Py_ssize_t *num_segments)
{
    int32_t greatest = 0, *last = NULL, *rank = NULL;
    Segment *found = NULL, *result = NULL;
    Py_ssize_t size = 0;
    for (Py_ssize_t i = 0; i < num; i++) {
        if (experts[i] < 0 || experts[i] >= MOST_IDS || workers[i] < 0) {
            PyErr_Format(PyExc_ValueError, "expert %d of worker %d", experts[i], workers[i]);
            return NULL;
        }
        greatest = Py_MAX(greatest, experts[i]);
    }
    last = PyMem_Calloc((size_t)greatest + 1, sizeof *last); /* from 1 */
    found = PyMem_Malloc(Py_MAX(num, 1) * sizeof *found);
    rank = PyMem_Malloc(Py_MAX(num, 1) * sizeof *rank);
    if (last == NULL || found == NULL || rank == NULL) {
        PyErr_NoMemory();
        goto done;
    }
    for (Py_ssize_t i = 0; i < num; i++) {
        Py_ssize_t at = last[experts[i]] - 1;
        if (at < 0 || found[at].worker != workers[i]) {
            for (at = at < 0 ? size : 0; at < size && (found[at].expert != experts[i] || found[at].worker != workers[i]); at++)
                ;
            if (at == size)
                found[size++] = (Segment){workers[i], experts[i], 0, at};
            last[experts[i]] = (int32_t)at + 1;
        }
        found[at].count++;
        of_pairs[i] = (int32_t)at;
    }
    qsort(found, size, sizeof *found, compare);
    for (Py_ssize_t at = 0, start = 0; at < size; at++) {
        rank[found[at].start] = (int32_t)at; /* `start` was where it had been found */
        found[at].start = start;
        start += found[at].count;
    }
    *num_segments = size;
    *ranks = rank;
    rank = NULL;
    result = found;
    found = NULL;
done:
    PyMem_Free(last);
    PyMem_Free(found);
    PyMem_Free(rank);
    return result;
}

/* The shares of workers, [(worker, start, stop, first segment, end)], and in `table` each segment's (expert, rows). */
static PyObject *cut(const Segment *segments, Py_ssize_t num, int32_t *table)
{
    PyObject *shares = PyList_New(0);
    for (Py_ssize_t first = 0, end, start = 0, stop; shares != NULL && first < num; first = end, start = stop) {
        stop = start;
        for (end = first; end < num && segments[end].worker == segments[first].worker; end++) {
            table[2 * end] = segments[end].expert;
            table[2 * end + 1] = (int32_t)segments[end].count;
            stop += segments[end].count;
        }
        PyObject *share = Py_BuildValue("innnn", segments[first].worker, start, stop, first, end);
        if (share == NULL || PyList_Append(shares, share) < 0)
            Py_CLEAR(shares);
        Py_XDECREF(share);
    }
    return shares;
}

/* The greatest number of pairs of a row; 0 with an exception. `pair_rows` ascend. */
static Py_ssize_t most_pairs(const int32_t *pair_rows, Py_ssize_t num, Py_ssize_t num_rows)
{
    Py_ssize_t most = 0, of_row = 0;
    for (Py_ssize_t i = 0; i < num; i++) {
        if (pair_rows[i] < 0 || pair_rows[i] >= num_rows || (i > 0 && pair_rows[i] < pair_rows[i - 1])) {
            PyErr_Format(PyExc_ValueError, "pair of row %d of %zd", pair_rows[i], num_rows);
            return 0;
        }
        of_row = i > 0 && pair_rows[i] == pair_rows[i - 1] ? of_row + 1 : 1;
        most = Py_MAX(most, of_row);
    }
    return most;
}

/* fan_out(pair_rows, experts, weights, workers, num_rows) -> (rows, shares, table, most, slots, weights) */
static PyObject *fan_out(PyObject *Py_UNUSED(module), PyObject *args)
{
    Py_buffer in[4];
    Py_ssize_t num_rows;
    if (!PyArg_ParseTuple(args, "y*y*y*y*n", &in[0], &in[1], &in[2], &in[3], &num_rows))
        return NULL;
    Py_ssize_t num = in[0].len / 4, most = 0, num_segments = 0;
    const int32_t *pair_rows = in[0].buf, *experts = in[1].buf, *weights = in[2].buf, *workers = in[3].buf;
    PyObject *rows = NULL, *shares = NULL, *table = NULL, *slots = NULL, *slot_weights = NULL, *result = NULL;
    Segment *segments = NULL;
    int32_t *ranks = NULL, *of_pairs = PyMem_Malloc(Py_MAX(num, 1) * sizeof *of_pairs);
    if (of_pairs == NULL) {
        PyErr_NoMemory();
        goto done;
    }
    if (!same_length(in, 4) || (most = most_pairs(pair_rows, num, num_rows)) == 0
        || (segments = segments_of(workers, experts, num, of_pairs, &ranks, &num_segments)) == NULL)
        goto done;
    rows = new_array(num);
    table = new_array(2 * num_segments);
    slots = new_array(num_rows * most);
    slot_weights = new_array(num_rows * most);
    if (rows == NULL || table == NULL || slots == NULL || slot_weights == NULL
        || (shares = cut(segments, num_segments, bytes_of(table))) == NULL)
        goto done;
    int32_t *to_rows = bytes_of(rows), *to_slots = bytes_of(slots), *to_weights = bytes_of(slot_weights);
    memset(to_slots, 0xFF, num_rows * most * 4); /* -1 */
    memset(to_weights, 0, num_rows * most * 4);
    for (Py_ssize_t i = 0, rank = 0; i < num; i++) {
        Py_ssize_t place = segments[ranks[of_pairs[i]]].start++;
        to_rows[place] = pair_rows[i];
        rank = i > 0 && pair_rows[i] == pair_rows[i - 1] ? rank + 1 : 0;
        to_slots[pair_rows[i] * most + rank] = (int32_t)place;
        to_weights[pair_rows[i] * most + rank] = weights[i];
    }
    result = Py_BuildValue("OOOnOO", rows, shares, table, most, slots, slot_weights);
done:
    PyMem_Free(of_pairs);
    PyMem_Free(ranks);
    PyMem_Free(segments);
    for (int i = 0; i < 4; i++)
        PyBuffer_Release(&in[i]);
    Py_XDECREF(rows);
    Py_XDECREF(shares);
    Py_XDECREF(table);
    Py_XDECREF(slots);
    Py_XDECREF(slot_weights);
    return result;
}

static PyMethodDef functions[] = {
    {"sort_pairs", sort_pairs, METH_VARARGS, NULL},
    {"fan_out", fan_out, METH_VARARGS, NULL},
    {NULL, NULL, 0, NULL},
};
static struct PyModuleDef definition = {PyModuleDef_HEAD_INIT, "plan", NULL, -1, functions, NULL, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit_plan(void)
{
    return PyModule_Create(&definition);
}
