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
 *
 * An endpoint, a message or rows are numbers to Python. An odd one belongs to a neighbour: what it names is aligned.
 */
#include "volley.h"

#include <dlfcn.h>
#include <structmember.h>

#define MAX_PROGRESS 64

static int check_arguments(Py_ssize_t given, Py_ssize_t wanted)
{
    if (given != wanted)
        PyErr_Format(PyExc_TypeError, "%zd arguments, %zd are wanted", given, wanted);
    return given == wanted;
}

static ucs_memory_type_t memory_of(PyObject *on_device)
{
    return on_device == Py_True ? UCS_MEMORY_TYPE_CUDA : UCS_MEMORY_TYPE_HOST;
}

/* send(endpoint, address, nbytes, tag, ended) */
static PyObject *port_send(Port *self, PyObject *const *args, Py_ssize_t num_args)
{
    if (!check_arguments(num_args, 5))
        return NULL;
    ucp_ep_h endpoint = PyLong_AsVoidPtr(args[0]);
    void *address = PyLong_AsVoidPtr(args[1]);
    size_t nbytes = PyLong_AsSize_t(args[2]);
    ucp_tag_t tag = PyLong_AsUnsignedLongLong(args[3]);
    if (PyErr_Occurred())
        return NULL;
    Neighbour *neighbour = neighbour_s(endpoint);
    if (neighbour != NULL) {
        if (send_record(self, neighbour, tag, address, nbytes))
            return PyLong_FromLong(UCS_OK);
        endpoint = neighbour->endpoint;
    }
    Operation *op = take(self, args[4], address, nbytes);
    if (op == NULL)
        return NULL;
    ucp_request_param_t param = transfer_of(op, on_sent);
    return PyLong_FromLong(posted(op, ucp.tag_send(endpoint, address, nbytes, tag, &param)));
}

/* receive(message, address, nbytes, ended) */
static PyObject *port_receive(Port *self, PyObject *const *args, Py_ssize_t num_args)
{
    if (!check_arguments(num_args, 4))
        return NULL;
    ucp_tag_message_h message = PyLong_AsVoidPtr(args[0]);
    void *address = PyLong_AsVoidPtr(args[1]);
    size_t nbytes = PyLong_AsSize_t(args[2]);
    if (PyErr_Occurred())
        return NULL;
    Operation *op = take(self, args[3], address, nbytes);
    if (op == NULL)
        return NULL;
    ucp_tag_recv_info_t info = {0, nbytes};
    ucp_request_param_t param = {
        .op_attr_mask = UCP_OP_ATTR_FIELD_CALLBACK | UCP_OP_ATTR_FIELD_USER_DATA | UCP_OP_ATTR_FIELD_MEMORY_TYPE
                        | UCP_OP_ATTR_FIELD_RECV_INFO,
        .cb.recv = on_received,
        .user_data = op,
        .memory_type = UCS_MEMORY_TYPE_HOST,
        .recv_info.tag_info = &info,
    };
    int status = posted(op, ucp.msg_recv(self->worker, address, nbytes, message, &param));
    return PyLong_FromLong(status == UCS_OK && info.length != nbytes ? UCS_ERR_MESSAGE_TRUNCATED : status);
}

/* send_rows(endpoint, tag, head, head_nbytes, rows, nbytes, on_device, shared, landing, landing_nbytes, landing_shared,
 * ended)
 */
static PyObject *port_send_rows(Port *self, PyObject *const *args, Py_ssize_t num_args)
{
    if (!check_arguments(num_args, 12))
        return NULL;
    void *to = PyLong_AsVoidPtr(args[0]);
    Head head;
    head.tag = PyLong_AsUnsignedLongLong(args[1]);
    void *address = PyLong_AsVoidPtr(args[2]);
    Py_ssize_t nbytes = PyLong_AsSsize_t(args[3]);
    Offer offer = {
        PyLong_AsVoidPtr(args[4]), PyLong_AsSize_t(args[5]), args[7], PyLong_AsVoidPtr(args[8]), PyLong_AsSize_t(args[9]),
        args[10]};
    if (PyErr_Occurred())
        return NULL;
    if (nbytes < 0 || nbytes > self->max_head)
        return PyErr_Format(PyExc_ValueError, "%zd bytes with rows, at most %zd", nbytes, self->max_head);
    Operation *op = take(self, args[11], offer.rows, offer.nbytes);
    if (op == NULL)
        return NULL;
    op->memory = memory_of(args[6]);
    memcpy(head.message, address, nbytes);
    return PyLong_FromLong(post_rows(op, to, &head, nbytes, &offer));
}

