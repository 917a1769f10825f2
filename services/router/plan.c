/* `split_by_node`'s sort and `fan_out` of services.router.plan, which say what the numbers mean. Plain loops over a block's
 * pairs: a tenth of the time of the dozens of array operations that they are in numpy.
 */
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <stdint.h>
#include <string.h>

#define MAX_ID 65536 /* workers and experts, as in the numpy form */

static int view(PyObject *object, Py_buffer *buffer, Py_ssize_t num, int writable)
{
    if (PyObject_GetBuffer(object, buffer, PyBUF_C_CONTIGUOUS | (writable ? PyBUF_WRITABLE : 0)) < 0)
        return -1;
    if (num < 0 || buffer->len == num * 4)
        return 0;
    PyBuffer_Release(buffer);
    PyErr_Format(PyExc_ValueError, "an array of %zd bytes, %zd numbers are wanted", buffer->len, num);
    return -1;
}

static int view_all(PyObject *const *objects, Py_buffer *buffers, int count, Py_ssize_t num, int num_read)
{
    for (int i = 0; i < count; i++)
        if (view(objects[i], buffers + i, num, i >= num_read) < 0) {
            while (i-- > 0)
                PyBuffer_Release(buffers + i);
            return -1;
        }
    return 0;
}

/* sort_pairs(experts, weights, nodes, top_k, experts_out, weights_out, nodes_out) -> (least node, greatest node) */
static PyObject *sort_pairs(PyObject *module, PyObject *args)
{
    PyObject *object[6];
    Py_buffer buffer[6];
    Py_ssize_t top_k;
    if (!PyArg_ParseTuple(args, "OOOnOOO", object, object + 1, object + 2, &top_k, object + 3, object + 4, object + 5))
        return NULL;
    Py_ssize_t num = PyObject_Length(object[3]);
    if (num < 1 || top_k < 1 || num % top_k)
        return num < 0 ? NULL : PyErr_Format(PyExc_ValueError, "%zd pairs of top-%zd", num, top_k);
    if (view_all(object, buffer, 6, num, 3) < 0)
        return NULL;
    const int32_t *experts = buffer[0].buf, *nodes = buffer[2].buf;
    const float *weights = buffer[1].buf;
    int32_t *experts_out = buffer[3].buf, *nodes_out = buffer[5].buf, least = nodes[0], greatest = nodes[0];
    float *weights_out = buffer[4].buf;
    for (Py_ssize_t row = 0; row < num; row += top_k)
        for (Py_ssize_t k = 0; k < top_k; k++) {
            int32_t expert = experts[row + k], node = nodes[row + k];
            Py_ssize_t at = row + k;
            for (; at > row && experts_out[at - 1] > expert; at--) {
                experts_out[at] = experts_out[at - 1];
                weights_out[at] = weights_out[at - 1];
                nodes_out[at] = nodes_out[at - 1];
            }
            experts_out[at] = expert;
            weights_out[at] = weights[row + k];
            nodes_out[at] = node;
            least = node < least ? node : least;
            greatest = node > greatest ? node : greatest;
        }
    for (int i = 0; i < 6; i++)
        PyBuffer_Release(buffer + i);
    return Py_BuildValue("ii", least, greatest);
}

/* The greatest of some ids, -1 when one is out of range. */
static int32_t greatest_of(const int32_t *ids, Py_ssize_t num)
{
    int32_t greatest = 0;
    for (Py_ssize_t i = 0; i < num; i++) {
        if (ids[i] < 0 || ids[i] >= MAX_ID)
            return -1;
        greatest = ids[i] > greatest ? ids[i] : greatest;
    }
    return greatest;
}

/* Stable order of `order` by keys[order[i]], none above `greatest`; `counts` has two numbers more. */
static void counting_sort(const int32_t *keys, const int32_t *order, int32_t *sorted, Py_ssize_t num, int32_t greatest,
                          int32_t *counts)
{
    memset(counts, 0, (greatest + 2) * sizeof *counts);
    for (Py_ssize_t i = 0; i < num; i++)
        counts[keys[i] + 1]++;
    for (int32_t key = 0; key <= greatest; key++)
        counts[key + 1] += counts[key];
    for (Py_ssize_t i = 0; i < num; i++)
        sorted[counts[keys[order[i]]]++] = order[i];
}

static PyObject *numbers(Py_ssize_t num)
{
    return PyByteArray_FromStringAndSize(NULL, num * 4);
}

#define DATA(bytes) ((void *)PyByteArray_AS_STRING(bytes))

