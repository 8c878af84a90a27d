/* One request: where its bytes are, the reads, and last whether the snapshot is still there.
 *
 * The plan is made under the interpreter's lock, since it looks into Python's tables; then the lock
 * is let go of once, for all that waits or takes time.  The order is the one that docs/live.md
 * proves: tables, data, comparison.  Whatever is not the common case is handed back, and Python
 * does the whole request again; the buffer holds nothing of use until then. */
#include "engine.h"

#include <unistd.h>

enum { MOST_CONTENT = 17 << 10, MOST_LAYERS = 256 };

/* What the file says while the snapshot is there (snapshots.Proof): the header's bytes, the table's
 * and the header's again, to be read in this order after the data was. */
typedef struct {
    int count;
    struct part {
        const char *content;
        Py_ssize_t length;
        unsigned long long offset;
    } parts[3];
    PyObject *owner; /* of the contents; NULL: there is nothing to compare with, ask Python */
} proof;

typedef struct {
    PyObject_VAR_HEAD
    int fd; /* of the file that has the snapshot table */
    proof expected;
    layer layers[];
} reader;

static PyTypeObject *reader_type;

/* All of LENGTH bytes, or false: an error, or the file ends before. */
static bool read_all(int fd, uint8_t *to, uint64_t length, uint64_t offset) {
    for (ssize_t n; length; to += n, offset += (uint64_t)n, length -= (uint64_t)n)
        if (offset > INT64_MAX - length || (n = pread(fd, to, length, (off_t)offset)) <= 0)
            return false;
    return true;
}

static bool carry_out(const plan *p) {
    for (size_t i = 0; i < p->count; i++) {
        const piece *each = &p->pieces[i];
        if (each->fd < 0)
            memset(each->to, 0, each->length);
        else if (!read_all(each->fd, each->to, each->length, each->host))
            return false;
        else if (each->cipher
            && !cipher_decrypt(each->cipher, each->to, each->length, each->sector))
            return false;
    }
    return true;
}

static bool holds(int fd, const proof *expected) {
    uint8_t found[MOST_CONTENT];
    for (int i = 0; i < expected->count; i++) {
        const struct part *each = &expected->parts[i];
        if (!read_all(fd, found, (uint64_t)each->length, each->offset)
            || memcmp(found, each->content, (size_t)each->length))
            return false;
    }
    return true;
}

/* Whether the buffer was filled; leaves no exception behind. */
static bool fill(const reader *self, PyObject *target, PyObject *number) {
    uint64_t offset = PyLong_AsUnsignedLongLong(number);
    Py_buffer view;
    if (PyErr_Occurred() || PyObject_GetBuffer(target, &view, PyBUF_WRITABLE)) {
        PyErr_Clear();
        return false;
    }
    uint64_t length = (uint64_t)view.len, size = self->layers->size;
    proof expected = self->expected; /* others may replace it meanwhile */
    plan p = { .pieces = p.few, .room = FEW };
    bool done = expected.owner && offset <= size && length <= size - offset
        && layer_plan(self->layers, &p, offset, view.buf, length);
    if (done) {
        Py_INCREF(expected.owner);
        Py_BEGIN_ALLOW_THREADS
        done = carry_out(&p) && holds(self->fd, &expected);
        Py_END_ALLOW_THREADS
        Py_DECREF(expected.owner);
    }
    if (p.pieces != p.few)
        PyMem_Free(p.pieces);
    PyBuffer_Release(&view);
    return done;
}

static PyObject *reader_read(const reader *self, PyObject *const *args, Py_ssize_t count) {
    return PyBool_FromLong(count == 2 && fill(self, args[0], args[1]));
}

/* nbdkit's pread(h, buf, offset, flags), where h.reader may be a Reader; SLOW is the Python one. */
static PyObject *callback(PyObject *slow, PyObject *const *args, Py_ssize_t count) {
    static PyObject *name;
    thread_keep();
    if (!name && !(name = PyUnicode_InternFromString("reader")))
        return NULL;
    PyObject *self = count == 4 ? PyObject_GetAttr(args[0], name) : NULL;
    if (!self)
        return count == 4 ? NULL : PyErr_Format(PyExc_TypeError, "pread takes 4 arguments");
    bool done = Py_TYPE(self) == reader_type && fill((reader *)self, args[1], args[2]);
    Py_DECREF(self);
    if (done)
        Py_RETURN_NONE;
    return PyObject_CallFunctionObjArgs(slow, args[0], args[1], args[2], args[3], NULL);
}

