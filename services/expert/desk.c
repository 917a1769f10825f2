/* Questions that an expert answers without Python: of few rows that are wanted where a neighbour says, while nothing else
 * is computed. Everything else is refused, and goes through `services.expert.worker` as it always does.
 *
 * A question becomes a turn of `services.expert.staged.Staged`: the desk writes down in pinned memory what the
 * graph of its expert shall bring, launches that graph, and answers when the device says in memory that the turn is over.
 * Layouts are those of `common.wire.blocks`.
 */
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <structmember.h>
#include <time.h>

#include "../../common/transport/answerer.h"

#define WIRE_FP8 1
#define SCALE_BLOCK 128
#define FIRST_BUCKET 8 /* rows of the smallest graph; each of the others has twice those of the one before */
#define MAX_WAITING 8

typedef int (*Launch)(void *graph, void *stream); /* cuGraphLaunch; 0: done */

/* A question under way. */
typedef struct {
    void *asked;
    long long turn, since_ns;
    MessageHeader header; /* of the answer */
    int expert;
} Waiting;

typedef struct {
    PyObject_HEAD
    Answerer answerer;
    long long turn; /* the last that was brought; Python counts it up, too */
    unsigned int width, most, stride, num_turns, num_scales;
    int64_t *calls; /* [num_turns][stride]: see `kernels.stage` */
    const volatile int64_t *told; /* the last turn that is over */
    Launch launch;
    void *stream;
    PyObject *graphs;   /* {layer << 16 | expert: bytes of a pointer for each bucket, 0 where there is none} */
    PyObject *answered; /* (layer, expert, num_rows, trace, microbatch, since_ns, ended_ns) */
    int num_waiting;
    Waiting waiting[MAX_WAITING];
} Desk;

/* What of the rows is asked about: `picks` of them, in that order, or all. */
typedef struct {
    int expert;
    const char *rows, *scales;
    const uint8_t *picks;
} Part;

static Desk *desk_of(Answerer *answerer)
{
    return (Desk *)((char *)answerer - offsetof(Desk, answerer));
}

static long long now_ns(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now); /* as time.monotonic_ns */
    return now.tv_sec * 1000000000LL + now.tv_nsec;
}

static uint64_t aligned(uint64_t nbytes)
{
    return (nbytes + 15) / 16 * 16;
}

static uint32_t number_at(const uint8_t *place)
{
    uint32_t number;
    memcpy(&number, place, sizeof number);
    return number;
}

/* Rows e4m3 of a segment with their scales at its end; false when it is not of so many, or may not have room for more. */
static int find_rows(const Desk *self, const Question *question, uint64_t num_rows, int may_be_wider, Part *part)
{
    uint64_t scales = aligned(num_rows * self->num_scales * 4), least = aligned(num_rows * self->width) + scales;
    uint64_t nbytes = question->header->rows_nbytes;
    if (nbytes % 16 != 0 || nbytes < least || (nbytes > least && !may_be_wider))
        return 0;
    part->rows = question->rows;
    part->scales = question->rows + nbytes - scales;
    return (((uintptr_t)part->rows | (uintptr_t)part->scales) & 15) == 0;
}

/* The one segment of a question, and the rows it is about; false when it must be read with more care. */
static int read_part(const Desk *self, const Question *question, Part *part)
{
    const MessageHeader *header = question->header;
    uint32_t num_rows = header->num_rows;
    int is_pick = header->kind == EXPERT_PICK;
    uint64_t tail_nbytes = is_pick ? aligned(16 + 4 * (1 + (uint64_t)num_rows)) : 16;
    if ((!is_pick && header->kind != EXPERT_IN) || num_rows < 1 || num_rows > self->most || header->num_pairs != 1 || question->tail_nbytes != tail_nbytes
        || header->payload_nbytes != header->rows_nbytes + tail_nbytes)
        return 0;
    part->expert = number_at(question->tail);
    if (part->expert < 0 || part->expert > UINT16_MAX || number_at(question->tail + 4) != num_rows)
        return 0;
    part->picks = NULL;
    if (!is_pick)
        return find_rows(self, question, num_rows, 0, part);
    uint32_t of_block = number_at(question->tail + 16);
    part->picks = question->tail + 20;
    for (uint32_t i = 0; i < num_rows; i++)
        if (number_at(part->picks + 4 * i) >= of_block)
            return 0;
    return find_rows(self, question, of_block, 1, part);
}

