/* Decrypting sectors of 512 bytes with OpenSSL, a whole request in one call.
 *
 * OpenSSL is looked up when the first cipher is made: building this needs none of its files, and
 * the library is the one that python3-cryptography and Python itself bring along. */
#include "engine.h"

#include <dlfcn.h>

enum { BLOCK = 16 };

/* Result, name and parameters of each function that is used. */
#define EVP(f) \
    f(void *, EVP_CIPHER_CTX_new, (void)) \
    f(void, EVP_CIPHER_CTX_free, (void *)) \
    f(int, EVP_CIPHER_CTX_copy, (void *, const void *)) \
    f(int, EVP_CIPHER_CTX_set_padding, (void *, int)) \
    f(int, EVP_CIPHER_CTX_get_key_length, (const void *)) \
    f(int, EVP_CipherInit_ex, (void *, const void *, void *, const uint8_t *, const uint8_t *, int)) \
    f(int, EVP_CipherUpdate, (void *, uint8_t *, int *, const uint8_t *, int)) \
    f(const void *, EVP_get_cipherbyname, (const char *))
#define DECLARE(result, name, parameters) static result (*name) parameters;
EVP(DECLARE)

static bool load_openssl(void) {
    static bool loaded;
    void *library = loaded ? NULL : dlopen("libcrypto.so.3", RTLD_NOW | RTLD_LOCAL);
#define FIND(result, name, parameters) && (*(void **)&name = dlsym(library, #name))
    loaded = loaded || (library EVP(FIND));
    return loaded;
}

typedef struct {
    PyObject_HEAD
    void *data; /* EVP_CIPHER_CTX with the key, to be copied */
    void *essiv; /* the same for the IV, or NULL */
    uint64_t iv_mask; /* bits of the sector's number that go into the IV; 0: there is no IV */
} cipher;

PyTypeObject *cipher_type;

static bool decrypt(const cipher *self, void *data, void *essiv, uint8_t *at, uint64_t sectors,
    uint64_t sector) {
    for (; sectors; sectors--, sector++, at += SECTOR) {
        uint8_t iv[BLOCK] = { 0 };
        int written;
        for (int i = 0; i < 8; i++) /* little-endian */
            iv[i] = (uint8_t)((sector & self->iv_mask) >> 8 * i);
        if (essiv && !EVP_CipherUpdate(essiv, iv, &written, iv, BLOCK))
            return false;
        if ((self->iv_mask && !EVP_CipherInit_ex(data, NULL, NULL, NULL, iv, -1))
            || !EVP_CipherUpdate(data, at, &written, at, SECTOR) || written != SECTOR)
            return false;
    }
    return true;
}

bool cipher_decrypt(PyObject *object, uint8_t *data, uint64_t length, uint64_t sector) {
    const cipher *self = (cipher *)object;
    /* A context serves one thread at a time; a copy of 1 us spares a pool and its lock. */
    void *contexts[2] = { EVP_CIPHER_CTX_new(), self->essiv ? EVP_CIPHER_CTX_new() : NULL };
    bool done = contexts[0] && EVP_CIPHER_CTX_copy(contexts[0], self->data)
        && (!self->essiv || (contexts[1] && EVP_CIPHER_CTX_copy(contexts[1], self->essiv)))
        && decrypt(self, contexts[0], contexts[1], data, length / SECTOR, sector);
    EVP_CIPHER_CTX_free(contexts[0]);
    EVP_CIPHER_CTX_free(contexts[1]);
    return done;
}

/* A context with its key; sets ValueError where OpenSSL has no such cipher. */
static void *context(const char *name, const char *key, Py_ssize_t length, bool encrypt) {
    const void *algorithm = EVP_get_cipherbyname(name);
    void *made = algorithm ? EVP_CIPHER_CTX_new() : NULL;
    if (made && EVP_CipherInit_ex(made, algorithm, NULL, NULL, NULL, encrypt)
        && EVP_CIPHER_CTX_get_key_length(made) == length
        && EVP_CIPHER_CTX_set_padding(made, 0)
        && EVP_CipherInit_ex(made, NULL, NULL, (const uint8_t *)key, NULL, encrypt))
        return made;
    EVP_CIPHER_CTX_free(made);
    return PyErr_Format(PyExc_ValueError, "OpenSSL has no %s of %zd bytes", name, length);
}

/* Cipher(name, key, iv_bits, essiv's name or None, essiv's key or None), names as OpenSSL's */
static PyObject *cipher_new(PyTypeObject *type, PyObject *args, PyObject *keywords) {
    const char *name, *key, *essiv = NULL, *essiv_key = NULL;
    Py_ssize_t length, essiv_length = 0;
    int iv_bits;
    if (!PyArg_ParseTuple(args, "sy#izz#", &name, &key, &length, &iv_bits, &essiv, &essiv_key,
            &essiv_length))
        return NULL;
    if (!load_openssl())
        return PyErr_Format(PyExc_OSError, "libcrypto.so.3 cannot be loaded");
    cipher *self = object_new(type, 0);
    if (!self)
        return NULL;
    self->iv_mask = iv_bits >= 64 ? UINT64_MAX : iv_bits > 0 ? (1ULL << iv_bits) - 1 : 0;
    if (!(self->data = context(name, key, length, false))
        || (essiv && !(self->essiv = context(essiv, essiv_key, essiv_length, true)))) {
        Py_DECREF(self);
        return NULL;
    }
    return (PyObject *)self;
}

static void cipher_free(cipher *self) {
    EVP_CIPHER_CTX_free(self->data); /* NULL is nothing to it */
    EVP_CIPHER_CTX_free(self->essiv);
    object_free(self);
}

/* decrypt(view, sector): for the rest of the program. */
static PyObject *cipher_call(PyObject *self, PyObject *args) {
    PyObject *target;
    Py_buffer view;
    unsigned long long sector;
    bool done;
    if (!PyArg_ParseTuple(args, "OK", &target, &sector)
        || PyObject_GetBuffer(target, &view, PyBUF_WRITABLE))
        return NULL;
    Py_BEGIN_ALLOW_THREADS
    done = view.len % SECTOR == 0 && cipher_decrypt(self, view.buf, (uint64_t)view.len, sector);
    Py_END_ALLOW_THREADS
    PyBuffer_Release(&view);
    return done ? Py_NewRef(Py_None) : PyErr_Format(PyExc_ValueError, "cannot decrypt that");
}

static PyMethodDef cipher_methods[]
    = { { "decrypt", cipher_call, METH_VARARGS, "Decrypt whole sectors in place." }, { NULL } };

static PyType_Slot cipher_slots[] = { { Py_tp_doc, "Decrypts sectors of 512 bytes." },
    { Py_tp_new, cipher_new }, { Py_tp_dealloc, cipher_free }, { Py_tp_methods, cipher_methods },
    { 0, NULL } };

PyType_Spec cipher_spec = { "qcow2snap_core._native.engine.Cipher", sizeof(cipher), 0,
    Py_TPFLAGS_DEFAULT, cipher_slots };
