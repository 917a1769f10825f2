/* Tag messages of one UCX worker without a Python object per message: post, poll, and one call when an operation ends.
 *
 * The same interface as `common.transport.port.UcxxPort`, which says what each method does. UCX's functions are looked
 * up in the library that the process has loaded already (its path is given to `use_library`), so that there is one copy of it
 * whoever brought it; ucp.h gives only structures and constants.
 *
 * Single-threaded, like the worker: everything runs in the thread of the loop, with the GIL held. An operation belongs
 * to the port until UCX has ended it and `poll` has called its `ended(status)`, which releases the memory.
 */
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <dlfcn.h>
#include <ucp/api/ucp.h>

#define MAX_ARRIVALS 256 /* per poll, so that a flood cannot keep completions and timers waiting */
#define MAX_PROGRESS 64

static struct {
    __typeof__(&ucp_tag_send_nbx) tag_send;
    __typeof__(&ucp_tag_recv_nbx) tag_recv;
    __typeof__(&ucp_tag_msg_recv_nbx) msg_recv;
    __typeof__(&ucp_tag_probe_nb) probe;
    __typeof__(&ucp_worker_progress) progress;
    __typeof__(&ucp_worker_arm) arm;
    __typeof__(&ucp_request_cancel) cancel;
    __typeof__(&ucp_request_free) free;
} ucp;

typedef struct Operation Operation;

typedef struct {
    PyObject_HEAD
    ucp_worker_h worker;
    ucp_tag_t tag, mask; /* of messages that are found by probing */
    Operation *idle;          /* operations to use again */
    Operation *open;          /* every operation whose call is still to be made */
    Operation *ended, **last; /* those of them that UCX has ended, in that order */
    Py_ssize_t num_open;
} Port;

struct Operation {
    Operation *next;         /* idle or ended */
    Operation *before, *behind; /* open */
    Port *port;              /* a reference while UCX may call back */
    void *request;           /* UCX's, NULL when it has ended */
    size_t nbytes;           /* of a receive: what the message must have */
    PyObject *call;          /* ended(status) */
    int status;
};

static Operation *take(Port *self, PyObject *call, size_t nbytes)
{
    Operation *op = self->idle;
    if (op != NULL)
        self->idle = op->next;
    else if ((op = PyMem_Malloc(sizeof *op)) == NULL)
        return (Operation *)PyErr_NoMemory();
    op->next = NULL;
    op->port = (Port *)Py_NewRef(self);
    op->request = NULL;
    op->nbytes = nbytes;
    op->call = Py_NewRef(call);
    op->status = 0;
    op->before = NULL;
    op->behind = self->open;
    if (self->open != NULL)
        self->open->before = op;
    self->open = op;
    self->num_open++;
    return op;
}

/* Takes the operation off the open ones and returns its call, a new reference. */
static PyObject *close_operation(Operation *op)
{
    Port *self = op->port;
    PyObject *call = op->call;
    op->call = NULL;
    if (op->before != NULL)
        op->before->behind = op->behind;
    else
        self->open = op->behind;
    if (op->behind != NULL)
        op->behind->before = op->before;
    self->num_open--;
    return call;
}

/* The same, and UCX knows the operation no longer. */
static PyObject *give_back(Operation *op)
{
    Port *self = op->port;
    PyObject *call = close_operation(op);
    op->next = self->idle;
    self->idle = op;
    Py_DECREF(self); /* never the last reference: the caller has one */
    return call;
}

static void has_ended(Operation *op, void *request, ucs_status_t status)
{
    Port *self = op->port;
    if (op->call == NULL) { /* settled: nobody is told, and the operation stays where it is */
        ucp.free(request);
        return;
    }
    op->status = status;
    op->request = NULL;
    op->next = NULL;
    *self->last = op;
    self->last = &op->next;
    ucp.free(request);
}

static void on_sent(void *request, ucs_status_t status, void *op)
{
    has_ended(op, request, status);
}

static void on_received(void *request, ucs_status_t status, const ucp_tag_recv_info_t *info, void *given)
{
    Operation *op = given;
    if (status == UCS_OK && info->length != op->nbytes)
        status = UCS_ERR_MESSAGE_TRUNCATED;
    has_ended(op, request, status);
}

/* What posting gave: 0 done, 1 under way, below 0 UCX's error; only a pending operation keeps its call. */
static int posted(Operation *op, ucs_status_ptr_t request)
{
    if (UCS_PTR_IS_PTR(request)) {
        op->request = request;
        return UCS_INPROGRESS;
    }
    Py_DECREF(give_back(op));
    return UCS_PTR_STATUS(request);
}

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

