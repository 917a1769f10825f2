/* Where the answers to a source router's RELAYs lie, and the tables of its rows: `services.router.plan` says what. */
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <stdint.h>

#define TABLE_ALIGN 256

static void *bytes_of(PyObject *array)
{
    return array == NULL ? NULL : PyByteArray_AS_STRING(array);
}

static Py_ssize_t aligned(Py_ssize_t nbytes, Py_ssize_t to)
{
    return (nbytes + to - 1) / to * to;
}

/* A sequence's arrays of 32 bits; those that were got are released. -1 with an exception. */
static Py_ssize_t get_arrays(PyObject *sequence, Py_buffer **arrays)
{
    Py_ssize_t num = PySequence_Size(sequence);
    *arrays = num < 0 ? NULL : PyMem_Calloc(num + 1, sizeof **arrays);
    if (*arrays == NULL)
        return num < 0 ? -1 : (PyErr_NoMemory(), -1);
    for (Py_ssize_t i = 0; i < num; i++) {
        PyObject *array = PySequence_GetItem(sequence, i);
        int failed = array == NULL || PyObject_GetBuffer(array, *arrays + i, PyBUF_CONTIG_RO) < 0;
        Py_XDECREF(array);
        if (failed)
            return -1;
        if ((*arrays)[i].itemsize != 4) {
            PyErr_SetString(PyExc_ValueError, "an array that is not of 32 bits");
            return -1;
        }
    }
    return num;
}

static void release_arrays(Py_buffer *arrays)
{
    for (Py_buffer *array = arrays; array != NULL && array->obj != NULL; array++)
        PyBuffer_Release(array);
    PyMem_Free(arrays);
}

/* sum_table(rows, starts, num_rows) -> (slots, most): see `services.router.plan.sum_table`. */
static PyObject *sum_table(PyObject *Py_UNUSED(module), PyObject *args)
{
    PyObject *sequence, *starts, *slots = NULL, *result = NULL;
    Py_ssize_t num_rows, most = 1;
    Py_buffer *parts = NULL;
    if (!PyArg_ParseTuple(args, "OO!n", &sequence, &PyList_Type, &starts, &num_rows))
        return NULL;
    Py_ssize_t num = get_arrays(sequence, &parts), greatest = 0;
    Py_ssize_t *counts = PyMem_Calloc(num_rows + 1, sizeof *counts);
    if (num < 0 || counts == NULL)
        goto done;
    if (PyList_GET_SIZE(starts) != num) {
        PyErr_SetString(PyExc_ValueError, "every share has a start");
        goto done;
    }
    for (Py_ssize_t p = 0; p < num; p++)
        for (const int32_t *row = parts[p].buf, *end = row + parts[p].len / 4; row < end; row++) {
            if (*row < 0 || *row >= num_rows) {
                PyErr_Format(PyExc_ValueError, "row %d of %zd", *row, num_rows);
                goto done;
            }
            counts[*row]++;
            greatest = Py_MAX(greatest, counts[*row]);
        }
    while (most < greatest)
        most *= 2;
    slots = PyByteArray_FromStringAndSize(NULL, num_rows * most * 4);
    if (slots == NULL)
        goto done;
    int32_t *to = bytes_of(slots);
    memset(to, 0xFF, num_rows * most * 4); /* -1 */
    memset(counts, 0, num_rows * sizeof *counts);
    for (Py_ssize_t p = 0; p < num; p++) {
        long start = PyLong_AsLong(PyList_GET_ITEM(starts, p));
        if (start == -1 && PyErr_Occurred())
            goto done;
        for (const int32_t *row = parts[p].buf, *end = row + parts[p].len / 4; row < end; row++)
            to[*row * most + counts[*row]++] = (int32_t)start++;
    }
    result = Py_BuildValue("On", slots, most);
done:
    release_arrays(parts);
    PyMem_Free(counts);
    Py_XDECREF(slots);
    return result;
}

/* side_by_side(rows, slots, row_nbytes, scale_nbytes)
 *     -> (memory of the tables, (index, pieces, slots, weights), pieces, bytes of the block): see `services.router.plan`.
 */
static PyObject *side_by_side(PyObject *Py_UNUSED(module), PyObject *args)
{
    PyObject *sequence, *memory = NULL, *pieces = NULL, *result = NULL;
    Py_buffer slots, *parts = NULL;
    Py_ssize_t row_nbytes, scale_nbytes, num_places = 0, end = 0;
    if (!PyArg_ParseTuple(args, "Oy*nn", &sequence, &slots, &row_nbytes, &scale_nbytes))
        return NULL;
    Py_ssize_t num = get_arrays(sequence, &parts);
    if (num < 0)
        goto done;
    for (Py_ssize_t p = 0; p < num; p++)
        num_places += parts[p].len / 4;
    Py_ssize_t pieces_at = aligned(num_places * 4, TABLE_ALIGN), slots_at = pieces_at + aligned(num * 32, TABLE_ALIGN);
    Py_ssize_t weights_at = slots_at + aligned(slots.len, TABLE_ALIGN);
    memory = PyByteArray_FromStringAndSize(NULL, weights_at);
    pieces = PyList_New(num);
    if (memory == NULL || pieces == NULL)
        goto done;
    char *to = bytes_of(memory);
    memcpy(to + slots_at, slots.buf, slots.len);
    for (Py_ssize_t p = 0, start = 0; p < num; p++) {
        Py_ssize_t rows = parts[p].len / 4, scales = aligned(rows * row_nbytes, 16);
        Py_ssize_t nbytes = aligned(scales + rows * scale_nbytes, 16);
        int64_t table[] = {start, rows, end, end + scales};
        memcpy(to + start * 4, parts[p].buf, rows * 4);
        memcpy(to + pieces_at + p * 32, table, sizeof table);
        PyObject *piece = Py_BuildValue("nnnn", start, start + rows, end, nbytes);
        if (piece == NULL)
            goto done;
        PyList_SET_ITEM(pieces, p, piece);
        start += rows;
        end += aligned(nbytes, TABLE_ALIGN);
    }
    result = Py_BuildValue("O(nnnn)On", memory, (Py_ssize_t)0, pieces_at, slots_at, weights_at, pieces, end);
done:
    release_arrays(parts);
    PyBuffer_Release(&slots);
    Py_XDECREF(memory);
    Py_XDECREF(pieces);
    return result;
}
