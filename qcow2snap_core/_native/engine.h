/* What the files of the native engine share.  Start reading in reader.c. */
#pragma once
#define PY_SSIZE_T_CLEAN
#define Py_LIMITED_API 0x030b0000 /* Python 3.11: one file for it and all later ones */
#include <Python.h>
#include <dlfcn.h>
#include <stdbool.h>
#include <stdint.h>
#include <string.h>

enum { SECTOR = 512 };

/* cipher.c: for Python, and for a layer.  It is handed around in a capsule of this name. */
#define CIPHER "qcow2snap.cipher"
typedef struct cipher cipher;
PyObject *cipher_new(PyObject *module, PyObject *args);
PyObject *cipher_call(PyObject *module, PyObject *args);
/* Decrypt whole sectors in place, without the lock.  False: OpenSSL failed. */
bool cipher_decrypt(const cipher *self, uint8_t *data, uint64_t length, uint64_t sector);

/* decode.c: fill SIZE bytes with what the stream decodes to, no more and no less, without the
 * lock; what follows the stream is ignored.  False: leave it to Python. */
typedef bool decoder(const uint8_t *stream, size_t length, uint8_t *to, size_t size);
/* "deflate" or "zstd"; NULL where its library is not installed. */
decoder *decoder_named(const char *name);

/* One layer of a disk: a qcow2 file's tables, or a raw file.  The one below it is the next; the
 * last of them is of size 0.  The tuples that Python made keep alive what it points to. */
typedef struct {
    int fd; /* of what holds the clusters, or of the raw file */
    unsigned long long size, base; /* bytes; guest offset where it begins */
    /* The rest for a qcow2 file alone; the dictionaries are Python's caches. */
    PyObject *tables; /* {(token, index): slice as array('Q')}; NULL for a raw file */
    PyObject *decoded; /* {(token, guest offset): content of a compressed cluster} */
    PyObject *token;
    int cluster_bits, l2_bits, slice_bits;
    int extended, data_file, zero_flag, by_guest;
    const cipher *cipher; /* or NULL */
    decoder *decode; /* or NULL */
} layer;

/* lookup.c.  A range of the request and where its bytes are from.  Plain data: it is worked on
 * without the lock, while the caller keeps the layers alive. */
typedef struct {
    uint8_t *to;
    uint64_t length;
    const layer *from; /* NULL: zeros */
    uint64_t host;
    uint64_t sector; /* the first one's number, for the cipher */
    uint64_t stream; /* bytes of a compressed cluster's stream; 0 for other clusters */
} piece;

typedef struct {
    piece *pieces;
    size_t count, room, steps; /* steps: look-ups made so far, in all layers */
} plan;

/* Fill in from the tuple that Python made; false with an exception set. */
bool layer_init(layer *self, PyObject *description);
/* Add what fills LENGTH bytes at TO from guest OFFSET on; past the layer's end these are zeros.
 * False: hand the request back to Python. */
bool layer_plan(const layer *self, plan *p, uint64_t offset, uint8_t *to, uint64_t length);

/* Libraries are looked up when they are needed first: building this takes none of their files.
 * FUNCTIONS(f) is f(result, name, parameters) for each function; loaded(): are all there? */
#define DECLARE(result, name, parameters) static result (*name) parameters;
#define FIND(result, name, parameters) && (*(void **)&name = dlsym(library, #name))
#define LIBRARY(loaded, file, FUNCTIONS) \
    FUNCTIONS(DECLARE) \
    static bool loaded(void) { \
        static bool found; \
        void *library = found ? NULL : dlopen(file, RTLD_NOW | RTLD_LOCAL); \
        return found = found || (library FUNCTIONS(FIND)); \
    }
