/* What `poll` tells Python of: what has ended, and what came by UCX or from neighbours. A call per message. */
#include "forward.h"

#define MAX_ARRIVALS 256 /* per poll, so that a flood cannot keep completions and timers waiting */

/* Python's. */
typedef struct {
    PyObject *arrived, *announced, *landed;
} Calls;

struct Announced {
    Announced *next;
    void *data; /* UCX's, of the rows */
    size_t rows_nbytes, head_nbytes;
    ucp_tag_t tag;
    char head[];
};

/* UCX announces rows, within `progress`: kept for `poll`. What no port sends is dropped: only a stranger sends it. */
static ucs_status_t on_announced(
    void *port, const void *head, size_t nbytes, void *data, size_t rows_nbytes, const ucp_am_recv_param_t *param)
{
    Port *self = port;
    if (!(param->recv_attr & UCP_AM_RECV_ATTR_FLAG_RNDV) || nbytes < sizeof(ucp_tag_t))
        return UCS_OK;
    Announced *rows = PyMem_Malloc(sizeof *rows + nbytes);
    if (rows == NULL)
        return UCS_OK;
    rows->next = NULL;
    rows->data = data;
    rows->rows_nbytes = rows_nbytes;
    rows->head_nbytes = nbytes - sizeof rows->tag;
    memcpy(&rows->tag, head, sizeof rows->tag);
    memcpy(rows->head, (const char *)head + sizeof rows->tag, rows->head_nbytes);
    *self->last_announced = rows;
    self->last_announced = &rows->next;
    return UCS_INPROGRESS;
}

