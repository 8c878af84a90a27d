/* One request: where its bytes are, the reads, and last whether the snapshot is still there.
 *
 * The plan is made under the interpreter's lock, since it looks into Python's tables; then the lock
 * is let go of once, for all that waits or takes time.  The order is the one that docs/live.md
 * proves: tables, data, comparison.  Whatever is not the common case is handed back, and Python
 * does the whole request again; the buffer holds nothing of use until then. */
#include "engine.h"

#include <stdlib.h>
#include <unistd.h>

enum { FEW = 8, MOST_CONTENT = 17 << 10, MOST_LAYERS = 256 };

/* What the file holds while the snapshot is there (TableFingerprint): header, table, header again,
 * to be compared in this order after the data was read.  No length: nothing to compare. */
typedef struct {
    struct part {
        const char *content;
        Py_ssize_t length;
        unsigned long long offset;
    } parts[3];
    PyObject *owner; /* of the contents; NULL: ask Python */
} proof;

typedef struct {
    PyObject_VAR_HEAD
    int fd; /* of the file that has the snapshot table */
    proof expected;
    PyObject *owner; /* of what the layers point to */
    layer layers[]; /* and an empty one */
} reader;

/* Kept for ever, and for one interpreter: see slots. */
static PyTypeObject *reader_type;
static PyObject *reader_name;

/* All of LENGTH bytes, or false: an error, or the file ends before. */
static bool read_all(int fd, uint8_t *to, uint64_t length, uint64_t offset) {
    for (ssize_t n; length; to += n, offset += (uint64_t)n, length -= (uint64_t)n)
        if (offset > INT64_MAX - length || (n = pread(fd, to, length, (off_t)offset)) <= 0)
            return false;
    return true;
}

static bool carry_out(const piece *each) {
    const layer *from = each->from;
    uint8_t *stream = NULL;
    bool done = true;
    if (!from)
        memset(each->to, 0, each->length);
    else if (!each->stream)
        done = read_all(from->fd, each->to, each->length, each->host) && (!from->cipher
            || cipher_decrypt(from->cipher, each->to, each->length, each->sector));
    else
        done = (stream = malloc(each->stream))
            && read_all(from->fd, stream, each->stream, each->host)
            && from->decode(stream, each->stream, each->to, each->length);
    free(stream);
    return done;
}

static bool holds(int fd, const struct part *expected) {
    uint8_t found[MOST_CONTENT];
    size_t length = (size_t)expected->length;
    return length <= MOST_CONTENT && read_all(fd, found, length, expected->offset)
        && (!length || !memcmp(found, expected->content, length));
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
    plan p = { .room = length / SECTOR + FEW }; /* a piece is a sector or more, but at the ends */
    p.pieces = PyMem_Malloc(p.room * sizeof *p.pieces);
    bool done = p.pieces && expected.owner && offset <= size && length <= size - offset
        && layer_plan(self->layers, &p, offset, view.buf, length);
    if (done) {
        Py_INCREF(expected.owner);
        Py_BEGIN_ALLOW_THREADS
        for (size_t i = 0; done && i < p.count; i++)
            done = carry_out(&p.pieces[i]);
        for (int i = 0; done && i < 3; i++)
            done = holds(self->fd, &expected.parts[i]);
        Py_END_ALLOW_THREADS
        Py_DECREF(expected.owner);
    }
    PyMem_Free(p.pieces);
    PyBuffer_Release(&view);
    return done;
}

static PyObject *reader_read(const reader *self, PyObject *const *args, Py_ssize_t count) {
    return PyBool_FromLong(count == 2 && fill(self, args[0], args[1]));
}

/* Three pieces ((content, offset), …), none, or None: then Python is asked. */
static PyObject *reader_expect(reader *self, PyObject *pieces) {
    proof next = { .owner = NULL };
    struct part *p = next.parts;
    if (pieces != Py_None) {
        if (!PyArg_ParseTuple(pieces, "|(y#K)(y#K)(y#K)", &p->content, &p->length, &p->offset,
                &p[1].content, &p[1].length, &p[1].offset, &p[2].content, &p[2].length,
                &p[2].offset))
            return NULL;
        next.owner = Py_NewRef(pieces);
    }
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
    reader *self = (reader *)PyType_GenericAlloc(type, count + 1);
    if (!self)
        return NULL;
    self->fd = fd;
    self->owner = Py_NewRef(layers);
    for (Py_ssize_t i = 0; self && i < count; i++)
        if (!layer_init(&self->layers[i], PyTuple_GetItem(layers, i)))
            Py_CLEAR(self);
    return (PyObject *)self;
}

