/* What the files of the native engine share.  Start reading in reader.c. */
#pragma once
#define PY_SSIZE_T_CLEAN
#ifndef Py_GIL_DISABLED
#define Py_LIMITED_API 0x030b0000 /* Python 3.11: one file for it and all later ones */
#endif
#include <Python.h>
#include <stdbool.h>
#include <stdint.h>
#include <string.h>

enum { SECTOR = 512, FEW = 16 };

/* lookup.c.  A range of the request and where its bytes are from.  Plain data: it is worked on without the
 * lock, while the caller keeps alive what it points to. */
typedef struct {
    uint8_t *to;
    uint64_t length;
    int fd; /* -1: zeros */
    uint64_t host;
    PyObject *cipher; /* or NULL */
    uint64_t sector; /* the first one's number, for the cipher */
} piece;

typedef struct {
    piece *pieces; /* to be freed unless they are the few */
    size_t count, room;
    size_t steps; /* look-ups made so far, in all layers */
    piece few[FEW];
} plan;

/* One layer of a disk: a qcow2 file's tables, or a raw file.  The one below it is the next. */
typedef struct {
    int fd; /* of what holds the data clusters, or of the raw file */
    unsigned long long size, l1_size, base; /* bytes; entries; guest offset where it begins */
    bool lowest;
    /* The rest for a qcow2 file alone; the dictionaries are Python's caches. */
    PyObject *tables; /* {(token, index): slice as array('Q')}; NULL for a raw file */
    PyObject *decoded; /* {(token, guest offset): content of a compressed cluster} */
    PyObject *token;
    int cluster_bits, l2_bits, slice_bits;
    int extended, data_file, zero_flag, by_guest;
    PyObject *cipher; /* or NULL */
} layer;

/* Fill in from the tuple that Python made; false with an exception set. */
bool layer_init(layer *self, PyObject *description, bool lowest);
/* Add what fills LENGTH bytes at TO from guest OFFSET on.  False: hand it back to Python. */
bool layer_plan(const layer *self, plan *p, uint64_t offset, uint8_t *to, uint64_t length);

/* A new object of the type, all zeros; and the end of one, after what it holds was let go of. */
static inline void *object_new(PyTypeObject *type, Py_ssize_t items) {
    return ((allocfunc)PyType_GetSlot(type, Py_tp_alloc))(type, items);
}
static inline void object_free(void *self) {
    PyTypeObject *type = Py_TYPE((PyObject *)self);
    ((freefunc)PyType_GetSlot(type, Py_tp_free))(self);
    Py_DECREF(type);
}

/* cipher.c */
extern PyType_Spec cipher_spec;
extern PyTypeObject *cipher_type;
/* Decrypt whole sectors in place, without the lock.  False: OpenSSL failed. */
bool cipher_decrypt(PyObject *self, uint8_t *data, uint64_t length, uint64_t sector);

/* thread.c */
bool thread_can_be_kept(void);
void thread_keep(void);