static void forget_announced(Port *self)
{
    while (self->announced != NULL) {
        Announced *rows = self->announced;
        self->announced = rows->next;
        PyMem_Free(rows);
    }
    self->last_announced = &self->announced;
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

/* Calls with numbers (and maybe an object), all references taken over. -1 when it raised. */
static int tell(PyObject *call, PyObject **args, int num)
{
    PyObject *result = NULL;
    int made = 1;
    for (int i = 0; i < num; i++)
        made = made && args[i] != NULL;
    if (made)
        result = PyObject_Vectorcall(call, args, num, NULL);
    for (int i = 0; i < num; i++)
        Py_XDECREF(args[i]);
    Py_XDECREF(result);
    return result == NULL ? -1 : 0;
}

/* -1 when a call raised; the rest is for the next time. */
static int tell_of_messages(Port *self, PyObject *arrived)
{
    for (int num = 0; num < MAX_ARRIVALS; num++) {
        ucp_tag_recv_info_t info;
        ucp_tag_message_h message = ucp.probe(self->worker, self->tag, self->mask, 1, &info);
        if (message == NULL)
            return num;
        if (info.sender_tag == self->tag) { /* a neighbour has written a record while we slept */
            ucp_request_param_t param = {0};
            ucs_status_ptr_t request = ucp.msg_recv(self->worker, NULL, 0, message, &param);
            if (UCS_PTR_IS_PTR(request))
                ucp.free(request);
            continue;
        }
        PyObject *args[3] = {
            PyLong_FromUnsignedLongLong(info.sender_tag), PyLong_FromSize_t(info.length), PyLong_FromVoidPtr(message)};
        if (tell(arrived, args, 3) < 0)
            return -1;
    }
    return MAX_ARRIVALS;
}

/* The same. */
static int tell_of_rows(Port *self, PyObject *announced)
{
    int num = 0;
    for (Announced *rows; num < MAX_ARRIVALS && (rows = self->announced) != NULL; num++) {
        self->announced = rows->next;
        if (self->announced == NULL)
            self->last_announced = &self->announced;
        PyObject *args[4] = {
            PyLong_FromUnsignedLongLong(rows->tag), PyBytes_FromStringAndSize(rows->head, rows->head_nbytes),
            PyLong_FromSize_t(rows->rows_nbytes), PyLong_FromVoidPtr(rows->data)};
        PyMem_Free(rows);
        if (tell(announced, args, 4) < 0)
            return -1;
    }
    return num;
}

/* A record of a neighbour, unless it is taken. What no port writes is told of as a message of kind 0, which closes its link. */
static int tell_of_record(Port *self, Neighbour *from, PyObject *arrived, PyObject *announced)
{
    Record *record = ring_first(from->in);
    Slot *slot = record == NULL || record->slot == NO_SLOT ? NULL : from->in->slots + record->slot;
    uint64_t size = record == NULL ? from->in->written - from->in->read : record_nbytes(record->nbytes);
    int status;
    if (record == NULL || (slot != NULL && slot_state(slot) != SLOT_OFFERED)) {
        PyObject *args[3] = {PyLong_FromUnsignedLongLong(from->sender), PyLong_FromLong(0), PyLong_FromLong(0)};
        status = tell(arrived, args, 3);
    } else if (slot != NULL && is_taken(self, from, record, slot)) {
        status = 0;
    } else if (slot != NULL) {
        ucp_tag_t tag = record->tag; /* once: a peer may write there */
        PyObject *message = PyBytes_FromStringAndSize((const char *)record->message, record->nbytes);
        int is_forwarded = forward(self, from, tag, message, slot);
        PyObject *args[4] = {
            PyLong_FromUnsignedLongLong(tag), message, PyLong_FromUnsignedLongLong(slot->rows.nbytes),
            PyLong_FromVoidPtr((char *)slot + 1)};
        status = tell(announced, args, 4);
        if (is_forwarded)
            status = told_of_forwarded(self, status);
    } else {
        PyObject *args[3] = {
            PyLong_FromUnsignedLongLong(record->tag), PyLong_FromUnsignedLong(record->nbytes),
            PyBytes_FromStringAndSize((const char *)record->message, record->nbytes)};
        status = tell(arrived, args, 3);
    }
    ring_drop(from->in, size);
    return status;
}

/* What landed so far, before anything else is told of; NULL: nothing. -1 when the call raised. */
static int tell_of_landed(PyObject *landed, PyObject **found)
{
    PyObject *args[1] = {*found};
    *found = NULL;
    return args[0] == NULL ? 0 : tell(landed, args, 1);
}

/* A record, whatever it is. -1 when a call raised. */
static int next_record(Port *self, Neighbour *from, PyObject **found, const Calls *calls)
{
    int status = found_landed(from, found);
    if (status == 0)
        status = tell_of_landed(calls->landed, found);
    else if (status > 0)
        return look_at_answers(self);
    if (status == 0 && !from->is_gone)
        status = tell_of_record(self, from, calls->arrived, calls->announced);
    return status < 0 ? -1 : look_at_answers(self);
}

/* -1 when a call raised; the rest is for the next time. */
static int tell_of_records(Port *self, const Calls *calls)
{
    int num = look_at_answers(self);
    PyObject *found = NULL;
    self->is_telling = 1;
    for (Neighbour *each = self->neighbours; num >= 0 && each != NULL; each = each->next) {
        if (__atomic_load_n(&each->in->is_asleep, __ATOMIC_RELAXED))
            __atomic_store_n(&each->in->is_asleep, 0, __ATOMIC_RELAXED);
        while (num >= 0 && num < MAX_ARRIVALS && !each->is_gone && ring_has_record(each->in))
            num = next_record(self, each, &found, calls) < 0 ? -1 : num + 1;
    }
    PyObject *type, *value, *traceback; /* whatever has raised, what landed was counted */
    PyErr_Fetch(&type, &value, &traceback);
    if (tell_of_landed(calls->landed, &found) < 0)
        num = -1;
    if (type != NULL)
        PyErr_Restore(type, value, traceback);
    self->is_telling = 0;
    sweep_neighbours(self);
    return num;
}
