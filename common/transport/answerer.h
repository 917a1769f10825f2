/* Who answers messages of neighbours without Python, and what a port and it tell each other. Known to both sides alone.
 *
 * A port offers each message with rows, of a neighbour's whose turn it is, to its answerer before Python is told. What
 * that takes it answers later with a header, for the rows of the answer are then where they are wanted; all else goes
 * on as if there were no answerer, so it refuses whatever is out of the ordinary.
 */
#include <stddef.h>
#include <stdint.h>

#define ANSWERER "atoll.answerer" /* of a capsule with an Answerer */

/* A header as `common.wire.header` packs it, and kinds of messages. */
#define MAGIC 0xA701
#define VERSION 5
enum { DISPATCH = 1, EXPERT_IN = 3, EXPERT_OUT = 4, COMBINED = 6, EXPERT_PICK = 9 }; /* 5: PARTIAL */
typedef struct {
    uint16_t magic;
    uint8_t version, kind, wire, unused;
    uint16_t layer;
    uint32_t epoch, width;
    uint64_t block, trace;
    uint32_t num_rows, num_pairs;
    uint16_t target, attempt, microbatch;
    uint8_t landed, none;
    uint64_t payload_nbytes;
    uint32_t credits, room[3], queue_us, compute_us, combine_us, more_room;
    uint64_t rows_nbytes;
    uint32_t answer, rest[7];
} MessageHeader;
_Static_assert(sizeof(MessageHeader) == 128, "a header has 128 bytes");

/* A message with rows: valid during `take`, but the rows and the landing until it is answered. */
typedef struct {
    const MessageHeader *header;
    const uint8_t *tail; /* what follows the header */
    size_t tail_nbytes;
    const char *rows; /* the header's rows_nbytes */
    char *landing;    /* where the rows of the answer are wanted */
    size_t landing_nbytes;
} Question;

typedef struct Answerer Answerer;
struct Answerer {
    /* True: it will be answered, once, by this name. Nothing else may have happened when it is refused. */
    int (*take)(Answerer *self, const Question *question, void *asked);
    /* Answer what can be; how many, -1 with an exception. */
    int (*look)(Answerer *self);
    /* The port goes away: nothing will be answered any more. */
    void (*forget)(Answerer *self);
    /* The port's. The rows of the answer are at the landing. False: there is no room, so again later. */
    int (*answer)(void *asked, MessageHeader *header);
};
