/* The parts of `services.router.plan` that every pair passes: the same results as there, in a tenth of the time.
 *
 * Arguments are contiguous arrays of 32 bits; results are bytes, which numpy views. ValueError where an index would
 * lie outside: callers have checked what came over the wire.
 */
#include "fan_out.h"

/* fan_out(tail, num_pairs, workers, rows, row_nbytes, scale_nbytes, of_block): `divide` of a NodeShare. */
static PyObject *fan_out(PyObject *Py_UNUSED(module), PyObject *args)
{
    Py_buffer in[3];
    Py_ssize_t num, row_nbytes, scale_nbytes, of_block;
    PyObject *result = NULL;
    if (!PyArg_ParseTuple(args, "y*ny*y*nnn", &in[0], &num, &in[1], &in[2], &row_nbytes, &scale_nbytes, &of_block))
        return NULL;
    const int32_t *tail = in[0].buf;
    Py_ssize_t section = in[0].len / 12;
    Pairs pairs = {tail, tail + section, tail + 2 * section, in[2].buf, num, in[2].len / 4};
    if (num < 1 || in[0].len != 3 * aligned(num * 4, SECTION))
        PyErr_Format(PyExc_ValueError, "%zd bytes for %zd pairs", in[0].len, num);
    else
        result = divide(&pairs, &in[1], row_nbytes, scale_nbytes, of_block);
    for (int i = 0; i < 3; i++)
        PyBuffer_Release(&in[i]);
    return result;
}

/* fan_out_block(experts, weights, top_k, workers, row_nbytes, scale_nbytes, of_block): that of all of a block, as it came.
 */
static PyObject *fan_out_block(PyObject *Py_UNUSED(module), PyObject *args)
{
    Py_buffer in[3];
    Py_ssize_t top_k, row_nbytes, scale_nbytes, of_block;
    PyObject *result = NULL;
    if (!PyArg_ParseTuple(args, "y*y*ny*nnn", &in[0], &in[1], &top_k, &in[2], &row_nbytes, &scale_nbytes, &of_block))
        return NULL;
    if (same_length(in, 2))
        result = divide_block(in[0].buf, in[1].buf, in[0].len / 4, top_k, &in[2], row_nbytes, scale_nbytes, of_block);
    for (int i = 0; i < 3; i++)
        PyBuffer_Release(&in[i]);
    return result;
}

static PyMethodDef functions[] = {
    {"sum_table", sum_table, METH_VARARGS, NULL},
    {"side_by_side", side_by_side, METH_VARARGS, NULL},
    {"split", split, METH_VARARGS, NULL},
    {"fan_out", fan_out, METH_VARARGS, NULL},
    {"fan_out_block", fan_out_block, METH_VARARGS, NULL},
    {NULL, NULL, 0, NULL},
};
static struct PyModuleDef definition = {PyModuleDef_HEAD_INIT, "plan", NULL, -1, functions, NULL, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit_plan(void)
{
    return PyModule_Create(&definition);
}
