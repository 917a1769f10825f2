/* Who asks about a neighbour's request before Python hears of it, and what a port and it tell each other.
 *
 * A port shows each message with rows, of a neighbour's whose turn it is, to its forwarder before it tells Python. What
 * that asks about the rows leaves at once, for neighbours that read them where they are. Python is told of the message
 * all the same, and of what has left by the forwarder: whoever waits for answers is Python.
 */
#include "answerer.h"

#define FORWARDER "atoll.forwarder" /* of a capsule with a Forwarder */

/* A question about the rows of a request, which are handed on. */
typedef struct {
    PyObject *to;         /* counts of the link to whom it goes */
    MessageHeader header; /* but for what a link fills in */
    const char *tail;     /* what follows the header */
    size_t tail_nbytes;
    char *landing; /* where the rows of the answer go */
    size_t landing_nbytes;
    PyObject *ended; /* is called with a status when the receiver has done with the rows */
    uint32_t answer; /* the number of the answer's place; 0: it has not left */
} Forwarded;

typedef struct Forwarder Forwarder;
struct Forwarder {
    /* Which questions to ask, and the Shared that their landings are in. How many; 0: Python asks. `request` has no places. */
    int (*ask)(Forwarder *self, const Question *request, Forwarded **questions, PyObject **landings);
    /* Python was told of the request. -1 with an exception. */
    int (*told)(Forwarder *self);
};
