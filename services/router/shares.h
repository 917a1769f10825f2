/* A block divided by node: `services.router.plan.split_by_node` says what. */
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
    Py_ssize_t top_k, num_nodes = 0;
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
    }
    shares = PyMem_Calloc(num_nodes + 1, sizeof *shares);
    if (shares == NULL)
        PyErr_NoMemory();
    else if (share_out(ids, weights, nodes, num / top_k, top_k, shares, num_nodes) == 0)
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