/* The graph for so many rows of an expert, or NULL. */
static void *graph_of(const Desk *self, uint32_t layer, int expert, uint32_t num_rows)
{
    PyObject *key = PyLong_FromUnsignedLong(layer << 16 | expert);
    PyObject *graphs = key == NULL ? NULL : PyDict_GetItemWithError(self->graphs, key); /* borrowed */
    Py_XDECREF(key);
    void *graph = NULL;
    Py_ssize_t bucket = 0;
    while ((uint32_t)FIRST_BUCKET << bucket < num_rows)
        bucket++;
    if (graphs != NULL && PyBytes_Check(graphs) && (bucket + 1) * (Py_ssize_t)sizeof graph <= PyBytes_GET_SIZE(graphs))
        memcpy(&graph, PyBytes_AS_STRING(graphs) + bucket * sizeof graph, sizeof graph);
    PyErr_Clear();
    return graph;
}

/* Write down what the next graph brings. Picks lie at the turn's end, where one call needs no fields. */
static void bring(Desk *self, const Part *part, uint32_t num_rows, const char *landing)
{
    int64_t *fields = self->calls + self->turn % self->num_turns * self->stride;
    int32_t *picks = (int32_t *)(fields + self->stride) - num_rows;
    if (part->picks != NULL)
        memcpy(picks, part->picks, 4 * num_rows);
    fields[0] = 1;
    fields[1] = num_rows;
    fields[2] = (intptr_t)part->rows;
    fields[3] = (intptr_t)part->scales;
    fields[4] = (intptr_t)landing;
    fields[5] = part->picks == NULL ? 0 : (intptr_t)picks;
}

static MessageHeader answer_to(const MessageHeader *asked, uint64_t nbytes)
{
    return (MessageHeader){
        .magic = MAGIC, .version = VERSION, .kind = EXPERT_OUT, .wire = asked->wire, .layer = asked->layer,
        .epoch = asked->epoch, .width = asked->width, .block = asked->block, .trace = asked->trace,
        .num_rows = asked->num_rows, .target = asked->target, .attempt = asked->attempt,
        .microbatch = asked->microbatch, .payload_nbytes = nbytes, .rows_nbytes = nbytes, .answer = asked->answer};
}

static int take(Answerer *answerer, const Question *question, void *asked)
{
    Desk *self = desk_of(answerer);
    const MessageHeader *header = question->header;
    uint64_t out_nbytes = aligned((uint64_t)header->num_rows * self->width * 2);
    Part part;
    if (header->magic != MAGIC || header->version != VERSION || header->wire != WIRE_FP8 || header->landed != 0
        || header->width != self->width || self->num_waiting == MAX_WAITING || *self->told != self->turn
        || !read_part(self, question, &part) || question->landing_nbytes != out_nbytes
        || ((uintptr_t)question->landing & 15) != 0)
        return 0;
    void *graph = graph_of(self, header->layer, part.expert, header->num_rows);
    if (graph == NULL)
        return 0;
    long long since_ns = now_ns();
    bring(self, &part, header->num_rows, question->landing);
    if (self->launch(graph, self->stream) != 0)
        return 0; /* Python will say why */
    self->turn++;
    self->waiting[self->num_waiting++] = (Waiting){asked, self->turn, since_ns, answer_to(header, out_nbytes), part.expert};
    return 1;
}

static int look(Answerer *answerer)
{
    Desk *self = desk_of(answerer);
    int num = 0;
    for (int i = 0; i < self->num_waiting;) {
        if (*self->told < self->waiting[i].turn)
            break; /* those behind it are later turns */
        Waiting waiting = self->waiting[i];
        long long ended_ns = now_ns();
        waiting.header.compute_us = (ended_ns - waiting.since_ns) / 1000;
        if (!answerer->answer(waiting.asked, &waiting.header)) {
            i++; /* others do not wait for it */
            continue;
        }
        self->num_waiting--;
        memmove(self->waiting + i, self->waiting + i + 1, (self->num_waiting - i) * sizeof waiting);
        num++;
        const MessageHeader *header = &waiting.header;
        PyObject *done = PyObject_CallFunction(
            self->answered, "iiIKiLL", header->layer, waiting.expert, header->num_rows,
            (unsigned long long)header->trace, header->microbatch, waiting.since_ns, ended_ns);
        if (done == NULL)
            return -1;
        Py_DECREF(done);
    }
    return num;
}

