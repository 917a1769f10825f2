/* A router's questions about a block that is all its node's: they leave before Python hears of the block.
 *
 * What Python would do for a DISPATCH is done here with what it has written down in advance: *orders*, who computes the
 * experts of a layer and how its rows are laid out, and a *spare*, numbers for the questions and memory for their
 * answers. Python then keeps what has left (`services.router.ahead`). Whatever is out of the ordinary is left to it.
 */
#include "fan_out.h"

#include <structmember.h>

#include "../../common/transport/forwarder.h"

#define MAX_QUESTIONS 64 /* about a block */

/* How a layer's blocks are divided: a tuple of these, and of the links that are for Python. */
typedef struct {
    unsigned int epoch, wire, width;
    Py_ssize_t row_nbytes, scale_nbytes, answer_nbytes;
    PyObject *workers; /* bytes int32 [num_experts] */
    PyObject *counts;  /* by worker: of the link to it, or None */
    PyObject *links;
} Order;

typedef struct {
    PyObject_HEAD
    Forwarder forwarder;
    PyObject *orders;    /* {layer: Order} */
    PyObject *abandoned; /* is called with what `take` would have given */
    /* The spare; `places` is NULL when it is used. */
    unsigned long long first;
    char *places;
    Py_ssize_t nbytes;
    PyObject *landings, *ends; /* Shared; a tuple of calls */
    /* What has left, until it is taken. */
    PyObject *order, *divided;
    int num;
    Forwarded questions[MAX_QUESTIONS];
} Ahead;

static Ahead *ahead_of(Forwarder *forwarder)
{
    return (Ahead *)((char *)forwarder - offsetof(Ahead, forwarder));
}

/* The order for a request, borrowed, and what it says; NULL: there is none. */
static PyObject *order_for(const Ahead *self, const MessageHeader *header, Order *order)
{
    PyObject *key = PyLong_FromUnsignedLong(header->layer);
    PyObject *found = key == NULL ? NULL : PyDict_GetItemWithError(self->orders, key);
    Py_XDECREF(key);
    if (found != NULL
        && PyArg_ParseTuple(found, "IIInnnO!O!O", &order->epoch, &order->wire, &order->width, &order->row_nbytes,
                            &order->scale_nbytes, &order->answer_nbytes, &PyBytes_Type, &order->workers, &PyTuple_Type,
                            &order->counts, &order->links)
        && order->epoch == header->epoch && order->wire == header->wire && order->width == header->width)
        return found;
    PyErr_Clear();
    return NULL;
}

/* Whether a DISPATCH is as long as it says; its rows may have room for more where they have scales. */
static int is_sound(const Question *request, const Order *order)
{
    const MessageHeader *header = request->header;
    uint64_t num_rows = header->num_rows, tail = 2 * aligned((Py_ssize_t)header->num_pairs * 4, SECTION);
    uint64_t rows = aligned(num_rows * order->row_nbytes, SECTION) + aligned(num_rows * order->scale_nbytes, SECTION);
    return request->tail_nbytes == tail && header->payload_nbytes == header->rows_nbytes + tail
           && header->rows_nbytes % SECTION == 0 && header->rows_nbytes >= rows
           && (header->rows_nbytes == rows || order->scale_nbytes != 0);
}

/* All pairs of a block divided by worker, as `services.router.plan` has it; NULL: Python will say why not. */
static PyObject *divided_by(const Order *order, const Question *request)
{
    const MessageHeader *header = request->header;
    Py_ssize_t section = aligned((Py_ssize_t)header->num_pairs * 4, SECTION);
    Py_buffer workers;
    if (PyObject_GetBuffer(order->workers, &workers, PyBUF_SIMPLE) < 0)
        return NULL;
    PyObject *divided = divide_block(
        (const int32_t *)request->tail, (const int32_t *)(request->tail + section), header->num_pairs,
        header->num_pairs / header->num_rows, &workers, order->row_nbytes, order->scale_nbytes, header->num_rows);
    PyBuffer_Release(&workers);
    return divided;
}