static PyObject *make_callback(PyObject *module, PyObject *slow) {
    static PyMethodDef pread_method
        = { "pread", (PyCFunction)(void (*)(void))callback, METH_FASTCALL, NULL };
    return PyCFunction_New(&pread_method, slow);
}

/* Three pieces ((content, offset), …), none, or None: then Python is asked. */
static PyObject *reader_expect(reader *self, PyObject *pieces) {
    proof next = { .count = 0 };
    if (PyTuple_Check(pieces)) {
        next.owner = pieces;
        next.count = (int)PyTuple_Size(pieces);
        struct part *p = next.parts;
        if (next.count
            && !PyArg_ParseTuple(pieces, "(y#K)(y#K)(y#K)", &p[0].content, &p[0].length,
                &p[0].offset, &p[1].content, &p[1].length, &p[1].offset, &p[2].content,
                &p[2].length, &p[2].offset))
            return NULL;
        if (p[0].length > MOST_CONTENT || p[1].length > MOST_CONTENT || p[2].length > MOST_CONTENT)
            next.owner = NULL;
    }
    Py_XINCREF(next.owner);
    Py_XDECREF(self->expected.owner); /* of tuples and bytes: nothing else runs meanwhile */
    self->expected = next;
    Py_RETURN_NONE;
}

/* Reader(fd, layers from the top down) */
static PyObject *reader_new(PyTypeObject *type, PyObject *args, PyObject *keywords) {
    PyObject *layers;
    int fd;
    if (!PyArg_ParseTuple(args, "iO!", &fd, &PyTuple_Type, &layers))
        return NULL;
    Py_ssize_t count = PyTuple_Size(layers);
    if (count < 1 || count > MOST_LAYERS)
        return PyErr_Format(PyExc_ValueError, "a disk has one layer, or some");
    reader *self = object_new(type, count);
    if (!self)
        return NULL;
    self->fd = fd;
    for (Py_ssize_t i = 0; i < count; i++)
        if (!layer_init(&self->layers[i], PyTuple_GetItem(layers, i), i == count - 1)) {
            Py_DECREF(self);
            return NULL;
        }
    return (PyObject *)self;
}

static void reader_free(reader *self) {
    for (layer *each = self->layers; each < self->layers + Py_SIZE((PyObject *)self); each++) {
        Py_XDECREF(each->tables);
        Py_XDECREF(each->decoded);
        Py_XDECREF(each->token);
        Py_XDECREF(each->cipher);
    }
    Py_XDECREF(self->expected.owner);
    object_free(self);
}

static PyMethodDef reader_methods[] = {
    { "read", (PyCFunction)(void (*)(void))reader_read, METH_FASTCALL,
        "read(buffer, offset): fill the buffer, or return False and leave it to Python." },
    { "expect", (PyCFunction)reader_expect, METH_O,
        "expect(pieces): what the file has to hold after each read; None leaves all to Python." },
    { NULL },
};

static PyType_Slot reader_slots[] = { { Py_tp_doc, "Reads a disk." }, { Py_tp_new, reader_new },
    { Py_tp_dealloc, reader_free }, { Py_tp_methods, reader_methods }, { 0, NULL } };

static PyType_Spec reader_spec = { "qcow2snap_core._native.engine.Reader", sizeof(reader),
    sizeof(layer), Py_TPFLAGS_DEFAULT, reader_slots };

/* --- The module --- */

static PyMethodDef functions[]
    = { { "callback", make_callback, METH_O, "nbdkit's pread; it falls back on the given one." },
          { NULL } };

static int fill_module(PyObject *module) {
    /* Kept for ever: nbdkit's process has one interpreter. */
    reader_type = (PyTypeObject *)PyType_FromModuleAndSpec(module, &reader_spec, NULL);
    cipher_type = (PyTypeObject *)PyType_FromModuleAndSpec(module, &cipher_spec, NULL);
    if (!reader_type || !cipher_type || PyModule_AddType(module, reader_type)
        || PyModule_AddType(module, cipher_type))
        return -1;
    return PyModule_AddIntConstant(module, "KEEPS_THREADS", thread_can_be_kept());
}

static PyModuleDef_Slot slots[] = {
    { Py_mod_exec, fill_module },
#ifdef Py_mod_gil
    { Py_mod_gil, Py_MOD_GIL_USED }, /* it looks into dictionaries that others change */
#endif
    { 0, NULL },
};

static PyModuleDef definition = { PyModuleDef_HEAD_INIT, .m_name = "qcow2snap_core._native.engine",
    .m_doc = "The common case of a request.", .m_methods = functions, .m_slots = slots };

PyMODINIT_FUNC PyInit_engine(void) { return PyModuleDef_Init(&definition); }
