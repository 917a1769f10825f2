/* The parts of `services.router.plan` that every pair passes: the same results as there, in a tenth of the time.
 *
 * Arguments are contiguous arrays of 32 bits; results are bytes, which numpy views. ValueError where an index would
 * lie outside: callers have checked what came over the wire.
 */
#include "partials.h"

#define SECTION 16 /* of a payload: common.wire.blocks */

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

/* Each row's pairs by ascending expert, equal ones in their order. Rows are short: insertion. */
static void sort_pairs(
    const int32_t *ids, const int32_t *weights, Py_ssize_t num, Py_ssize_t top_k, int32_t *to_ids, int32_t *to_weights)
{
    for (Py_ssize_t first = 0; first < num; first += top_k)
        for (Py_ssize_t i = first; i < first + top_k; i++) {
            Py_ssize_t place = i;
            for (; place > first && to_ids[place - 1] > ids[i]; place--) {
                to_ids[place] = to_ids[place - 1];
                to_weights[place] = to_weights[place - 1];
            }
            to_ids[place] = ids[i];
            to_weights[place] = weights[i];
        }
}

/* What one node gets: `rows` [num_rows] and the tail of its RELAY, three sections of [num_pairs]. */
typedef struct {
    Py_ssize_t num_rows, num_pairs, section; /* the last in numbers */
    Py_ssize_t last_row; /* that was counted */
    int32_t *to_rows, *to_pairs;
    PyObject *rows, *tail;
} Share;

/* Room for what was counted. */
static int open_share(Share *share)
{
    share->section = aligned(share->num_pairs * 4, SECTION);
    share->rows = PyBytes_FromStringAndSize(NULL, share->num_rows * 4);
    share->tail = PyBytes_FromStringAndSize(NULL, 3 * share->section);
    if (share->rows == NULL || share->tail == NULL)
        return -1;
    share->to_rows = (int32_t *)PyBytes_AS_STRING(share->rows);
    share->to_pairs = memset(PyBytes_AS_STRING(share->tail), 0, 3 * share->section);
    share->section /= 4;
    return 0;
}

/* All pairs are of one node, as where there is no other. */
static int share_whole(const int32_t *ids, const int32_t *weights, Py_ssize_t num_rows, Py_ssize_t top_k, Share *share)
{
    share->num_rows = num_rows;
    share->num_pairs = num_rows * top_k;
    if (open_share(share) < 0)
        return -1;
    int32_t *to = share->to_pairs;
    for (int32_t row = 0; row < num_rows; row++) {
        share->to_rows[row] = row;
        for (Py_ssize_t i = 0; i < top_k; i++)
            *to++ = row;
    }
    memcpy(share->to_pairs + share->section, ids, share->num_pairs * 4);
    memcpy(share->to_pairs + 2 * share->section, weights, share->num_pairs * 4);
    return 0;
}

/* Count what each node gets, then write it; `shares` has one for every node up to the greatest. */
static int share_out(
    const int32_t *ids, const int32_t *weights, const int32_t *nodes, Py_ssize_t num_rows, Py_ssize_t top_k,
    Share *shares, Py_ssize_t num_nodes)
{
    for (Py_ssize_t n = 0; n < num_nodes; n++)
        shares[n].last_row = -1;
    for (Py_ssize_t row = 0, i = 0; row < num_rows; row++)
        for (Py_ssize_t end = i + top_k; i < end; i++)
            if (nodes[i] >= 0) {
                Share *share = shares + nodes[i];
                share->num_pairs++;
                share->num_rows += share->last_row != row;
                share->last_row = row;
            }
    for (Share *share = shares; share < shares + num_nodes; share++) {
        if (share->num_pairs != 0 && open_share(share) < 0)
            return -1;
        share->num_rows = 0;
        share->last_row = -1;
    }
    for (Py_ssize_t row = 0, i = 0; row < num_rows; row++)
        for (Py_ssize_t end = i + top_k; i < end; i++)
            if (nodes[i] >= 0) {
                Share *share = shares + nodes[i];
                if (share->last_row != row)
                    share->to_rows[share->num_rows++] = (int32_t)(share->last_row = row);
                *share->to_pairs = (int32_t)(share->num_rows - 1);
                share->to_pairs[share->section] = ids[i];
                share->to_pairs[2 * share->section] = weights[i];
                share->to_pairs++;
            }
    return 0;
}

/* split(experts, weights, nodes, top_k) -> [(node, rows, number of pairs, tail)], ascending
 *
 * nodes [num_experts], negative: nobody gets these pairs. Of `services.router.plan.NodeShare`.
 */
