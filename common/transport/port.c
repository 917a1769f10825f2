/* Messages of one UCX worker without a Python object per message: post, poll, and one call when an operation ends.
 *
 * The interface of `common.transport.port.RowsPort`, which says what each method does. Rows are active messages, whose
 * header is a message of ours and travels with UCX's announcement of the rows; between neighbours (`neighbour.h`) the
 * announcement is a record in shared memory. UCX's functions are looked up in the library that the process has loaded
 * already (its path is given to `use_library`), so that there is one copy of it whoever brought it; ucp.h gives only
 * structures and constants.
 *
 * Single-threaded, like the worker: everything runs in the thread of the loop, with the GIL held. An operation belongs
 * to the port until UCX has ended it and `poll` has called its `ended(status)`, which releases the memory.
 */
#include "methods.h"

#include <dlfcn.h>
#include <structmember.h>

static int port_init(Port *self, PyObject *args, PyObject *kwargs)
{
    unsigned long long context, worker, tag, mask;
    if (!PyArg_ParseTuple(args, "KKKK", &context, &worker, &tag, &mask))
        return -1;
    if (ucp.tag_send == NULL) {
        PyErr_SetString(PyExc_RuntimeError, "use_library comes first");
        return -1;
    }
    self->context = (ucp_context_h)(uintptr_t)context;
    self->worker = (ucp_worker_h)(uintptr_t)worker;
    self->tag = tag;
    self->mask = mask;
    self->last = &self->ended;
    self->last_announced = &self->announced;
    ucp_worker_attr_t about = {.field_mask = UCP_WORKER_ATTR_FIELD_MAX_AM_HEADER};
    ucp_am_handler_param_t handler = {
        .field_mask = UCP_AM_HANDLER_PARAM_FIELD_ID | UCP_AM_HANDLER_PARAM_FIELD_CB | UCP_AM_HANDLER_PARAM_FIELD_ARG,
        .id = ROWS_ID,
        .cb = on_announced,
        .arg = self,
    };
    if (ucp.query(self->worker, &about) != UCS_OK || ucp.set_handler(self->worker, &handler) != UCS_OK) {
        PyErr_SetString(PyExc_OSError, "UCX's worker takes no active messages");
        return -1;
    }
    self->max_head = Py_MIN(MAX_HEAD, (Py_ssize_t)(about.max_am_header - sizeof(ucp_tag_t)));
    return 0;
}

static void port_dealloc(Port *self)
{
    PyTypeObject *type = Py_TYPE(self);
    forget_announced(self);
    forget_answerer(self);
    forget_forwarder(self);
    for (Operation *op = self->idle; op != NULL;) {
        Operation *next = op->next;
        PyMem_Free(op);
        op = next;
    }
    for (Neighbour *each = self->neighbours; each != NULL;) {
        Neighbour *next = each->next;
        free_neighbour(each);
        each = next;
    }
    type->tp_free(self);
    Py_DECREF(type);
}

static void shared_dealloc(Shared *self)
{
    PyTypeObject *type = Py_TYPE(self);
    if (self->memory != NULL && self->port->context != NULL)
        ucp.unmap(self->port->context, self->memory);
    Py_DECREF(self->port);
    type->tp_free(self);
    Py_DECREF(type);
}

static PyType_Slot shared_slots[] = {{Py_tp_dealloc, shared_dealloc}, {0, NULL}};
static PyType_Spec shared_spec = {
    "port.Shared", sizeof(Shared), 0, Py_TPFLAGS_DEFAULT | Py_TPFLAGS_DISALLOW_INSTANTIATION, shared_slots};

static void counts_dealloc(Counts *self)
{
    PyTypeObject *type = Py_TYPE(self);
    type->tp_free(self);
    Py_DECREF(type);
}

static PyMemberDef counts_members[] = {
    {"tag", T_ULONGLONG, offsetof(Counts, tag), 0, NULL},
    {"next", T_UINT, offsetof(Counts, next), 0, NULL},
    {"sent", T_UINT, offsetof(Counts, sent), 0, NULL},
    {"answers", T_UINT, offsetof(Counts, answers), 0, NULL},
    {"available", T_INT, offsetof(Counts, available), 0, NULL},
    {"send_window", T_INT, offsetof(Counts, send_window), 0, NULL},
    {"owed", T_INT, offsetof(Counts, owed), 0, NULL},
    {"_unreturned", T_INT, offsetof(Counts, unreturned), 0, NULL},
    {"receive_window", T_INT, offsetof(Counts, receive_window), 0, NULL},
    {"by_ring", T_BOOL, offsetof(Counts, by_ring), 0, NULL},
    {"takes_landed", T_BOOL, offsetof(Counts, takes_landed), 0, NULL},
    {NULL},
};
static PyType_Slot counts_slots[] = {{Py_tp_dealloc, counts_dealloc}, {Py_tp_members, counts_members}, {0, NULL}};
static PyType_Spec counts_spec = {
    "port.Counts", sizeof(Counts), 0, Py_TPFLAGS_DEFAULT | Py_TPFLAGS_BASETYPE, counts_slots};