/* A question for each share; how many, 0 where one cannot be asked. */
static int write_questions(Ahead *self, const Order *order, const MessageHeader *request, PyObject *divided)
{
    PyObject *shares = PyTuple_GET_ITEM(divided, 3);
    Py_ssize_t num = PyList_GET_SIZE(shares);
    if (num > MAX_QUESTIONS || num > PyTuple_GET_SIZE(self->ends))
        return 0;
    for (Py_ssize_t i = 0; i < num; i++) {
        PyObject *share = PyTuple_GET_ITEM(PyList_GET_ITEM(shares, i), 0), *tail = PyTuple_GET_ITEM(share, 4);
        Py_ssize_t worker = PyLong_AsSsize_t(PyTuple_GET_ITEM(share, 0)), start = PyLong_AsSsize_t(PyTuple_GET_ITEM(share, 1));
        Py_ssize_t rows = PyLong_AsSsize_t(PyTuple_GET_ITEM(share, 2)) - start, tail_nbytes = PyBytes_GET_SIZE(tail);
        if (worker > UINT16_MAX || worker >= PyTuple_GET_SIZE(order->counts))
            return 0;
        self->questions[i] = (Forwarded){
            .to = PyTuple_GET_ITEM(order->counts, worker), .tail = PyBytes_AS_STRING(tail), .tail_nbytes = tail_nbytes,
            .landing = self->places + start * order->answer_nbytes, .landing_nbytes = rows * order->answer_nbytes,
            .ended = PyTuple_GET_ITEM(self->ends, i),
            .header = {
                .magic = MAGIC, .version = VERSION, .kind = EXPERT_PICK, .wire = request->wire, .layer = request->layer,
                .epoch = request->epoch, .width = request->width, .block = self->first + i, .trace = request->trace,
                .num_rows = rows, .num_pairs = PyLong_AsSsize_t(PyTuple_GET_ITEM(share, 3)), .target = worker,
                .attempt = request->attempt, .microbatch = request->microbatch,
                .payload_nbytes = request->rows_nbytes + tail_nbytes, .rows_nbytes = request->rows_nbytes}};
    }
    return num;
}

static int ask(Forwarder *forwarder, const Question *request, Forwarded **questions, PyObject **landings)
{
    Ahead *self = ahead_of(forwarder);
    const MessageHeader *header = request->header;
    Order order;
    if (self->places == NULL || header->magic != MAGIC || header->version != VERSION
        || header->kind != DISPATCH || header->landed != 0 || header->num_rows == 0 || header->num_pairs == 0
        || header->num_pairs % header->num_rows != 0)
        return 0;
    PyObject *found = order_for(self, header, &order);
    if (found == NULL || !is_sound(request, &order) || header->num_pairs > self->nbytes / order.answer_nbytes)
        return 0;
    PyObject *divided = divided_by(&order, request);
    int num = divided == NULL ? 0 : write_questions(self, &order, header, divided);
    PyErr_Clear();
    if (num == 0) {
        Py_XDECREF(divided);
        return 0;
    }
    self->order = Py_NewRef(found);
    self->divided = divided;
    self->num = num;
    self->places = NULL;
    *questions = self->questions;
    *landings = self->landings;
    return num;
}

/* (order, divided, numbers of the answers' places, 0: it has not left), which is told once. */
static PyObject *what_left(Ahead *self)
{
    PyObject *answers = PyList_New(self->num);
    for (int i = 0; answers != NULL && i < self->num; i++) {
        PyObject *number = PyLong_FromUnsignedLong(self->questions[i].answer);
        PyList_SET_ITEM(answers, i, number);
        if (number == NULL)
            Py_CLEAR(answers);
    }
    if (answers == NULL)
        return NULL;
    PyObject *left = Py_BuildValue("NNN", self->order, self->divided, answers);
    self->order = self->divided = NULL;
    return left;
}

static int told(Forwarder *forwarder)
{
    Ahead *self = ahead_of(forwarder);
    if (self->divided == NULL)
        return 0;
    PyObject *left = what_left(self);
    PyObject *done = left == NULL ? NULL : PyObject_CallOneArg(self->abandoned, left);
    Py_XDECREF(left);
    Py_XDECREF(done);
    return done == NULL ? -1 : 0;
}