static PyObject *split(PyObject *Py_UNUSED(module), PyObject *args)
{
    Py_buffer in[3];
    Py_ssize_t top_k, num_nodes = 0, first = PY_SSIZE_T_MAX;
    if (!PyArg_ParseTuple(args, "y*y*y*n", &in[0], &in[1], &in[2], &top_k))
        return NULL;
    Py_ssize_t num = in[0].len / 4, num_experts = in[2].len / 4;
    int32_t *ids = PyMem_Malloc((3 * num + 1) * 4), *weights = ids + num, *nodes = weights + num;
    Share *shares = NULL;
    PyObject *result = NULL;
    if (!same_length(in, 2))
        goto done;
    if (top_k < 1 || num == 0 || num % top_k) {
        PyErr_SetString(PyExc_ValueError, "rows of unequal length");
        goto done;
    }
    if (ids == NULL) {
        PyErr_NoMemory();
        goto done;
    }
    sort_pairs(in[0].buf, in[1].buf, num, top_k, ids, weights);
    for (Py_ssize_t i = 0; i < num; i++) {
        if (ids[i] < 0 || ids[i] >= num_experts) {
            PyErr_Format(PyExc_ValueError, "expert id outside 0..%zd", num_experts - 1);
            goto done;
        }
        nodes[i] = ((const int32_t *)in[2].buf)[ids[i]];
        num_nodes = Py_MAX(num_nodes, nodes[i] + 1);
        first = Py_MIN(first, nodes[i]);
    }
    shares = PyMem_Calloc(num_nodes + 1, sizeof *shares);
    if (shares == NULL)
        PyErr_NoMemory();
    else if ((first >= 0 && first == num_nodes - 1 ? share_whole(ids, weights, num / top_k, top_k, shares + first)
                                                   : share_out(ids, weights, nodes, num / top_k, top_k, shares, num_nodes))
             == 0)
        result = PyList_New(0);
    for (Py_ssize_t n = 0; result != NULL && n < num_nodes; n++) {
        if (shares[n].num_pairs == 0)
            continue;
        PyObject *share = Py_BuildValue("nOnO", n, shares[n].rows, shares[n].num_pairs, shares[n].tail);
        if (share == NULL || PyList_Append(result, share) < 0)
            Py_CLEAR(result);
        Py_XDECREF(share);
    }
done:
    for (Py_ssize_t n = 0; shares != NULL && n < num_nodes; n++) {
        Py_XDECREF(shares[n].rows);
        Py_XDECREF(shares[n].tail);
    }
    PyMem_Free(shares);
    PyMem_Free(ids);
    for (int i = 0; i < 3; i++)
        PyBuffer_Release(&in[i]);
    return result;
}

/* Where the pairs of one expert go. */
typedef struct {
    int32_t worker, expert;
    Py_ssize_t start; /* of its places */
} Segment;

static int compare(const void *a, const void *b)
{
    const Segment *x = a, *y = b;
    return x->worker != y->worker ? (x->worker > y->worker) - (x->worker < y->worker)
                                  : (x->expert > y->expert) - (x->expert < y->expert);
}

/* counts[e]: the pairs of expert e; returns how many experts have any, -1 with an exception. */
static Py_ssize_t count_pairs(
    const int32_t *experts, Py_ssize_t num, const int32_t *workers, Py_ssize_t num_experts, Py_ssize_t *counts)
{
    Py_ssize_t hit = 0;
    for (Py_ssize_t i = 0; i < num; i++) {
        int32_t expert = experts[i];
        if (expert < 0 || expert >= num_experts || workers[expert] < 0) {
            PyErr_Format(PyExc_ValueError, "expert %d of %zd, or nobody computes it", expert, num_experts);
            return -1;
        }
        hit += counts[expert]++ == 0;
    }
    return hit;
}

/* The segments of all pairs by ascending worker, then expert; starts[e] is where expert e's places begin. */
static void place_segments(
    const Py_ssize_t *counts, const int32_t *workers, Py_ssize_t num_experts, Segment *segments, Py_ssize_t *starts)
{
    Py_ssize_t num = 0, start = 0;
    for (Py_ssize_t e = 0; e < num_experts; e++)
        if (counts[e] != 0)
            segments[num++] = (Segment){workers[e], (int32_t)e, 0};
    qsort(segments, num, sizeof *segments, compare);
    for (Py_ssize_t i = 0; i < num; i++) {
        segments[i].start = starts[segments[i].expert] = start;
        start += counts[segments[i].expert];
    }
}

