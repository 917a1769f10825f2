/* What Python asks of a port. An endpoint, a message or rows are numbers to it: an odd one is a neighbour's, since what it names
 * is aligned.
 */
#include "volley.h"

#define MAX_PROGRESS 64

static PyTypeObject *counts_type, *shared_type; /* of `Counts` and `Shared` */

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

static PyObject *port_inbox_nbytes(Port *Py_UNUSED(self), void *Py_UNUSED(closure))
{
    return PyLong_FromSize_t(RING_FILE_NBYTES);
}
