/* The parts of `services.router.plan` that every pair passes: the same results as there, in a tenth of the time.
 *
 * Arguments are contiguous arrays of 32 bits; results are bytearrays, which numpy views. ValueError where an index would
 * lie outside: callers have checked what came over the wire.
 */
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <stdint.h>

#define MOST_IDS (1 << 20) /* experts or workers; a table of counts is made for them */

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

/* `order` of `num` things by ascending id, those of one id as in `before` (NULL: as they are). -1 with an exception. */
static int sort_by(const int32_t *ids, const int32_t *before, int32_t *order, Py_ssize_t num)
{
    int32_t greatest = 0;
    for (Py_ssize_t i = 0; i < num; i++) {
        if (ids[i] < 0 || ids[i] >= MOST_IDS) {
            PyErr_Format(PyExc_ValueError, "id %d", ids[i]);
            return -1;
        }
        greatest = Py_MAX(greatest, ids[i]);
    }
    int32_t *next = PyMem_Calloc((size_t)greatest + 2, sizeof *next);
    if (next == NULL) {
        PyErr_NoMemory();
        return -1;
    }
    for (Py_ssize_t i = 0; i < num; i++)
        next[ids[i] + 1]++;
    for (int32_t id = 0; id < greatest; id++)
        next[id + 1] += next[id];
    for (Py_ssize_t i = 0; i < num; i++) {
        int32_t item = before == NULL ? (int32_t)i : before[i];
        order[next[ids[item]]++] = item;
    }
    PyMem_Free(next);
    return 0;
}

/* The shares of workers, [(worker, start, stop, first segment, end)], and in `table` each segment's (expert, rows). */
static PyObject *cut(
    const int32_t *workers, const int32_t *experts, const int32_t *order, Py_ssize_t num, int32_t *table)
{
    PyObject *shares = PyList_New(0);
    Py_ssize_t start = 0, first = 0, segment = -1;
    for (Py_ssize_t i = 0; shares != NULL && i <= num; i++) {
        int is_new = i == num || i == 0 || workers[order[i]] != workers[order[i - 1]];
        if (is_new && i > 0) {
            PyObject *share =
                Py_BuildValue("innnn", workers[order[i - 1]], start, i, first, segment + 1);
            if (share == NULL || PyList_Append(shares, share) < 0)
                Py_CLEAR(shares);
            Py_XDECREF(share);
            start = i;
            first = segment + 1;
        }
        if (i == num)
            break;
        if (is_new || experts[order[i]] != experts[order[i - 1]]) {
            table[2 * ++segment] = experts[order[i]];
            table[2 * segment + 1] = 0;
        }
        table[2 * segment + 1]++;
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
    Py_ssize_t num = in[0].len / 4, most = 0;
    const int32_t *pair_rows = in[0].buf, *experts = in[1].buf, *weights = in[2].buf, *workers = in[3].buf;
    PyObject *rows = NULL, *shares = NULL, *table = NULL, *slots = NULL, *slot_weights = NULL, *result = NULL;
    int32_t *order = PyMem_Malloc(2 * (size_t)Py_MAX(num, 1) * sizeof *order);
    if (order == NULL) {
        PyErr_NoMemory();
        goto done;
    }
    if (!same_length(in, 4) || sort_by(experts, NULL, order + num, num) < 0
        || sort_by(workers, order + num, order, num) < 0 || (most = most_pairs(pair_rows, num, num_rows)) == 0)
        goto done;
    rows = new_array(num);
    table = new_array(2 * num);
    slots = new_array(num_rows * most);
    slot_weights = new_array(num_rows * most);
    if (rows == NULL || table == NULL || slots == NULL || slot_weights == NULL)
        goto done;
    int32_t *to_rows = bytes_of(rows), *to_slots = bytes_of(slots), *to_weights = bytes_of(slot_weights);
    memset(to_slots, 0xFF, num_rows * most * 4); /* -1 */
    memset(to_weights, 0, num_rows * most * 4);
    int32_t *places = order + num; /* of each pair */
    for (Py_ssize_t i = 0; i < num; i++) {
        to_rows[i] = pair_rows[order[i]];
        places[order[i]] = (int32_t)i;
    }
    for (Py_ssize_t i = 0, rank = 0; i < num; i++) {
        rank = i > 0 && pair_rows[i] == pair_rows[i - 1] ? rank + 1 : 0;
        to_slots[pair_rows[i] * most + rank] = places[i];
        to_weights[pair_rows[i] * most + rank] = weights[i];
    }
    if ((shares = cut(workers, experts, order, num, bytes_of(table))) != NULL)
        result = Py_BuildValue("OOOnOO", rows, shares, table, most, slots, slot_weights);
done:
    PyMem_Free(order);
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
