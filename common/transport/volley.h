/* Rows and their message, posted: one, or those of a volley (`common.transport.volley`) with one call from Python. */
#include "telling.h"

#define ROWS_ID 16     /* of active messages; UCXX takes the first few numbers */
#define MAX_HEAD 65536 /* bytes of a message that travel with rows; UCX may have less room */

/* Rows, and where those of the answer are wanted; with Shared or None, or the number of rows that are handed on. */
typedef struct {
    void *rows;
    size_t nbytes;
    PyObject *shared;
    void *landing;
    size_t landing_nbytes;
    PyObject *landing_shared;
} Offer;

/* A message of UCX's: the tag, then ours. */
typedef struct {
    ucp_tag_t tag;
    char message[MAX_HEAD];
} Head;

/* What an odd number names, else NULL. */
static void *neighbour_s(void *number)
{
    return (uintptr_t)number & 1 ? (char *)number - 1 : NULL;
}

/* Post `nbytes` of a message with its rows, in the slot of a neighbour or else by UCX; gives a status.
 *
 * Rows that are handed on do not go by UCX: UCS_ERR_NO_RESOURCE says that there is no slot, or no room.
 */
static int post_rows(Operation *op, void *to, const Head *head, size_t nbytes, const Offer *offer)
{
    ucp_ep_h endpoint = to;
    Neighbour *neighbour = neighbour_s(to);
    int is_handed_on = PyLong_Check(offer->shared);
    if (neighbour != NULL) {
        Slot *slot = offer->shared == Py_None ? NULL : free_slot(neighbour);
        int is_named = slot != NULL;
        if (is_named && is_handed_on)
            is_named = name_offered(op->port, &slot->rows, neighbour_s(PyLong_AsVoidPtr(offer->shared)), offer->nbytes);
        else if (is_named)
            name_place(&slot->rows, (Shared *)offer->shared, offer->rows, offer->nbytes);
        if (is_named) {
            slot->is_handed_on = is_handed_on;
            slot->landing.nbytes = 0;
            if (offer->landing_shared != Py_None)
                name_place(&slot->landing, (Shared *)offer->landing_shared, offer->landing, offer->landing_nbytes);
            if (offer_rows(neighbour, slot, op, head->tag, head->message, nbytes))
                return UCS_INPROGRESS;
        }
        endpoint = neighbour->endpoint;
    }
    if (is_handed_on) {
        Py_DECREF(give_back(op));
        return UCS_ERR_NO_RESOURCE;
    }
    ucp_request_param_t param = {
        .op_attr_mask = UCP_OP_ATTR_FIELD_CALLBACK | UCP_OP_ATTR_FIELD_USER_DATA | UCP_OP_ATTR_FIELD_MEMORY_TYPE
                        | UCP_OP_ATTR_FIELD_FLAGS,
        .flags = UCP_AM_SEND_FLAG_RNDV | UCP_AM_SEND_FLAG_COPY_HEADER,
        .cb.send = on_sent,
        .user_data = op,
        .memory_type = op->memory,
    };
    return posted(
        op, ucp.rows_send(endpoint, ROWS_ID, head, sizeof head->tag + nbytes, offer->rows, offer->nbytes, &param));
}

/* One part of a volley: (to, tag, block, target, num_rows, num_pairs, credits, answer, rows, nbytes, landing,
 * landing_nbytes, tail), with places in the blocks of `offer`. A status, or -1 with an exception (UCX's errors are
 * others).
 */
static int post_part(
    Port *self, Head *head, Offer offer, PyObject *part, PyObject *ended, ucs_memory_type_t memory, int *status)
{
    MessageHeader *header = (MessageHeader *)head->message;
    unsigned long long numbers[12];
    Py_buffer tail;
    if (!PyArg_ParseTuple(
            part, "KKKKKKKKKKKKy*", &numbers[0], &numbers[1], &numbers[2], &numbers[3], &numbers[4], &numbers[5],
            &numbers[6], &numbers[7], &numbers[8], &numbers[9], &numbers[10], &numbers[11], &tail))
        return -1;
    void *to = (void *)(uintptr_t)numbers[0];
    offer.rows = (char *)offer.rows + numbers[8];
    offer.nbytes = numbers[9];
    offer.landing = (char *)offer.landing + numbers[10];
    offer.landing_nbytes = numbers[11];
    if (offer.landing_nbytes == 0)
        offer.landing_shared = Py_None;
    size_t nbytes = sizeof *header + tail.len;
    Operation *op = NULL;
    if (numbers[3] > UINT16_MAX || (Py_ssize_t)nbytes > self->max_head)
        PyErr_Format(PyExc_ValueError, "target %llu and %zu bytes with rows, at most %zd", numbers[3], nbytes, self->max_head);
    else
        op = take(self, ended, offer.rows, offer.nbytes);
    if (op != NULL) {
        op->memory = memory;
        head->tag = numbers[1];
        header->block = numbers[2];
        header->target = numbers[3];
        header->num_rows = numbers[4];
        header->num_pairs = numbers[5];
        header->credits = numbers[6];
        header->answer = numbers[7];
        header->rows_nbytes = offer.nbytes;
        header->payload_nbytes = offer.nbytes + tail.len;
        memcpy(header + 1, tail.buf, tail.len);
        *status = post_rows(op, to, head, nbytes, &offer);
    }
    PyBuffer_Release(&tail);
    return op == NULL ? -1 : 0;
}

/* send_together(template, on_device, block, shared, landings, shared, parts, calls) -> statuses; the calls of pending
 * parts are made when they end. The two blocks are by address, 0 and None where no landing is wanted.
 */
static PyObject *port_send_together(Port *self, PyObject *args)
{
    PyObject *template, *on_device, *parts, *calls;
    unsigned long long block, landings;
    Offer offer = {0};
    if (!PyArg_ParseTuple(args, "O!O!KOKOO!O!", &PyBytes_Type, &template, &PyBool_Type, &on_device, &block,
                          &offer.shared, &landings, &offer.landing_shared, &PyList_Type, &parts, &PyList_Type, &calls))
        return NULL;
    offer.rows = (void *)(uintptr_t)block;
    offer.landing = (void *)(uintptr_t)landings;
    Py_ssize_t num = PyList_GET_SIZE(parts);
    if (PyBytes_GET_SIZE(template) != sizeof(MessageHeader) || PyList_GET_SIZE(calls) != num)
        return PyErr_Format(PyExc_ValueError, "a header has %zu bytes, and every part a call", sizeof(MessageHeader));
    PyObject *statuses = PyList_New(num);
    Head head;
    memcpy(head.message, PyBytes_AS_STRING(template), sizeof(MessageHeader));
    for (Py_ssize_t i = 0; statuses != NULL && i < num; i++) {
        int status;
        ucs_memory_type_t memory = on_device == Py_True ? UCS_MEMORY_TYPE_CUDA : UCS_MEMORY_TYPE_HOST;
        if (post_part(self, &head, offer, PyList_GET_ITEM(parts, i), PyList_GET_ITEM(calls, i), memory, &status) < 0)
            Py_CLEAR(statuses);
        else
            PyList_SET_ITEM(statuses, i, PyLong_FromLong(status));
    }
    return statuses;
}