/* receive_rows(data, address, nbytes, on_device, ended) */
static PyObject *port_receive_rows(Port *self, PyObject *const *args, Py_ssize_t num_args)
{
    if (!check_arguments(num_args, 5))
        return NULL;
    void *data = PyLong_AsVoidPtr(args[0]);
    void *address = PyLong_AsVoidPtr(args[1]);
    size_t nbytes = PyLong_AsSize_t(args[2]);
    if (PyErr_Occurred())
        return NULL;
    Operation *op = take(self, args[4], address, nbytes);
    if (op == NULL)
        return NULL;
    op->memory = memory_of(args[3]);
    Slot *slot = neighbour_s(data);
    if (slot != NULL)
        return PyLong_FromLong(fetch_rows(op, who_offers(self, slot), slot));
    size_t length = nbytes;
    ucp_request_param_t param = {
        .op_attr_mask = UCP_OP_ATTR_FIELD_CALLBACK | UCP_OP_ATTR_FIELD_USER_DATA | UCP_OP_ATTR_FIELD_MEMORY_TYPE
                        | UCP_OP_ATTR_FIELD_RECV_INFO,
        .cb.recv_am = on_rows_received,
        .user_data = op,
        .memory_type = op->memory,
        .recv_info.length = &length,
    };
    int status = posted(op, ucp.rows_recv(self->worker, data, address, nbytes, &param));
    return PyLong_FromLong(status == UCS_OK && length != nbytes ? UCS_ERR_MESSAGE_TRUNCATED : status);
}

/* reach_rows(data) -> address, landing, landing_nbytes */
static PyObject *port_reach_rows(Port *self, PyObject *number)
{
    Slot *slot = neighbour_s(PyLong_AsVoidPtr(number));
    if (PyErr_Occurred())
        return NULL;
    Neighbour *neighbour = slot == NULL ? NULL : who_offers(self, slot);
    void *rows = NULL, *landing = NULL;
    if (neighbour != NULL && !neighbour->is_gone && slot_state(slot) == SLOT_OFFERED)
        rows = reach(neighbour, &slot->rows);
    if (rows != NULL) {
        neighbour->num_flying++;
        landing = reach(neighbour, &slot->landing);
    }
    return Py_BuildValue(
        "KKK", (unsigned long long)(uintptr_t)rows, (unsigned long long)(uintptr_t)landing,
        (unsigned long long)(landing == NULL ? 0 : slot->landing.nbytes));
}

/* return_rows(data) */
static PyObject *port_return_rows(Port *self, PyObject *number)
{
    Slot *slot = neighbour_s(PyLong_AsVoidPtr(number));
    if (PyErr_Occurred())
        return NULL;
    Neighbour *neighbour = slot == NULL ? NULL : who_offers(self, slot);
    if (neighbour != NULL)
        return_slot(self, neighbour, slot);
    Py_RETURN_NONE;
}

/* discard_rows(data) */
static PyObject *port_discard_rows(Port *self, PyObject *number)
{
    void *data = PyLong_AsVoidPtr(number);
    if (PyErr_Occurred())
        return NULL;
    Slot *slot = neighbour_s(data);
    if (slot == NULL)
        ucp.rows_release(self->worker, data);
    else if (who_offers(self, slot) != NULL)
        give_rows_back(slot);
    Py_RETURN_NONE;
}

/* poll(arrived, announced, landed) -> bool */
static PyObject *port_poll(Port *self, PyObject *const *args, Py_ssize_t num_args)
{
    if (!check_arguments(num_args, 3))
        return NULL;
    Calls calls = {args[0], args[1], args[2]};
    for (int i = 0; i < MAX_PROGRESS && ucp.progress(self->worker); i++)
        ;
    look_at_slots(self);
    int messages = tell_of_messages(self, calls.arrived);
    int rows = messages < 0 ? -1 : tell_of_rows(self, calls.announced);
    int records = rows < 0 ? -1 : tell_of_records(self, &calls);
    int ended = records < 0 ? -1 : call_ended(self);
    return ended < 0 ? NULL : PyBool_FromLong(messages + rows + records + ended);
}

/* arm() -> bool */
static PyObject *port_arm(Port *self, PyObject *Py_UNUSED(ignored))
{
    return PyBool_FromLong(may_sleep(self) && ucp.arm(self->worker) == UCS_OK);
}

