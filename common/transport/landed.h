/* Answers whose rows have landed, which are headers alone: counted here, and told of together with what is in line behind. */
#include "asked.h"

/* Whether that is all there is about a message: it has its turn, and counts as Python would have them. */
static int is_short(const Counts *counts, const Record *record, const MessageHeader *header)
{
    return header->magic == MAGIC && header->version == VERSION && header->landed == 1 && header->answer != 0 && counts->by_ring
           && counts->takes_landed && header->kind >= EXPERT_OUT && header->kind <= COMBINED
           && header->payload_nbytes == header->rows_nbytes && record->tag >> KIND_SHIFT == KIND_MESSAGE
           && (uint32_t)record->tag == counts->next && counts->unreturned < counts->receive_window
           && (int64_t)header->credits <= counts->send_window - counts->available;
}

/* (sender, fields of a `common.wire.header.Landed`) */
static PyObject *short_of(ucp_tag_t sender, const MessageHeader *header)
{
    unsigned long long numbers[] = {
        header->kind, header->layer, header->block, header->payload_nbytes, header->queue_us, header->compute_us,
        header->combine_us, header->answer};
    Py_ssize_t num = sizeof numbers / sizeof *numbers;
    PyObject *fields = PyTuple_New(num);
    for (Py_ssize_t i = 0; fields != NULL && i < num; i++) {
        PyObject *number = PyLong_FromUnsignedLongLong(numbers[i]);
        if (number == NULL)
            Py_CLEAR(fields);
        else
            PyTuple_SET_ITEM(fields, i, number);
    }
    return fields == NULL ? NULL : Py_BuildValue("KN", (unsigned long long)sender >> SENDER_SHIFT, fields);
}

/* Add a record to the list `found`, made at the first, if it is one: 1 then, else 0; -1 with an exception. */
static int found_landed(Neighbour *from, PyObject **found)
{
    Counts *counts = from->counts;
    Record *record = counts == NULL ? NULL : ring_first(from->in);
    MessageHeader header; /* a peer may write to its records */
    if (record == NULL || record->slot != NO_SLOT || record->nbytes != sizeof header)
        return 0;
    memcpy(&header, record->message, sizeof header);
    if (!is_short(counts, record, &header))
        return 0;
    if (*found == NULL && (*found = PyList_New(0)) == NULL)
        return -1;
    PyObject *one = short_of(from->sender, &header);
    int status = one == NULL ? -1 : PyList_Append(*found, one);
    Py_XDECREF(one);
    if (status < 0)
        return -1;
    ring_drop(from->in, record_nbytes(sizeof header));
    counts->next++;
    counts->unreturned++;
    counts->owed++; /* nothing of it is kept */
    counts->available += header.credits;
    return 1;
}
