/* Neighbours: processes of this host that send each other messages through shared memory, and read rows where they are.
 *
 * UCX announces, asks and confirms a transfer of rows by messages of its own, which between two processes of a host go
 * through the kernel, since UCX's shared memory does not survive a killed peer. Here a record in the ring announces the
 * rows and a slot beside it says where they are. UCX maps the memory of one device into the process of another, whose
 * kernels then read rows, and write those of an answer, without a copy in between; where it cannot, it fetches them.
 * Rows that are offered to us can be handed on: whoever gets the same key reaches the same memory, but cannot fetch from it.
 */
#include "operations.h"

#define MAX_KEYS 256                /* of one neighbour, kept while something is under way */
#define MAX_RECORD (RING_NBYTES / 4) /* of a message; longer ones go by UCX */

typedef struct Key {
    struct Key *next;
    ucp_rkey_h key;
    uint32_t nbytes;
    uint8_t packed[MAX_KEY];
} Key;

struct Neighbour {
    Neighbour *next;
    ucp_ep_h endpoint; /* NULL until it is met, and so is `out` */
    Ring *in, *out;
    ucp_tag_t sender; /* of its tags */
    int num_flying; /* rows that UCX is fetching, or somebody reads where they are */
    int is_gone;
    int num_keys;
    Key *keys; /* to its memory, the last used first */
    Counts *counts; /* of its link; NULL before that is open */
};

static void forget_keys(Neighbour *neighbour)
{
    for (Key *key; (key = neighbour->keys) != NULL;) {
        neighbour->keys = key->next;
        ucp.destroy_key(key->key);
        PyMem_Free(key);
    }
    neighbour->num_keys = 0;
}

static void free_neighbour(Neighbour *neighbour)
{
    ring_unmap(neighbour->in);
    ring_unmap(neighbour->out);
    Py_XDECREF((PyObject *)neighbour->counts);
    for (Key *key; (key = neighbour->keys) != NULL;) { /* the worker is gone, and took what they name along */
        neighbour->keys = key->next;
        PyMem_Free(key);
    }
    PyMem_Free(neighbour);
}

/* Free those that are gone, once UCX has ended their transfers and nobody reads their records. */
static void sweep_neighbours(Port *self)
{
    for (Neighbour **place = &self->neighbours, *each; !self->is_telling && (each = *place) != NULL;) {
        if (each->is_gone && each->num_flying == 0) {
            *place = each->next;
            forget_keys(each);
            free_neighbour(each);
        } else {
            place = &each->next;
        }
    }
}

/* Whose rows those are; NULL when it has been freed. */
static Neighbour *who_offers(Port *self, const Slot *slot)
{
    for (Neighbour *each = self->neighbours; each != NULL; each = each->next)
        if (slot >= each->in->slots && slot < each->in->slots + NUM_SLOTS)
            return each;
    return NULL;
}

/* UCX's key to memory: the same bytes are the same memory. NULL when UCX does not take it. */
static ucp_rkey_h key_of(Neighbour *neighbour, const Place *place)
{
    uint32_t nbytes = place->key_nbytes;
    for (Key **at = &neighbour->keys, *key; (key = *at) != NULL; at = &key->next)
        if (key->nbytes == nbytes && memcmp(key->packed, place->key, nbytes) == 0) {
            *at = key->next;
            key->next = neighbour->keys;
            neighbour->keys = key;
            return key->key;
        }
    if (neighbour->num_keys >= MAX_KEYS && neighbour->num_flying == 0)
        forget_keys(neighbour);
    Key *key = nbytes <= MAX_KEY ? PyMem_Malloc(sizeof *key) : NULL;
    if (key == NULL)
        return NULL;
    key->nbytes = nbytes;
    memcpy(key->packed, place->key, nbytes);
    if (ucp.unpack_key(neighbour->endpoint, key->packed, &key->key) != UCS_OK) {
        PyMem_Free(key);
        return NULL;
    }
    key->next = neighbour->keys;
    neighbour->keys = key;
    neighbour->num_keys++;
    return key->key;
}