/* send(endpoint, address, nbytes, on_device, tag, ended) */
static PyObject *port_send(Port *self, PyObject *const *args, Py_ssize_t num_args)
{
    if (!check_arguments(num_args, 6))
        return NULL;
    ucp_ep_h endpoint = PyLong_AsVoidPtr(args[0]);
    void *address = PyLong_AsVoidPtr(args[1]);
    size_t nbytes = PyLong_AsSize_t(args[2]);
    ucp_tag_t tag = PyLong_AsUnsignedLongLong(args[4]);
    if (PyErr_Occurred())
        return NULL;
    Operation *op = take(self, args[5], nbytes);
    if (op == NULL)
        return NULL;
    ucp_request_param_t param = {
        .op_attr_mask = UCP_OP_ATTR_FIELD_CALLBACK | UCP_OP_ATTR_FIELD_USER_DATA | UCP_OP_ATTR_FIELD_MEMORY_TYPE,
        .cb.send = on_sent,
        .user_data = op,
        .memory_type = memory_of(args[3]),
    };
    return PyLong_FromLong(posted(op, ucp.tag_send(endpoint, address, nbytes, tag, &param)));
}

static ucp_request_param_t receiving(Operation *op, PyObject *on_device, ucp_tag_recv_info_t *info)
{
    return (ucp_request_param_t){
        .op_attr_mask = UCP_OP_ATTR_FIELD_CALLBACK | UCP_OP_ATTR_FIELD_USER_DATA | UCP_OP_ATTR_FIELD_MEMORY_TYPE
                        | UCP_OP_ATTR_FIELD_RECV_INFO,
        .cb.recv = on_received,
        .user_data = op,
        .memory_type = memory_of(on_device),
        .recv_info.tag_info = info,
    };
}

static int received(Operation *op, ucs_status_ptr_t request, const ucp_tag_recv_info_t *info, size_t nbytes)
{
    int status = posted(op, request);
    return status == UCS_OK && info->length != nbytes ? UCS_ERR_MESSAGE_TRUNCATED : status;
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
    Operation *op = take(self, args[3], nbytes);
    if (op == NULL)
        return NULL;
    ucp_tag_recv_info_t info = {0, nbytes};
    ucp_request_param_t param = receiving(op, Py_False, &info);
    return PyLong_FromLong(received(op, ucp.msg_recv(self->worker, address, nbytes, message, &param), &info, nbytes));
}

/* expect(tag, address, nbytes, on_device, ended) -> (status, number) */
static PyObject *port_expect(Port *self, PyObject *const *args, Py_ssize_t num_args)
{
    if (!check_arguments(num_args, 5))
        return NULL;
    ucp_tag_t tag = PyLong_AsUnsignedLongLong(args[0]);
    void *address = PyLong_AsVoidPtr(args[1]);
    size_t nbytes = PyLong_AsSize_t(args[2]);
    if (PyErr_Occurred())
        return NULL;
    Operation *op = take(self, args[4], nbytes);
    if (op == NULL)
        return NULL;
    ucp_tag_recv_info_t info = {0, nbytes};
    ucp_request_param_t param = receiving(op, args[3], &info);
    ucs_status_ptr_t request = ucp.tag_recv(self->worker, address, nbytes, tag, (ucp_tag_t)-1, &param);
    int status = received(op, request, &info, nbytes);
    return Py_BuildValue("iN", status, PyLong_FromVoidPtr(status == UCS_INPROGRESS ? op : NULL));
}

/* cancel(number): of an `expect` that has not called `ended` yet */
static PyObject *port_cancel(Port *self, PyObject *number)
{
    Operation *op = PyLong_AsVoidPtr(number);
    if (PyErr_Occurred())
        return NULL;
    if (op != NULL && op->request != NULL)
        ucp.cancel(self->worker, op->request);
    Py_RETURN_NONE;
}

/* Takes over the reference; -1 when it raised. */
static int make_call(PyObject *call, int status)
{
    PyObject *number = PyLong_FromLong(status);
    PyObject *result = number == NULL ? NULL : PyObject_CallOneArg(call, number);
    Py_XDECREF(number);
    Py_DECREF(call);
    Py_XDECREF(result);
    return result == NULL ? -1 : 0;
}