/* open_inbox(fd, sender) -> neighbour */
static PyObject *port_open_inbox(Port *self, PyObject *const *args, Py_ssize_t num_args)
{
    if (!check_arguments(num_args, 2))
        return NULL;
    int file = PyLong_AsLong(args[0]);
    ucp_tag_t sender = PyLong_AsUnsignedLongLong(args[1]);
    if (PyErr_Occurred())
        return NULL;
    Neighbour *neighbour = PyMem_Calloc(1, sizeof *neighbour);
    if (neighbour == NULL)
        return PyErr_NoMemory();
    neighbour->in = ring_map(file);
    if (neighbour->in == NULL) {
        PyMem_Free(neighbour);
        return PyErr_SetFromErrno(PyExc_OSError);
    }
    neighbour->sender = sender;
    neighbour->next = self->neighbours;
    self->neighbours = neighbour;
    return PyLong_FromVoidPtr(neighbour);
}

static PyTypeObject *counts_type;

/* meet(neighbour, endpoint, fd or -1, counts) -> what `send` wants */
static PyObject *port_meet(Port *self, PyObject *const *args, Py_ssize_t num_args)
{
    if (!check_arguments(num_args, 4))
        return NULL;
    if (!PyObject_TypeCheck(args[3], counts_type))
        return PyErr_Format(PyExc_TypeError, "counts of a link are wanted");
    Neighbour *neighbour = PyLong_AsVoidPtr(args[0]);
    ucp_ep_h endpoint = PyLong_AsVoidPtr(args[1]);
    int file = PyLong_AsLong(args[2]);
    if (PyErr_Occurred())
        return NULL;
    neighbour->endpoint = endpoint;
    neighbour->out = file < 0 ? NULL : ring_map(file);
    if (neighbour->out != NULL)
        neighbour->counts = (Counts *)Py_NewRef(args[3]);
    return PyLong_FromVoidPtr(neighbour->out == NULL ? (void *)endpoint : (char *)neighbour + 1);
}

/* part(neighbour) */
static PyObject *port_part(Port *self, PyObject *number)
{
    Neighbour *neighbour = PyLong_AsVoidPtr(number);
    if (PyErr_Occurred())
        return NULL;
    part_from(self, neighbour);
    Py_RETURN_NONE;
}

/* answer_with(capsule), once */
static PyObject *port_answer_with(Port *self, PyObject *capsule)
{
    Answerer *answerer = PyCapsule_GetPointer(capsule, ANSWERER);
    if (answerer == NULL)
        return NULL;
    if (self->answerer != NULL)
        return PyErr_Format(PyExc_ValueError, "a port has one answerer");
    answerer->answer = answer;
    self->answerer = answerer;
    self->answerer_s = Py_NewRef(capsule);
    Py_RETURN_NONE;
}

/* forward_with(capsule), once */
static PyObject *port_forward_with(Port *self, PyObject *capsule)
{
    Forwarder *forwarder = PyCapsule_GetPointer(capsule, FORWARDER);
    if (forwarder == NULL)
        return NULL;
    if (self->forwarder != NULL)
        return PyErr_Format(PyExc_ValueError, "a port has one forwarder");
    self->forwarder = forwarder;
    self->forwarder_s = Py_NewRef(capsule);
    Py_RETURN_NONE;
}

/* settle(): the worker is gone. An operation that UCX never ended is not used again, should UCX end it all the same. */
static PyObject *port_settle(Port *self, PyObject *Py_UNUSED(ignored))
{
    forget_announced(self);
    forget_answerer(self);
    forget_forwarder(self);
    self->context = NULL;
    if (call_ended(self) < 0)
        return NULL;
    while (self->open != NULL) {
        PyObject *call = close_operation(self->open);
        if (make_call(call, UCS_ERR_CANCELED) < 0)
            return NULL;
    }
    Py_RETURN_NONE;
}

static PyObject *port_num_open(Port *self, void *Py_UNUSED(closure))
{
    return PyLong_FromSsize_t(self->num_open);
}

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
static PyTypeObject *shared_type;

/* share(address, nbytes, on_device) -> Shared or None */
static PyObject *port_share(Port *self, PyObject *const *args, Py_ssize_t num_args)
{
    if (!check_arguments(num_args, 3))
        return NULL;
    void *address = PyLong_AsVoidPtr(args[0]);
    size_t nbytes = PyLong_AsSize_t(args[1]);
    if (PyErr_Occurred())
        return NULL;
    Shared *shared = PyObject_New(Shared, shared_type);
    if (shared == NULL)
        return NULL;
    shared->port = (Port *)Py_NewRef(self);
    shared->memory = NULL;
    if (share(shared, address, nbytes, memory_of(args[2])) == UCS_OK)
        return (PyObject *)shared;
    Py_DECREF(shared);
    Py_RETURN_NONE;
}

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
static PyObject *port_inbox_nbytes(Port *Py_UNUSED(self), void *Py_UNUSED(closure))
{
    return PyLong_FromSize_t(RING_FILE_NBYTES);
}

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