/* A share's (expert, rows) of each segment from `first` to `last`, and zeros to a multiple of a section.
 *
 * With `of_block` that follows, and room for `rows` numbers, in another section: see `pick_rows`.
 */
static PyObject *tail_of(
    const Segment *segments, Py_ssize_t first, Py_ssize_t last, const Py_ssize_t *counts, Py_ssize_t rows,
    Py_ssize_t of_block)
{
    Py_ssize_t picks = aligned((last - first) * 8, SECTION);
    PyObject *tail = PyBytes_FromStringAndSize(NULL, picks + (of_block ? aligned(4 + rows * 4, SECTION) : 0));
    if (tail == NULL)
        return NULL;
    int32_t *table = memset(PyBytes_AS_STRING(tail), 0, PyBytes_GET_SIZE(tail));
    if (of_block)
        table[picks / 4] = (int32_t)of_block;
    for (Py_ssize_t i = first; i < last; i++) {
        *table++ = segments[i].expert;
        *table++ = (int32_t)counts[segments[i].expert];
    }
    return tail;
}

/* Which rows each of the shares that `cut` made asks about, into its tail. */
static void pick_rows(PyObject *shares, const int32_t *index, const int64_t *pieces)
{
    for (Py_ssize_t i = 0; i < PyList_GET_SIZE(shares); i++, pieces += 4) {
        PyObject *share = PyTuple_GET_ITEM(PyList_GET_ITEM(shares, i), 0), *tail = PyTuple_GET_ITEM(share, 4);
        Py_ssize_t picks = aligned(PyLong_AsSsize_t(PyTuple_GET_ITEM(share, 3)) * 8, SECTION);
        memcpy(PyBytes_AS_STRING(tail) + picks + 4, index + pieces[0], pieces[1] * 4);
    }
}

/* A tuple of numbers, and of `last` if it is to have one, whose reference is taken over. Without a format to read. */
static PyObject *tuple_of(const Py_ssize_t *numbers, Py_ssize_t num, PyObject *last, int has_last)
{
    PyObject *tuple = has_last && last == NULL ? NULL : PyTuple_New(num + has_last);
    if (tuple == NULL) {
        Py_XDECREF(last);
        return NULL;
    }
    if (has_last)
        PyTuple_SET_ITEM(tuple, num, last);
    for (Py_ssize_t i = 0; i < num; i++) {
        PyObject *number = PyLong_FromSsize_t(numbers[i]);
        PyTuple_SET_ITEM(tuple, i, number);
        if (number == NULL)
            Py_CLEAR(tuple);
        if (tuple == NULL)
            return NULL;
    }
    return tuple;
}

/* [((worker, start, stop, segments, tail), (start, stop, place, bytes))]: the shares of workers and their pieces, which
 * are also written to `pieces`, as long as there are segments. `end` is that of the block.
 */
