/* Memory that two processes of a host share: messages from one to the other, and what is agreed about rows beside them.
 *
 * One writes and one reads, each its own counter, so there is no lock and nothing that a process killed in between could
 * leave half done for others: what it had not published was never sent. The receiver makes the file. It is mapped with
 * its records twice in a row, so that a record is never in two pieces.
 */
#include <stdint.h>
#include <string.h>
#include <sys/mman.h>

#define RING_NBYTES (1u << 19) /* of records; a multiple of every page size */
#define NUM_SLOTS 256          /* rows under way in one direction; credits allow about as many */
#define MAX_KEY 256
#define NO_SLOT NUM_SLOTS
#define NO_RECORD (NUM_SLOTS + 1)
#define RECORD_ALIGN 16
#define NEAR_NBYTES (1u << 15) /* of records that stay in the caches of both sides */

/* Of memory: where it is for its owner, and UCX's key to it. */
typedef struct {
    uint64_t address, nbytes;
    uint32_t key_nbytes;
    uint8_t key[MAX_KEY];
} Place;

/* Rows under way. OFFERED by the sender, who may not touch them before the receiver says TAKEN. */
enum { SLOT_FREE, SLOT_OFFERED, SLOT_TAKEN };

typedef struct {
    uint32_t state; /* written last */
    int32_t status; /* with TAKEN: UCX's */
    uint32_t is_handed_on; /* the rows are of a third process, and can be reached but not fetched */
    Place rows;
    Place landing;  /* where the sender wants the rows of the answer; 0 bytes: anywhere */
} __attribute__((aligned(64))) Slot;

typedef struct {
    uint64_t tag;
    uint32_t nbytes, slot; /* of the message, which follows */
    uint8_t message[];
} Record;

typedef struct {
    uint8_t proof[64]; /* that this is the file which was meant */
    uint64_t written __attribute__((aligned(64)));
    uint64_t read __attribute__((aligned(64)));
    uint32_t is_asleep;
    Slot slots[NUM_SLOTS];
    uint8_t records[] __attribute__((aligned(65536)));
} Ring;

#define RING_FILE_NBYTES (sizeof(Ring) + RING_NBYTES)

/* NULL when it cannot be mapped. */
static Ring *ring_map(int file)
{
    uint8_t *whole = mmap(NULL, RING_FILE_NBYTES + RING_NBYTES, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (whole == MAP_FAILED)
        return NULL;
    int protection = PROT_READ | PROT_WRITE, flags = MAP_SHARED | MAP_FIXED;
    uint8_t *once = mmap(whole, RING_FILE_NBYTES, protection, flags, file, 0);
    uint8_t *again = mmap(whole + RING_FILE_NBYTES, RING_NBYTES, protection, flags, file, sizeof(Ring));
    if (once != MAP_FAILED && again != MAP_FAILED)
        return (Ring *)whole;
    munmap(whole, RING_FILE_NBYTES + RING_NBYTES);
    return NULL;
}

static void ring_unmap(Ring *ring)
{
    if (ring != NULL)
        munmap(ring, RING_FILE_NBYTES + RING_NBYTES);
}

static uint64_t record_nbytes(uint32_t nbytes)
{
    return (sizeof(Record) + (uint64_t)nbytes + RECORD_ALIGN - 1) / RECORD_ALIGN * RECORD_ALIGN;
}

static Record *record_at(Ring *ring, uint64_t position)
{
    return (Record *)(ring->records + position % RING_NBYTES);
}

/* Where the next record goes: on from the last, or to the beginning once all has been read, behind a record of nothing.
 *
 * So of a ring that is never full the same few lines are used again and again.
 */
static uint64_t ring_next(Ring *ring)
{
    uint64_t written = ring->written, used = written % RING_NBYTES;
    if (used < NEAR_NBYTES || written != __atomic_load_n(&ring->read, __ATOMIC_ACQUIRE))
        return written;
    uint32_t rest = RING_NBYTES - used;
    *record_at(ring, written) = (Record){.nbytes = rest - sizeof(Record), .slot = NO_RECORD};
    return written + rest;
}

/* False when there is no room now, or would never be. */
static int ring_write(Ring *ring, uint64_t tag, uint32_t slot, const void *message, uint32_t nbytes)
{
    uint64_t next = ring_next(ring), end = next + record_nbytes(nbytes);
    if (end - __atomic_load_n(&ring->read, __ATOMIC_ACQUIRE) > RING_NBYTES)
        return 0;
    Record *record = record_at(ring, next);
    *record = (Record){.tag = tag, .nbytes = nbytes, .slot = slot};
    memcpy(record->message, message, nbytes);
    __atomic_store_n(&ring->written, end, __ATOMIC_SEQ_CST); /* before `is_asleep` is read */
    return 1;
}

static int ring_has_record(const Ring *ring)
{
    return __atomic_load_n(&ring->written, __ATOMIC_SEQ_CST) != ring->read;
}

static void ring_drop(Ring *ring, uint64_t size)
{
    __atomic_store_n(&ring->read, ring->read + size, __ATOMIC_RELEASE);
}

/* The oldest record, which `ring_has_record` said is there; NULL when no correct writer wrote it. */
static Record *ring_first(Ring *ring)
{
    for (int i = 0; i < 2; i++) { /* behind one of nothing there is another */
        uint64_t published = __atomic_load_n(&ring->written, __ATOMIC_ACQUIRE) - ring->read;
        Record *record = record_at(ring, ring->read);
        if (published < sizeof *record || published > RING_NBYTES || record_nbytes(record->nbytes) > published)
            return NULL;
        if (record->slot != NO_RECORD)
            return record->slot <= NO_SLOT ? record : NULL;
        ring_drop(ring, record_nbytes(record->nbytes));
    }
    return NULL;
}

static uint32_t slot_state(const Slot *slot)
{
    return __atomic_load_n(&slot->state, __ATOMIC_ACQUIRE);
}

static void slot_pass(Slot *slot, uint32_t state)
{
    __atomic_store_n(&slot->state, state, __ATOMIC_RELEASE);
}
