/* Questions that a port's forwarder asks about a neighbour's request, sent before Python is told of that. */
#include "landed.h"

#define MAX_QUESTION 8192 /* bytes of one */

static Neighbour *who_counts(Port *self, const PyObject *counts)
{
    for (Neighbour *each = self->neighbours; each != NULL; each = each->next)
        if ((PyObject *)each->counts == counts)
            return each->is_gone ? NULL : each;
    return NULL;
}

/* A slot for the rows of a question, named as those that are `offered` to us; NULL: there is none, or it has no room. */
static Slot *slot_for(Port *self, Neighbour *to, const Slot *offered, const Forwarded *question, const Shared *landings)
{
    Slot *slot = to == NULL ? NULL : free_slot(to);
    if (slot == NULL || to->counts->available == 0 || sizeof question->header + question->tail_nbytes > MAX_QUESTION
        || !name_offered(self, &slot->rows, offered, question->header.rows_nbytes))
        return NULL;
    slot->is_handed_on = 1;
    name_place(&slot->landing, landings, question->landing, question->landing_nbytes);
    return slot;
}

/* What cannot leave now has no answer's number. */
static void post_question(Port *self, const Slot *offered, Forwarded *question, const Shared *landings)
{
    Neighbour *to = who_counts(self, question->to);
    Slot *slot = slot_for(self, to, offered, question, landings);
    Operation *op = slot == NULL ? NULL : take(self, question->ended, NULL, question->header.rows_nbytes);
    question->answer = 0;
    if (op == NULL) {
        PyErr_Clear();
        return;
    }
    Counts *counts = to->counts;
    MessageHeader *header = &question->header;
    char message[MAX_QUESTION];
    header->credits = counts->owed;
    header->answer = counts->answers % UINT32_MAX + 1;
    memcpy(message, header, sizeof *header);
    memcpy(message + sizeof *header, question->tail, question->tail_nbytes);
    ucp_tag_t tag = (ucp_tag_t)KIND_WITH_ROWS << KIND_SHIFT | counts->tag | counts->sent;
    if (!offer_rows(to, slot, op, tag, message, sizeof *header + question->tail_nbytes)) {
        Py_DECREF(give_back(op));
        return;
    }
    counts->available--;
    counts->sent++;
    counts->unreturned -= counts->owed;
    counts->owed = 0;
    question->answer = counts->answers = header->answer;
}

/* Let the forwarder ask about a record with rows, whose message is `bytes`; true when it has. */
static int forward(Port *self, const Neighbour *from, ucp_tag_t tag, PyObject *bytes, const Slot *slot)
{
    const Counts *counts = from->counts;
    size_t nbytes = bytes == NULL ? 0 : PyBytes_GET_SIZE(bytes);
    MessageHeader header;
    if (self->forwarder == NULL || counts == NULL || nbytes < sizeof header)
        return 0;
    memcpy(&header, PyBytes_AS_STRING(bytes), sizeof header);
    Question request = {
        .header = &header, .tail = (uint8_t *)PyBytes_AS_STRING(bytes) + sizeof header, .tail_nbytes = nbytes - sizeof header};
    if (!is_next(counts, tag, &header))
        return 0;
    Forwarded *questions;
    PyObject *landings;
    int num = self->forwarder->ask(self->forwarder, &request, &questions, &landings);
    for (int i = 0; i < num; i++)
        post_question(self, slot, questions + i, (Shared *)landings);
    return num > 0;
}

/* Python was told, and maybe it has raised; -1 when it has, or does now. */
static int told_of_forwarded(Port *self, int status)
{
    PyObject *type, *value, *traceback;
    PyErr_Fetch(&type, &value, &traceback);
    if (self->forwarder->told(self->forwarder) < 0)
        status = -1;
    if (type != NULL)
        PyErr_Restore(type, value, traceback);
    return status;
}

static void forget_forwarder(Port *self)
{
    self->forwarder = NULL;
    Py_CLEAR(self->forwarder_s);
}
