/* What a port has under way: operations of UCX, and transfers of rows agreed with a neighbour through a slot. */
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <ucp/api/ucp.h>

#include "forwarder.h"
#include "ring.h"

#define MAX_ASKED 8 /* questions that an answerer has at a time */

/* UCX's functions, looked up in the library that the process has loaded already. */
static struct {
    __typeof__(&ucp_tag_send_nbx) tag_send;
    __typeof__(&ucp_tag_msg_recv_nbx) msg_recv;
    __typeof__(&ucp_am_send_nbx) rows_send;
    __typeof__(&ucp_am_recv_data_nbx) rows_recv;
    __typeof__(&ucp_am_data_release) rows_release;
    __typeof__(&ucp_worker_set_am_recv_handler) set_handler;
    __typeof__(&ucp_worker_query) query;
    __typeof__(&ucp_tag_probe_nb) probe;
    __typeof__(&ucp_worker_progress) progress;
    __typeof__(&ucp_worker_arm) arm;
    __typeof__(&ucp_request_free) free;
    __typeof__(&ucp_get_nbx) get;
    __typeof__(&ucp_mem_map) map;
    __typeof__(&ucp_mem_unmap) unmap;
    __typeof__(&ucp_rkey_pack) pack_key;
    __typeof__(&ucp_rkey_buffer_release) release_packed;
    __typeof__(&ucp_ep_rkey_unpack) unpack_key;
    __typeof__(&ucp_rkey_ptr) address_of;
    __typeof__(&ucp_rkey_destroy) destroy_key;
} ucp;

typedef struct Operation Operation;
typedef struct Announced Announced;
typedef struct Neighbour Neighbour;
typedef struct Counts Counts;
typedef struct Port Port;

/* A question that an answerer has taken. Its neighbour stays, gone or not, until it is answered. */
typedef struct {
    Port *port;
    Neighbour *neighbour; /* NULL: not in use */
    Slot *slot;
} Asked;

struct Port {
    PyObject_HEAD
    ucp_context_h context; /* NULL when the worker is gone */
    ucp_worker_h worker;
    ucp_tag_t tag, mask; /* of messages that are found by probing; the tag alone: look at your neighbours */
    Operation *idle;          /* operations to use again */
    Operation *open;          /* every operation whose call is still to be made */
    Operation *ended, **last; /* those of them that have ended, in that order */
    Announced *announced, **last_announced; /* rows that `poll` has not told of */
    Neighbour *neighbours;
    int is_telling; /* of records, which must stay where they are */
    Py_ssize_t num_open, num_agreed, num_asked, max_head;
    Answerer *answerer; /* or NULL; Python's name of it keeps it */
    PyObject *answerer_s;
    Forwarder *forwarder; /* likewise */
    PyObject *forwarder_s;
    Asked asked[MAX_ASKED];
};

/* Memory that neighbours may reach. Kept by whoever owns the memory. */
typedef struct {
    PyObject_HEAD
    Port *port;
    ucp_mem_h memory;
    uint32_t key_nbytes;
    uint8_t key[MAX_KEY];
} Shared;

struct Operation {
    Operation *next;         /* idle or ended */
    Operation *before, *behind; /* open */
    Port *port;              /* a reference while UCX may call back */
    void *request;           /* UCX's, NULL when it has ended or is not asked yet */
    void *address;
    size_t nbytes;           /* of a receive: what the message must have */
    ucs_memory_type_t memory;
    Neighbour *neighbour; /* of rows that are agreed through `slot` */
    Slot *slot;              /* NULL before, afterwards, and when the link has closed */
    PyObject *call;          /* ended(status) */
    int status;
};

static Operation *take(Port *self, PyObject *call, void *address, size_t nbytes)
{
    Operation *op = self->idle;
    if (op != NULL)
        self->idle = op->next;
    else if ((op = PyMem_Malloc(sizeof *op)) == NULL)
        return (Operation *)PyErr_NoMemory();
    *op = (Operation){
        .port = (Port *)Py_NewRef(self), .address = address, .nbytes = nbytes, .call = Py_NewRef(call),
        .behind = self->open, .memory = UCS_MEMORY_TYPE_HOST,
    };
    if (self->open != NULL)
        self->open->before = op;
    self->open = op;
    self->num_open++;
    return op;
}

/* Takes the operation off the open ones and returns its call, a new reference. */
static PyObject *close_operation(Operation *op)
{
    Port *self = op->port;
    PyObject *call = op->call;
    op->call = NULL;
    if (op->before != NULL)
        op->before->behind = op->behind;
    else
        self->open = op->behind;
    if (op->behind != NULL)
        op->behind->before = op->before;
    self->num_open--;
    return call;
}

/* The same, and UCX knows the operation no longer. */
static PyObject *give_back(Operation *op)
{
    Port *self = op->port;
    PyObject *call = close_operation(op);
    op->next = self->idle;
    self->idle = op;
    Py_DECREF(self); /* never the last reference: the caller has one */
    return call;
}

static void has_ended(Operation *op, ucs_status_t status)
{
    Port *self = op->port;
    op->request = NULL;
    if (op->call == NULL) /* settled: nobody is told, and the operation stays where it is */
        return;
    op->status = status;
    op->next = NULL;
    *self->last = op;
    self->last = &op->next;
}

static void on_sent(void *request, ucs_status_t status, void *op)
{
    has_ended(op, status);
    ucp.free(request);
}

static void on_rows_received(void *request, ucs_status_t status, size_t length, void *given)
{
    Operation *op = given;
    has_ended(op, status == UCS_OK && length != op->nbytes ? UCS_ERR_MESSAGE_TRUNCATED : status);
    ucp.free(request);
}

static void on_received(void *request, ucs_status_t status, const ucp_tag_recv_info_t *info, void *given)
{
    Operation *op = given;
    has_ended(op, status == UCS_OK && info->length != op->nbytes ? UCS_ERR_MESSAGE_TRUNCATED : status);
    ucp.free(request);
}

/* What posting gave: 0 done, 1 under way, below 0 UCX's error; only a pending operation keeps its call. */
static int posted(Operation *op, ucs_status_ptr_t request)
{
    if (UCS_PTR_IS_PTR(request)) {
        op->request = request;
        return UCS_INPROGRESS;
    }
    Py_DECREF(give_back(op));
    return UCS_PTR_STATUS(request);
}