static void forget(Answerer *answerer)
{
    desk_of(answerer)->num_waiting = 0;
}

static int desk_init(Desk *self, PyObject *args, PyObject *kwargs)
{
    unsigned long long calls, told, launch, stream;
    PyObject *graphs, *answered;
    if (!PyArg_ParseTuple(args, "IIIKKKKO!O", &self->width, &self->most, &self->num_turns, &calls, &told, &launch,
                          &stream, &PyDict_Type, &graphs, &answered))
        return -1;
    if (self->graphs != NULL || self->most < 5 || self->num_turns == 0) {
        PyErr_SetString(PyExc_ValueError, "a desk begins once, with some rows and turns");
        return -1;
    }
    self->answerer = (Answerer){.take = take, .look = look, .forget = forget};
    self->stride = 1 + 5 * self->most;
    self->num_scales = (self->width + SCALE_BLOCK - 1) / SCALE_BLOCK;
    self->calls = (int64_t *)(uintptr_t)calls;
    self->told = (const int64_t *)(uintptr_t)told;
    self->launch = (Launch)(uintptr_t)launch;
    self->stream = (void *)(uintptr_t)stream;
    self->graphs = Py_NewRef(graphs);
    self->answered = Py_NewRef(answered);
    self->turn = *self->told;
    return 0;
}

static int desk_traverse(Desk *self, visitproc visit, void *arg)
{
    Py_VISIT(Py_TYPE(self));
    Py_VISIT(self->graphs);
    Py_VISIT(self->answered);
    return 0;
}

static int desk_clear(Desk *self)
{
    Py_CLEAR(self->graphs);
    Py_CLEAR(self->answered);
    return 0;
}

static void desk_dealloc(Desk *self)
{
    PyTypeObject *type = Py_TYPE(self);
    PyObject_GC_UnTrack(self);
    desk_clear(self);
    type->tp_free(self);
    Py_DECREF(type);
}

static void let_go(PyObject *capsule)
{
    Py_DECREF((PyObject *)PyCapsule_GetContext(capsule));
}

/* capsule(): for `RowsPort.answer_with` */
static PyObject *desk_capsule(Desk *self, PyObject *Py_UNUSED(ignored))
{
    PyObject *capsule = PyCapsule_New(&self->answerer, ANSWERER, let_go);
    if (capsule != NULL)
        PyCapsule_SetContext(capsule, Py_NewRef(self));
    return capsule;
}

static PyMethodDef desk_methods[] = {{"capsule", (PyCFunction)desk_capsule, METH_NOARGS, NULL}, {NULL, NULL, 0, NULL}};
static PyMemberDef desk_members[] = {
    {"turn", T_LONGLONG, offsetof(Desk, turn), 0, NULL},
    {"num_waiting", T_INT, offsetof(Desk, num_waiting), READONLY, NULL},
    {NULL},
};
static PyType_Slot desk_slots[] = {
    {Py_tp_init, desk_init},       {Py_tp_dealloc, desk_dealloc}, {Py_tp_traverse, desk_traverse},
    {Py_tp_clear, desk_clear}, {Py_tp_methods, desk_methods}, {Py_tp_members, desk_members}, {0, NULL},
};
static PyType_Spec desk_spec = {"desk.Desk", sizeof(Desk), 0, Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC, desk_slots};
static struct PyModuleDef definition = {PyModuleDef_HEAD_INIT, "desk", NULL, -1, NULL};

PyMODINIT_FUNC PyInit_desk(void)
{
    PyObject *module = PyModule_Create(&definition);
    PyObject *type = module == NULL ? NULL : PyType_FromSpec(&desk_spec);
    if (type == NULL || PyModule_AddObjectRef(module, "Desk", type) < 0)
        Py_CLEAR(module);
    Py_XDECREF(type);
    return module;
}