/* Where a neighbour's memory is for this process; NULL when it is out of reach. */
static void *reach(Neighbour *neighbour, const Place *place)
{
    void *address;
    ucp_rkey_h key = place->nbytes == 0 ? NULL : key_of(neighbour, place);
    return key != NULL && ucp.address_of(key, place->address, &address) == UCS_OK ? address : NULL;
}

/* Let neighbours reach that memory; a status. */
static ucs_status_t share(Shared *shared, void *address, size_t nbytes, ucs_memory_type_t memory)
{
    ucp_mem_map_params_t params = {
        .field_mask =
            UCP_MEM_MAP_PARAM_FIELD_ADDRESS | UCP_MEM_MAP_PARAM_FIELD_LENGTH | UCP_MEM_MAP_PARAM_FIELD_MEMORY_TYPE,
        .address = address,
        .length = nbytes,
        .memory_type = memory,
    };
    ucs_status_t status = ucp.map(shared->port->context, &params, &shared->memory);
    if (status != UCS_OK) {
        shared->memory = NULL;
        return status;
    }
    void *packed;
    size_t size;
    status = ucp.pack_key(shared->port->context, shared->memory, &packed, &size);
    if (status != UCS_OK)
        return status;
    if (size <= MAX_KEY)
        memcpy(shared->key, packed, size);
    ucp.release_packed(packed);
    shared->key_nbytes = size;
    return size <= MAX_KEY ? UCS_OK : UCS_ERR_EXCEEDS_LIMIT;
}

/* Keys seldom change: whoever has these bytes in its cache keeps them. */
static void put_key(Place *place, const uint8_t *key, uint32_t nbytes)
{
    if (place->key_nbytes == nbytes && memcmp(place->key, key, nbytes) == 0)
        return;
    place->key_nbytes = nbytes;
    memcpy(place->key, key, nbytes);
}

static void name_place(Place *place, const Shared *shared, const void *address, size_t nbytes)
{
    place->address = (uintptr_t)address;
    place->nbytes = nbytes;
    put_key(place, shared->key, shared->key_nbytes);
}

/* Name rows that are offered to us: false when they are not, or not as many. */
static int name_offered(Port *self, Place *place, const Slot *offered, size_t nbytes)
{
    if (offered == NULL || who_offers(self, offered) == NULL || slot_state(offered) != SLOT_OFFERED)
        return 0;
    uint32_t key_nbytes = offered->rows.key_nbytes; /* once: a peer may write there */
    if (offered->rows.nbytes != nbytes || key_nbytes > MAX_KEY)
        return 0;
    place->address = offered->rows.address;
    place->nbytes = nbytes;
    put_key(place, offered->rows.key, key_nbytes);
    return 1;
}

static void wake(Port *self, Neighbour *neighbour)
{
    if (!__atomic_load_n(&neighbour->out->is_asleep, __ATOMIC_SEQ_CST))
        return;
    neighbour->out->is_asleep = 0;
    ucp_request_param_t param = {0};
    ucs_status_ptr_t request = ucp.tag_send(neighbour->endpoint, NULL, 0, self->tag, &param);
    if (UCS_PTR_IS_PTR(request))
        ucp.free(request);
}

/* False: it must go by UCX. */
static int send_record(Port *self, Neighbour *neighbour, ucp_tag_t tag, const void *message, size_t nbytes)
{
    if (nbytes > MAX_RECORD || !ring_write(neighbour->out, tag, NO_SLOT, message, nbytes))
        return 0;
    wake(self, neighbour);
    return 1;
}

static void agree(Operation *op, Neighbour *neighbour, Slot *slot)
{
    op->neighbour = neighbour;
    op->slot = slot;
    op->port->num_agreed++;
}

/* The slot is the other side's from now on. */
static void leave_slot(Operation *op, uint32_t state, ucs_status_t status)
{
    if (op->slot == NULL) /* its link has closed */
        return;
    op->slot->status = status;
    slot_pass(op->slot, state);
    op->slot = NULL;
    op->port->num_agreed--;
}