/* The runs of equal workers: [(worker, first place, place behind, first segment, segment behind)]; fills `segments`. */
static PyObject *runs(const int32_t *order, const int32_t *workers, const int32_t *experts, Py_ssize_t num,
                      int32_t *segments, Py_ssize_t *num_segments)
{
    PyObject *list = PyList_New(0);
    Py_ssize_t start = 0, first = 0, n = 0;
    for (Py_ssize_t i = 0; list != NULL && i < num; i++) {
        int same_worker = i > 0 && workers[order[i]] == workers[order[i - 1]];
        if (!same_worker || experts[order[i]] != experts[order[i - 1]]) {
            segments[2 * n] = experts[order[i]];
            segments[2 * n++ + 1] = 0;
        }
        segments[2 * n - 1]++;
        if (i + 1 == num || workers[order[i + 1]] != workers[order[i]]) {
            PyObject *run = Py_BuildValue("innnn", workers[order[i]], start, i + 1, first, n);
            if (run == NULL || PyList_Append(list, run) < 0)
                Py_CLEAR(list);
            Py_XDECREF(run);
            start = i + 1;
            first = n;
        }
    }
    *num_segments = n;
    return list;
}

/* fan_out(pair_rows, experts, weights, workers, num_rows) -> (rows, segments, slots, weights, most, runs) */
static PyObject *fan_out(PyObject *module, PyObject *args)
{
    PyObject *object[4];
    Py_buffer buffer[4];
    Py_ssize_t num_rows;
    if (!PyArg_ParseTuple(args, "OOOOn", object, object + 1, object + 2, object + 3, &num_rows))
        return NULL;
    Py_ssize_t num = PyObject_Length(object[0]);
    if (num < 1 || num_rows < 1)
        return num < 0 ? NULL : PyErr_Format(PyExc_ValueError, "%zd pairs of %zd rows", num, num_rows);
    if (view_all(object, buffer, 4, num, 4) < 0)
        return NULL;
    const int32_t *pair_rows = buffer[0].buf, *experts = buffer[1].buf, *workers = buffer[3].buf;
    const float *weights = buffer[2].buf;
    PyObject *rows = numbers(num), *segments = numbers(2 * num), *slots = NULL, *slot_weights = NULL, *list = NULL;
    PyObject *result = NULL;
    int32_t last_expert = greatest_of(experts, num), last_worker = greatest_of(workers, num), *scratch = NULL;
    if (last_expert < 0 || last_worker < 0) {
        PyErr_SetString(PyExc_ValueError, "an expert or worker out of range");
        goto done;
    }
    scratch = PyMem_Malloc((3 * num + num_rows + last_expert + last_worker + 2) * sizeof *scratch);
    if (rows == NULL || segments == NULL || scratch == NULL) {
        PyErr_NoMemory();
        goto done;
    }
    int32_t *identity = scratch, *by_expert = identity + num, *order = by_expert + num, *of_row = order + num;
    int32_t *counts = of_row + num_rows, most = 0;
    memset(of_row, 0, num_rows * sizeof *of_row);
    for (Py_ssize_t i = 0; i < num; i++) {
        identity[i] = i;
        if (pair_rows[i] < 0 || pair_rows[i] >= num_rows) {
            PyErr_Format(PyExc_ValueError, "pair of row %d of %zd", pair_rows[i], num_rows);
            goto done;
        }
        int32_t count = ++of_row[pair_rows[i]];
        most = count > most ? count : most;
    }
    counting_sort(experts, identity, by_expert, num, last_expert, counts);
    counting_sort(workers, by_expert, order, num, last_worker, counts);
    slots = numbers(num_rows * most);
    slot_weights = numbers(num_rows * most);
    if (slots == NULL || slot_weights == NULL)
        goto done;
    memset(DATA(slots), 0xFF, num_rows * most * 4); /* -1 */
    memset(DATA(slot_weights), 0, num_rows * most * 4);
    int32_t *place_of = by_expert;
    for (Py_ssize_t place = 0; place < num; place++) {
        ((int32_t *)DATA(rows))[place] = pair_rows[order[place]];
        place_of[order[place]] = place;
    }
    memset(of_row, 0, num_rows * sizeof *of_row);
    for (Py_ssize_t i = 0; i < num; i++) {
        Py_ssize_t at = (Py_ssize_t)pair_rows[i] * most + of_row[pair_rows[i]]++;
        ((int32_t *)DATA(slots))[at] = place_of[i];
        ((float *)DATA(slot_weights))[at] = weights[i];
    }
    Py_ssize_t num_segments;
    list = runs(order, workers, experts, num, DATA(segments), &num_segments);
    if (list != NULL && PyByteArray_Resize(segments, num_segments * 8) == 0)
        result = Py_BuildValue("OOOOiO", rows, segments, slots, slot_weights, most, list);
done:
    PyMem_Free(scratch);
    Py_XDECREF(rows);
    Py_XDECREF(segments);
    Py_XDECREF(slots);
    Py_XDECREF(slot_weights);
    Py_XDECREF(list);
    for (int i = 0; i < 4; i++)
        PyBuffer_Release(buffer + i);
    return result;
}

static PyMethodDef functions[] = {
    {"sort_pairs", sort_pairs, METH_VARARGS, NULL}, {"fan_out", fan_out, METH_VARARGS, NULL}, {NULL, NULL, 0, NULL}};
static struct PyModuleDef definition = {PyModuleDef_HEAD_INIT, "plan", NULL, -1, functions};

PyMODINIT_FUNC PyInit_plan(void)
{
    return PyModule_Create(&definition);
}
