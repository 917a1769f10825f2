/* What a port's answerer has taken and not yet answered, and the counts of a link that both write. */
#include "neighbour.h"

#define KIND_SHIFT 56 /* of a tag, `common.transport.ucx_arrivals` */
#define SENDER_SHIFT 32
#define KIND_MESSAGE 1
#define KIND_WITH_ROWS 2
#define MAX_TAIL 1024 /* bytes behind the header of a message that an answerer may have */

/* Of a link to a neighbour, as Python sees them too: `common.transport.port.LinkCounts`. */
struct Counts {
    PyObject_HEAD
    unsigned long long tag; /* what those of its messages begin with */
    unsigned int next, sent; /* numbers: of the message to deliver next, of the one to be sent next */
    unsigned int answers;    /* number of the last place for an answer */
    int available, send_window, owed, unreturned, receive_window; /* credits, as in `credits` */
    char by_ring; /* all that came so far */
    char takes_landed; /* whoever handles its messages takes some in short */
};

static void give_rows_back(Slot *slot)
{
    slot->status = UCS_OK;
    slot_pass(slot, SLOT_TAKEN);
}

/* Nobody reads its rows where they are any more. */
static void return_slot(Port *self, Neighbour *neighbour, Slot *slot)
{
    give_rows_back(slot);
    neighbour->num_flying--;
    if (neighbour->is_gone)
        sweep_neighbours(self);
}

/* The message goes before what it has read is given back. */
static int answer(void *given, MessageHeader *header)
{
    Asked *asked = given;
    Port *self = asked->port;
    Neighbour *neighbour = asked->neighbour;
    Counts *counts = neighbour->counts;
    if (!neighbour->is_gone) { /* else nobody waits */
        ucp_tag_t tag = (ucp_tag_t)KIND_MESSAGE << KIND_SHIFT | counts->tag | counts->sent;
        header->credits = 1; /* the question's */
        header->landed = 1;
        if (!send_record(self, neighbour, tag, header, sizeof *header))
            return 0;
        counts->sent++;
    }
    asked->neighbour = NULL;
    self->num_asked--;
    self->num_open--;
    return_slot(self, neighbour, asked->slot);
    return 1;
}

/* Whether a message with rows is the next one, and brings no more credits than there can be. */
static int is_next(const Counts *counts, ucp_tag_t tag, const MessageHeader *header)
{
    return counts->by_ring && tag >> KIND_SHIFT == KIND_WITH_ROWS && (uint32_t)tag == counts->next
           && (int64_t)header->credits <= counts->send_window - counts->available && header->answer != 0;
}

/* Let the answerer have a question; true when it was taken. */
static int hand_over(Port *self, Neighbour *from, Slot *slot, Question *question)
{
    Asked *asked = self->asked;
    while (asked < self->asked + MAX_ASKED && asked->neighbour != NULL)
        asked++;
    if (asked == self->asked + MAX_ASKED)
        return 0;
    *asked = (Asked){self, NULL, slot};
    question->rows = reach(from, &slot->rows);
    from->num_flying++; /* so that it stays in reach */
    question->landing = question->rows == NULL ? NULL : reach(from, &slot->landing);
    if (question->landing == NULL || !self->answerer->take(self->answerer, question, asked)) {
        from->num_flying--;
        return 0;
    }
    asked->neighbour = from;
    self->num_asked++;
    self->num_open++; /* nobody wakes us when it can be answered */
    return 1;
}

/* Offer a record with rows in a slot to the answerer; true when it was taken. */
static int is_taken(Port *self, Neighbour *from, const Record *record, Slot *slot)
{
    struct {
        MessageHeader header;
        uint8_t tail[MAX_TAIL];
    } message; /* a peer may write to its records */
    uint32_t nbytes = record->nbytes;
    if (self->answerer == NULL || from->counts == NULL || nbytes < sizeof message.header || nbytes > sizeof message)
        return 0;
    memcpy(&message, record->message, nbytes);
    Question question = {
        .header = &message.header, .tail = message.tail, .tail_nbytes = nbytes - sizeof message.header,
        .landing_nbytes = slot->landing.nbytes};
    if (from->counts->available == 0 /* messages may wait for the credits that this one brings */
        || !is_next(from->counts, record->tag, &message.header) || message.header.rows_nbytes != slot->rows.nbytes
        || question.landing_nbytes == 0 || !hand_over(self, from, slot, &question))
        return 0;
    from->counts->next++;
    from->counts->available += message.header.credits;
    from->counts->available--; /* put aside for the answer, which waits for nobody */
    return 1;
}

/* How many were answered; -1 when it raised. */
static int look_at_answers(Port *self)
{
    return self->answerer == NULL ? 0 : self->answerer->look(self->answerer);
}

/* None is answered any more. */
static void forget_answerer(Port *self)
{
    if (self->answerer != NULL)
        self->answerer->forget(self->answerer);
    self->num_open -= self->num_asked;
    self->num_asked = 0;
    self->answerer = NULL;
    Py_CLEAR(self->answerer_s);
}