/* Announce rows with a message, in a free slot: its places are named already. False: they must go by UCX. */
static int offer_rows(
    Neighbour *neighbour, Slot *slot, Operation *op, ucp_tag_t tag, const void *message, size_t nbytes)
{
    slot_pass(slot, SLOT_OFFERED);
    if (nbytes > MAX_RECORD || !ring_write(neighbour->out, tag, slot - neighbour->out->slots, message, nbytes)) {
        slot_pass(slot, SLOT_FREE);
        return 0;
    }
    agree(op, neighbour, slot);
    wake(op->port, neighbour);
    return 1;
}

/* The slot for the next rows, the first one free, so that few are used at all; NULL while all are in use. */
static Slot *free_slot(Neighbour *neighbour)
{
    for (Slot *slot = neighbour->out->slots; slot < neighbour->out->slots + NUM_SLOTS; slot++)
        if (slot_state(slot) == SLOT_FREE)
            return slot;
    return NULL;
}

static ucp_request_param_t transfer_of(Operation *op, ucp_send_nbx_callback_t ended)
{
    return (ucp_request_param_t){
        .op_attr_mask = UCP_OP_ATTR_FIELD_CALLBACK | UCP_OP_ATTR_FIELD_USER_DATA | UCP_OP_ATTR_FIELD_MEMORY_TYPE,
        .cb.send = ended,
        .user_data = op,
        .memory_type = op->memory,
    };
}

static void on_fetched(void *request, ucs_status_t status, void *given)
{
    Operation *op = given;
    op->neighbour->num_flying--;
    leave_slot(op, SLOT_TAKEN, status);
    has_ended(op, status);
    ucp.free(request);
}

/* Fetch rows that are offered; gives a status. The operation keeps its call if pending. */
static int fetch_rows(Operation *op, Neighbour *neighbour, Slot *slot)
{
    ucs_status_t status = UCS_ERR_CANCELED;
    if (neighbour != NULL && !neighbour->is_gone && slot_state(slot) == SLOT_OFFERED) {
        agree(op, neighbour, slot);
        ucp_rkey_h key = slot->is_handed_on ? NULL : key_of(neighbour, &slot->rows);
        status = UCS_ERR_UNREACHABLE;
        if (key != NULL) {
            ucp_request_param_t param = transfer_of(op, on_fetched);
            ucs_status_ptr_t request =
                ucp.get(neighbour->endpoint, op->address, op->nbytes, slot->rows.address, key, &param);
            if (UCS_PTR_IS_PTR(request)) {
                op->request = request;
                neighbour->num_flying++;
                return UCS_INPROGRESS;
            }
            status = UCS_PTR_STATUS(request);
        }
        leave_slot(op, SLOT_TAKEN, status);
    }
    Py_DECREF(give_back(op));
    return status;
}

/* See which of our rows neighbours have done with. */
static void look_at_slots(Port *self)
{
    if (self->num_agreed == 0)
        return;
    for (Operation *op = self->open; op != NULL; op = op->behind) {
        if (op->slot == NULL || op->request != NULL || slot_state(op->slot) != SLOT_TAKEN)
            continue;
        ucs_status_t status = op->slot->status;
        leave_slot(op, SLOT_FREE, status);
        has_ended(op, status);
    }
}

/* Its link has closed, and its endpoint before. */
static void part_from(Port *self, Neighbour *neighbour)
{
    for (Operation *op = self->open; op != NULL; op = op->behind) {
        if (op->neighbour != neighbour || op->slot == NULL)
            continue;
        op->slot = NULL;
        self->num_agreed--;
        if (op->request == NULL) /* else UCX ends it */
            has_ended(op, UCS_ERR_CANCELED);
    }
    neighbour->is_gone = 1;
    sweep_neighbours(self);
}

/* False when there is something to read: do not sleep. Writers are told to wake us otherwise. */
static int may_sleep(Port *self)
{
    if (self->num_agreed != 0 || self->num_asked != 0) /* slots wake nobody, nor does a device */
        return 0;
    for (Neighbour *each = self->neighbours; each != NULL; each = each->next)
        __atomic_store_n(&each->in->is_asleep, 1, __ATOMIC_SEQ_CST);
    for (Neighbour *each = self->neighbours; each != NULL; each = each->next)
        if (!each->is_gone && ring_has_record(each->in))
            return 0;
    return 1;
}