static PyMethodDef port_methods[] = {
    {"send", (PyCFunction)(void (*)(void))port_send, METH_FASTCALL, NULL},
    {"receive", (PyCFunction)(void (*)(void))port_receive, METH_FASTCALL, NULL},
    {"send_rows", (PyCFunction)(void (*)(void))port_send_rows, METH_FASTCALL, NULL},
    {"send_together", (PyCFunction)port_send_together, METH_VARARGS, NULL},
    {"receive_rows", (PyCFunction)(void (*)(void))port_receive_rows, METH_FASTCALL, NULL},
    {"reach_rows", (PyCFunction)port_reach_rows, METH_O, NULL},
    {"return_rows", (PyCFunction)port_return_rows, METH_O, NULL},
    {"discard_rows", (PyCFunction)port_discard_rows, METH_O, NULL},
    {"poll", (PyCFunction)(void (*)(void))port_poll, METH_FASTCALL, NULL},
    {"share", (PyCFunction)(void (*)(void))port_share, METH_FASTCALL, NULL},
    {"open_inbox", (PyCFunction)(void (*)(void))port_open_inbox, METH_FASTCALL, NULL},
    {"meet", (PyCFunction)(void (*)(void))port_meet, METH_FASTCALL, NULL},
    {"part", (PyCFunction)port_part, METH_O, NULL},
    {"answer_with", (PyCFunction)port_answer_with, METH_O, NULL},
    {"forward_with", (PyCFunction)port_forward_with, METH_O, NULL},
    {"arm", (PyCFunction)port_arm, METH_NOARGS, NULL},
    {"settle", (PyCFunction)port_settle, METH_NOARGS, NULL},
    {NULL, NULL, 0, NULL},
};
static PyGetSetDef port_attributes[] = {
    {"num_open", (getter)port_num_open, NULL, NULL, NULL},
    {"inbox_nbytes", (getter)port_inbox_nbytes, NULL, NULL, NULL},
    {NULL},
};
static PyMemberDef port_members[] = {{"max_head", T_PYSSIZET, offsetof(Port, max_head), READONLY, NULL}, {NULL}};
static PyType_Slot port_slots[] = {
    {Py_tp_init, port_init},       {Py_tp_dealloc, port_dealloc}, {Py_tp_methods, port_methods},
    {Py_tp_getset, port_attributes}, {Py_tp_members, port_members}, {0, NULL},
};
static PyType_Spec port_spec = {"port.Port", sizeof(Port), 0, Py_TPFLAGS_DEFAULT, port_slots};

/* use_library(path): use the UCX library that was loaded from there. Raises OSError when it has not all functions. */
static PyObject *use_library(PyObject *module, PyObject *path)
{
    const char *name = PyUnicode_AsUTF8(path);
    void *library = name == NULL ? NULL : dlopen(name, RTLD_NOW | RTLD_NOLOAD);
    if (library == NULL)
        return name == NULL ? NULL : PyErr_Format(PyExc_OSError, "%s is not loaded", name);
    struct {
        const char *name;
        void **place;
    } wanted[] = {
        {"ucp_tag_send_nbx", (void **)&ucp.tag_send}, {"ucp_tag_msg_recv_nbx", (void **)&ucp.msg_recv},
        {"ucp_am_send_nbx", (void **)&ucp.rows_send}, {"ucp_am_recv_data_nbx", (void **)&ucp.rows_recv},
        {"ucp_am_data_release", (void **)&ucp.rows_release}, {"ucp_worker_query", (void **)&ucp.query},
        {"ucp_worker_set_am_recv_handler", (void **)&ucp.set_handler}, {"ucp_tag_probe_nb", (void **)&ucp.probe},
        {"ucp_worker_progress", (void **)&ucp.progress}, {"ucp_worker_arm", (void **)&ucp.arm},
        {"ucp_request_free", (void **)&ucp.free}, {"ucp_get_nbx", (void **)&ucp.get},
        {"ucp_rkey_ptr", (void **)&ucp.address_of},
        {"ucp_mem_map", (void **)&ucp.map}, {"ucp_mem_unmap", (void **)&ucp.unmap},
        {"ucp_rkey_pack", (void **)&ucp.pack_key}, {"ucp_rkey_buffer_release", (void **)&ucp.release_packed},
        {"ucp_ep_rkey_unpack", (void **)&ucp.unpack_key}, {"ucp_rkey_destroy", (void **)&ucp.destroy_key},
    };
    for (size_t i = 0; i < sizeof wanted / sizeof *wanted; i++)
        if ((*wanted[i].place = dlsym(library, wanted[i].name)) == NULL)
            return PyErr_Format(PyExc_OSError, "%s has no %s", name, wanted[i].name);
    Py_RETURN_NONE;
}

static PyMethodDef functions[] = {{"use_library", use_library, METH_O, NULL}, {NULL, NULL, 0, NULL}};
static struct PyModuleDef definition = {PyModuleDef_HEAD_INIT, "port", NULL, -1, functions};

PyMODINIT_FUNC PyInit_port(void)
{
    PyObject *module = PyModule_Create(&definition);
    PyObject *type = module == NULL ? NULL : PyType_FromSpec(&port_spec);
    if (type == NULL || PyModule_AddObjectRef(module, "Port", type) < 0)
        Py_CLEAR(module);
    shared_type = (PyTypeObject *)PyType_FromSpec(&shared_spec);
    counts_type = (PyTypeObject *)PyType_FromSpec(&counts_spec);
    if (shared_type == NULL || counts_type == NULL || PyModule_AddObjectRef(module, "Counts", (PyObject *)counts_type) < 0)
        Py_CLEAR(module);
    Py_XDECREF(type);
    return module;
}