/* Calls what has ended. -1 when a call raised; the rest is for the next time. */
static int call_ended(Port *self)
{
    int num = 0;
    Operation *op;
    while ((op = self->ended) != NULL) {
        self->ended = op->next;
        if (self->ended == NULL)
            self->last = &self->ended;
        int status = op->status;
        if (make_call(give_back(op), status) < 0)
            return -1;
        num++;
    }
    return num;
}

/* poll(arrived) -> bool */
static PyObject *port_poll(Port *self, PyObject *arrived)
{
    for (int i = 0; i < MAX_PROGRESS && ucp.progress(self->worker); i++)
        ;
    int num = 0;
    for (; num < MAX_ARRIVALS; num++) {
        ucp_tag_recv_info_t info;
        ucp_tag_message_h message = ucp.probe(self->worker, self->tag, self->mask, 1, &info);
        if (message == NULL)
            break;
        PyObject *args[3] = {
            PyLong_FromUnsignedLongLong(info.sender_tag), PyLong_FromSize_t(info.length), PyLong_FromVoidPtr(message)};
        PyObject *result = NULL;
        if (args[0] != NULL && args[1] != NULL && args[2] != NULL)
            result = PyObject_Vectorcall(arrived, args, 3, NULL);
        for (int i = 0; i < 3; i++)
            Py_XDECREF(args[i]);
        if (result == NULL)
            return NULL;
        Py_DECREF(result);
    }
    int ended = call_ended(self);
    return ended < 0 ? NULL : PyBool_FromLong(num + ended);
}

/* arm() -> bool */
static PyObject *port_arm(Port *self, PyObject *Py_UNUSED(ignored))
{
    return PyBool_FromLong(ucp.arm(self->worker) == UCS_OK);
}

/* settle(): the worker is gone. An operation that UCX never ended is not used again, should UCX end it all the same. */
static PyObject *port_settle(Port *self, PyObject *Py_UNUSED(ignored))
{
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
    unsigned long long worker, tag, mask;
    if (!PyArg_ParseTuple(args, "KKK", &worker, &tag, &mask))
        return -1;
    if (ucp.tag_send == NULL) {
        PyErr_SetString(PyExc_RuntimeError, "use_library comes first");
        return -1;
    }
    self->worker = (ucp_worker_h)(uintptr_t)worker;
    self->tag = tag;
    self->mask = mask;
    self->last = &self->ended;
    return 0;
}

static void port_dealloc(Port *self)
{
    PyTypeObject *type = Py_TYPE(self);
    for (Operation *op = self->idle; op != NULL;) {
        Operation *next = op->next;
        PyMem_Free(op);
        op = next;
    }
    type->tp_free(self);
    Py_DECREF(type);
}

static PyMethodDef port_methods[] = {
    {"send", (PyCFunction)(void (*)(void))port_send, METH_FASTCALL, NULL},
    {"receive", (PyCFunction)(void (*)(void))port_receive, METH_FASTCALL, NULL},
    {"expect", (PyCFunction)(void (*)(void))port_expect, METH_FASTCALL, NULL},
    {"cancel", (PyCFunction)port_cancel, METH_O, NULL},
    {"poll", (PyCFunction)port_poll, METH_O, NULL},
    {"arm", (PyCFunction)port_arm, METH_NOARGS, NULL},
    {"settle", (PyCFunction)port_settle, METH_NOARGS, NULL},
    {NULL, NULL, 0, NULL},
};
static PyGetSetDef port_attributes[] = {{"num_open", (getter)port_num_open, NULL, NULL, NULL}, {NULL}};
static PyType_Slot port_slots[] = {
    {Py_tp_init, port_init},       {Py_tp_dealloc, port_dealloc}, {Py_tp_methods, port_methods},
    {Py_tp_getset, port_attributes}, {0, NULL},
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
        {"ucp_tag_send_nbx", (void **)&ucp.tag_send}, {"ucp_tag_recv_nbx", (void **)&ucp.tag_recv},
        {"ucp_tag_msg_recv_nbx", (void **)&ucp.msg_recv}, {"ucp_tag_probe_nb", (void **)&ucp.probe},
        {"ucp_worker_progress", (void **)&ucp.progress}, {"ucp_worker_arm", (void **)&ucp.arm},
        {"ucp_request_cancel", (void **)&ucp.cancel}, {"ucp_request_free", (void **)&ucp.free},
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
    Py_XDECREF(type);
    return module;
}