static void reader_free(reader *self) {
    Py_XDECREF(self->owner);
    Py_XDECREF(self->expected.owner);
    PyTypeObject *type = Py_TYPE((PyObject *)self);
    PyObject_Free(self);
    Py_DECREF(type);
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

/* glibc's, for what C++ calls thread_local; musl has none. */
int __cxa_thread_atexit_impl(void (*)(void *), void *, void *) __attribute__((weak));

static void release_thread(void *unused) {
    if (!Py_IsInitialized())
        return; /* the interpreter has ended before the thread did */
    PyGILState_STATE state = PyGILState_Ensure();
    PyGILState_Release(PyGILState_LOCKED); /* the one that was kept */
    PyGILState_Release(state);
}

/* nbdkit puts each callback between PyGILState_Ensure and PyGILState_Release, which make a state
 * for its thread and throw it away.  One more Ensure keeps it.  The same thread has to release it:
 * at its end, in a destructor of the C library's, while Python's thread key is still there. */
static void keep_thread(void) {
    static __thread bool kept;
    if (!kept && __cxa_thread_atexit_impl
        && !__cxa_thread_atexit_impl(release_thread, NULL, &reader_type))
        PyGILState_Ensure();
    kept = true;
}

/* nbdkit's pread(h, buf, offset, flags), where h.reader may be a Reader; SLOW is the Python one. */
static PyObject *callback(PyObject *slow, PyObject *const *args, Py_ssize_t count) {
    keep_thread();
    PyObject *self = count == 4 ? PyObject_GetAttr(args[0], reader_name) : NULL;
    if (!self)
        return count == 4 ? NULL : PyErr_Format(PyExc_TypeError, "pread takes 4 arguments");
    bool done = Py_TYPE(self) == reader_type && fill((reader *)self, args[1], args[2]);
    Py_DECREF(self);
    if (done)
        Py_RETURN_NONE;
    PyObject *answer = PyObject_CallFunctionObjArgs(slow, args[0], args[1], args[2], args[3], NULL);
    if (!answer && PyErr_ExceptionMatches(PyExc_MemoryError))
        /* A thread may be too short of memory to run any Python: nbdkit then logs this text. */
        PyErr_SetString(PyExc_MemoryError, "out of memory");
    return answer;
}

static PyObject *make_callback(PyObject *module, PyObject *slow) {
    static PyMethodDef pread_method
        = { "pread", (PyCFunction)(void (*)(void))callback, METH_FASTCALL, NULL };
    return PyCFunction_New(&pread_method, slow);
}

static PyMethodDef functions[] = {
    { "callback", make_callback, METH_O, "nbdkit's pread; it falls back on the given one." },
    { "cipher", cipher_new, METH_VARARGS,
        "cipher(name, key, encrypt, mask, cipher of the IV or None), names as OpenSSL's." },
    { "decrypt", cipher_call, METH_VARARGS, "decrypt(cipher, buffer, sector): in place." },
    { NULL },
};

static int complete(PyObject *module) {
    bool there = (reader_name || (reader_name = PyUnicode_InternFromString("reader")))
        && (reader_type || (reader_type = (PyTypeObject *)PyType_FromSpec(&reader_spec)));
    return !there || PyModule_AddType(module, reader_type)
            || PyModule_AddIntConstant(module, "KEEPS_THREADS", __cxa_thread_atexit_impl != NULL)
        ? -1
        : 0;
}

/* What Python may do with it: no second interpreter, since the type and PyGILState are the first
 * one's; and no threads without the lock, which is what keeps Python's caches still while a plan is
 * made.  Pythons refuse a slot that they do not know, so each is added where it is known; the numbers
 * are those of Py_mod_multiple_interpreters and Py_mod_gil, which headers of 3.11 lack. */
enum { MULTIPLE_INTERPRETERS = 3, GIL = 4 };
static PyModuleDef_Slot slots[4] = { { Py_mod_exec, complete } };

static PyModuleDef definition = { PyModuleDef_HEAD_INIT, "qcow2snap_core._native.engine",
    "The common case of a request.", .m_methods = functions, .m_slots = slots };

PyMODINIT_FUNC PyInit_engine(void) {
    if (Py_Version >= 0x030c0000)
        slots[1] = (PyModuleDef_Slot) { MULTIPLE_INTERPRETERS, NULL }; /* NOT_SUPPORTED */
    if (Py_Version >= 0x030d0000)
        slots[2] = (PyModuleDef_Slot) { GIL, NULL }; /* USED */
    return PyModuleDef_Init(&definition);
}