static PyObject *cut(
    const Segment *segments, Py_ssize_t num, const Py_ssize_t *counts, Py_ssize_t row_nbytes, Py_ssize_t scale_nbytes,
    Py_ssize_t of_block, int64_t *pieces, Py_ssize_t *end)
{
    PyObject *shares = PyList_New(0);
    *end = 0;
    for (Py_ssize_t first = 0, last; shares != NULL && first < num; first = last) {
        Py_ssize_t start = segments[first].start, rows = 0;
        for (last = first; last < num && segments[last].worker == segments[first].worker; last++)
            rows += counts[segments[last].expert];
        Py_ssize_t scales = aligned(rows * row_nbytes, 16);
        Py_ssize_t nbytes = aligned(scales + rows * scale_nbytes, 16);
        int64_t piece[] = {start, rows, *end, *end + scales};
        memcpy(pieces, piece, sizeof piece);
        pieces += 4;
        Py_ssize_t share[] = {segments[first].worker, start, start + rows, last - first};
        Py_ssize_t place[] = {start, start + rows, *end, nbytes};
        PyObject *both = PyTuple_New(2);
        if (both != NULL) {
            PyTuple_SET_ITEM(both, 0, tuple_of(share, 4, tail_of(segments, first, last, counts, rows, of_block), 1));
            PyTuple_SET_ITEM(both, 1, tuple_of(place, 4, NULL, 0));
        }
        if (both == NULL || PyTuple_GET_ITEM(both, 0) == NULL || PyTuple_GET_ITEM(both, 1) == NULL
            || PyList_Append(shares, both) < 0)
            Py_CLEAR(shares);
        Py_XDECREF(both);
        *end += aligned(nbytes, TABLE_ALIGN);
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

/* fan_out(tail, num_pairs, workers, rows, row_nbytes, scale_nbytes, of_block)
 *     -> (memory of the tables, (index, pieces, slots, weights), most, shares and pieces, bytes of the block)
 *
 * The tail is a NodeShare's; workers [num_experts], rows [num_rows]; the tables are those of `services.router.tables`.
 */
static PyObject *fan_out(PyObject *Py_UNUSED(module), PyObject *args)
{
    Py_buffer in[3];
    Py_ssize_t num, row_nbytes, scale_nbytes, of_block;
    if (!PyArg_ParseTuple(args, "y*ny*y*nnn", &in[0], &num, &in[1], &in[2], &row_nbytes, &scale_nbytes, &of_block))
        return NULL;
    Py_ssize_t num_experts = in[1].len / 4, num_rows = in[2].len / 4, section = in[0].len / 12, num_segments, most, end;
    const int32_t *pair_rows = in[0].buf, *experts = pair_rows + section, *weights = experts + section;
    const int32_t *workers = in[1].buf, *rows = in[2].buf;
    PyObject *memory = NULL, *shares = NULL, *result = NULL;
    Segment *segments = NULL;
    Py_ssize_t *counts = PyMem_Calloc(2 * num_experts + 1, sizeof *counts), *starts = counts + num_experts;
    if (counts == NULL) {
        PyErr_NoMemory();
        goto done;
    }
    if (num < 1 || in[0].len != 3 * aligned(num * 4, SECTION)) {
        PyErr_Format(PyExc_ValueError, "%zd bytes for %zd pairs", in[0].len, num);
        goto done;
    }
    if ((most = most_pairs(pair_rows, num, num_rows)) == 0
        || (num_segments = count_pairs(experts, num, workers, num_experts, counts)) < 0)
        goto done;
    segments = PyMem_Malloc((num_segments + 1) * sizeof *segments);
    Py_ssize_t pieces_at = aligned(num * 4, TABLE_ALIGN), slots_at = pieces_at + aligned(num_segments * 32, TABLE_ALIGN);
    Py_ssize_t weights_at = slots_at + aligned(num_rows * most * 4, TABLE_ALIGN);
    memory = PyByteArray_FromStringAndSize(NULL, weights_at + aligned(num_rows * most * 4, TABLE_ALIGN));
    if (segments == NULL || memory == NULL)
        goto done;
    place_segments(counts, workers, num_experts, segments, starts);
    char *to = bytes_of(memory);
    int64_t *pieces = (int64_t *)(to + pieces_at);
    shares = cut(segments, num_segments, counts, row_nbytes, scale_nbytes, of_block, pieces, &end);
    if (shares == NULL)
        goto done;
    int32_t *to_index = (int32_t *)to, *to_slots = (int32_t *)(to + slots_at), *to_weights = (int32_t *)(to + weights_at);
    memset(to_slots, 0xFF, num_rows * most * 4); /* -1 */
    memset(to_weights, 0, num_rows * most * 4);
    for (Py_ssize_t i = 0, rank = 0; i < num; i++) {
        int32_t row = pair_rows[i];
        Py_ssize_t place = starts[experts[i]]++;
        to_index[place] = rows[row];
        rank = i > 0 && row == pair_rows[i - 1] ? rank + 1 : 0;
        to_slots[row * most + rank] = (int32_t)place;
        to_weights[row * most + rank] = weights[i];
    }
    if (of_block)
        pick_rows(shares, to_index, pieces);
    result = Py_BuildValue("O(nnnn)nOn", memory, (Py_ssize_t)0, pieces_at, slots_at, weights_at, most, shares, end);
done:
    PyMem_Free(counts);
    PyMem_Free(segments);
    for (int i = 0; i < 3; i++)
        PyBuffer_Release(&in[i]);
    Py_XDECREF(memory);
    Py_XDECREF(shares);
    return result;
}

static PyMethodDef functions[] = {
    {"sum_table", sum_table, METH_VARARGS, NULL},
    {"side_by_side", side_by_side, METH_VARARGS, NULL},
    {"split", split, METH_VARARGS, NULL},
    {"fan_out", fan_out, METH_VARARGS, NULL},
    {NULL, NULL, 0, NULL},
};
static struct PyModuleDef definition = {PyModuleDef_HEAD_INIT, "plan", NULL, -1, functions, NULL, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit_plan(void)
{
    return PyModule_Create(&definition);
}
