/* A node's pairs divided by expert worker: `services.router.plan.fan_out` says what. */
#include "shares.h"

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

/* Pairs of a node, sorted by row, then expert: `rows` [num_rows] says which row of the block each of theirs is. */
typedef struct {
    const int32_t *pair_rows, *experts, *weights, *rows;
    Py_ssize_t num, num_rows;
} Pairs;

/* Divide pairs among `workers` [num_experts]
 *     -> (memory of the tables, (index, pieces, slots, weights), most, shares and pieces, bytes of the block)
 *
 * The tables are those of `services.router.tables`.
 */
static PyObject *divide(
    const Pairs *pairs, const Py_buffer *of_experts, Py_ssize_t row_nbytes, Py_ssize_t scale_nbytes, Py_ssize_t of_block)
{
    const int32_t *workers = of_experts->buf;
    Py_ssize_t num = pairs->num, num_experts = of_experts->len / 4, num_segments, most, end;
    PyObject *memory = NULL, *shares = NULL, *result = NULL;
    Segment *segments = NULL;
    Py_ssize_t *counts = PyMem_Calloc(2 * num_experts + 1, sizeof *counts), *starts = counts + num_experts;
    if (counts == NULL)
        return PyErr_NoMemory();
    if ((most = most_pairs(pairs->pair_rows, num, pairs->num_rows)) == 0
        || (num_segments = count_pairs(pairs->experts, num, workers, num_experts, counts)) < 0)
        goto done;
    segments = PyMem_Malloc((num_segments + 1) * sizeof *segments);
    Py_ssize_t pieces_at = aligned(num * 4, TABLE_ALIGN), slots_at = pieces_at + aligned(num_segments * 32, TABLE_ALIGN);
    Py_ssize_t slots_nbytes = pairs->num_rows * most * 4, weights_at = slots_at + aligned(slots_nbytes, TABLE_ALIGN);
    memory = PyByteArray_FromStringAndSize(NULL, weights_at + aligned(slots_nbytes, TABLE_ALIGN));
    if (segments == NULL || memory == NULL)
        goto done;
    place_segments(counts, workers, num_experts, segments, starts);
    char *to = bytes_of(memory);
    int64_t *pieces = (int64_t *)(to + pieces_at);
    shares = cut(segments, num_segments, counts, row_nbytes, scale_nbytes, of_block, pieces, &end);
    if (shares == NULL)
        goto done;
    int32_t *to_index = (int32_t *)to, *to_slots = (int32_t *)(to + slots_at), *to_weights = (int32_t *)(to + weights_at);
    memset(to_slots, 0xFF, slots_nbytes); /* -1 */
    memset(to_weights, 0, slots_nbytes);
    for (Py_ssize_t i = 0, rank = 0; i < num; i++) {
        int32_t row = pairs->pair_rows[i];
        Py_ssize_t place = starts[pairs->experts[i]]++;
        to_index[place] = pairs->rows[row];
        rank = i > 0 && row == pairs->pair_rows[i - 1] ? rank + 1 : 0;
        to_slots[row * most + rank] = (int32_t)place;
        to_weights[row * most + rank] = pairs->weights[i];
    }
    if (of_block)
        pick_rows(shares, to_index, pieces);
    result = Py_BuildValue("O(nnnn)nOn", memory, (Py_ssize_t)0, pieces_at, slots_at, weights_at, most, shares, end);
done:
    PyMem_Free(counts);
    PyMem_Free(segments);
    Py_XDECREF(memory);
    Py_XDECREF(shares);
    return result;
}

/* `divide` of all pairs of a block, as they came: `top_k` of each row. */
static PyObject *divide_block(
    const int32_t *experts, const int32_t *weights, Py_ssize_t num, Py_ssize_t top_k, const Py_buffer *of_experts,
    Py_ssize_t row_nbytes, Py_ssize_t scale_nbytes, Py_ssize_t of_block)
{
    Py_ssize_t num_rows = top_k < 1 ? 0 : num / top_k;
    if (num_rows * top_k != num || num == 0)
        return PyErr_Format(PyExc_ValueError, "rows of unequal length");
    int32_t *ids = PyMem_Malloc(4 * num * 4), *sorted = ids + num, *pair_rows = sorted + num, *rows = pair_rows + num;
    if (ids == NULL)
        return PyErr_NoMemory();
    sort_pairs(experts, weights, num, top_k, ids, sorted);
    for (Py_ssize_t row = 0, i = 0; row < num_rows; row++) {
        rows[row] = (int32_t)row;
        for (Py_ssize_t last = i + top_k; i < last; i++)
            pair_rows[i] = (int32_t)row;
    }
    Pairs pairs = {pair_rows, ids, sorted, rows, num, num_rows};
    PyObject *result = divide(&pairs, of_experts, row_nbytes, scale_nbytes, of_block);
    PyMem_Free(ids);
    return result;
}