/* take(): what has left about the block that Python is being told of, (order, divided, answers), or None */
static PyObject *ahead_take(Ahead *self, PyObject *Py_UNUSED(ignored))
{
    if (self->divided == NULL)
        Py_RETURN_NONE;
    return what_left(self);
}

/* provide(first, address, nbytes, landings, ends): the next spare, in the place of the last. */
static PyObject *ahead_provide(Ahead *self, PyObject *args)
{
    unsigned long long first, address;
    Py_ssize_t nbytes;
    PyObject *landings, *ends;
    if (!PyArg_ParseTuple(args, "KKnOO!", &first, &address, &nbytes, &landings, &PyTuple_Type, &ends))
        return NULL;
    self->first = first;
    self->places = (char *)(uintptr_t)address;
    self->nbytes = nbytes;
    Py_XSETREF(self->landings, Py_NewRef(landings));
    Py_XSETREF(self->ends, Py_NewRef(ends));
    Py_RETURN_NONE;
}

static int ahead_init(Ahead *self, PyObject *args, PyObject *kwargs)
{
    PyObject *orders, *abandoned;
    if (!PyArg_ParseTuple(args, "O!O", &PyDict_Type, &orders, &abandoned))
        return -1;
    self->forwarder = (Forwarder){.ask = ask, .told = told};
    Py_XSETREF(self->orders, Py_NewRef(orders));
    Py_XSETREF(self->abandoned, Py_NewRef(abandoned));
    return 0;
}

static int ahead_traverse(Ahead *self, visitproc visit, void *arg)
{
    Py_VISIT(Py_TYPE(self));
    Py_VISIT(self->orders);
    Py_VISIT(self->abandoned);
    Py_VISIT(self->ends);
    Py_VISIT(self->order);
    return 0;
}

static int ahead_clear(Ahead *self)
{
    self->places = NULL;
    Py_CLEAR(self->orders);
    Py_CLEAR(self->abandoned);
    Py_CLEAR(self->landings);
    Py_CLEAR(self->ends);
    Py_CLEAR(self->order);
    Py_CLEAR(self->divided);
    return 0;
}

static void ahead_dealloc(Ahead *self)
{
    PyTypeObject *type = Py_TYPE(self);
    PyObject_GC_UnTrack(self);
    ahead_clear(self);
    type->tp_free(self);
    Py_DECREF(type);
}

static void let_go(PyObject *capsule)
{
    Py_DECREF((PyObject *)PyCapsule_GetContext(capsule));
}

/* capsule(): for `RowsPort.forward_with` */
static PyObject *ahead_capsule(Ahead *self, PyObject *Py_UNUSED(ignored))
{
    PyObject *capsule = PyCapsule_New(&self->forwarder, FORWARDER, let_go);
    if (capsule != NULL)
        PyCapsule_SetContext(capsule, Py_NewRef(self));
    return capsule;
}

static PyMethodDef ahead_methods[] = {
    {"take", (PyCFunction)ahead_take, METH_NOARGS, NULL},
    {"provide", (PyCFunction)ahead_provide, METH_VARARGS, NULL},
    {"capsule", (PyCFunction)ahead_capsule, METH_NOARGS, NULL},
    {NULL, NULL, 0, NULL},
};
static PyType_Slot ahead_slots[] = {
    {Py_tp_init, ahead_init},       {Py_tp_dealloc, ahead_dealloc},   {Py_tp_traverse, ahead_traverse},
    {Py_tp_clear, ahead_clear}, {Py_tp_methods, ahead_methods}, {0, NULL},
};
static PyType_Spec ahead_spec = {"ahead.Ahead", sizeof(Ahead), 0, Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC, ahead_slots};
static struct PyModuleDef definition = {PyModuleDef_HEAD_INIT, "ahead", NULL, -1, NULL};

PyMODINIT_FUNC PyInit_ahead(void)
{
    PyObject *module = PyModule_Create(&definition);
    PyObject *type = module == NULL ? NULL : PyType_FromSpec(&ahead_spec);
    if (type == NULL || PyModule_AddObjectRef(module, "Ahead", type) < 0)
        Py_CLEAR(module);
    Py_XDECREF(type);
    return module;
}
