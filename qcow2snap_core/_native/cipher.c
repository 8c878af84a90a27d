/* Decrypting sectors of 512 bytes with OpenSSL, a whole request in one call.  The library is the
 * one that python3-cryptography and Python itself bring along. */
#include "engine.h"

#include <endian.h>

#define LIBCRYPTO(f) \
    f(void *, EVP_CIPHER_CTX_new, (void)) \
    f(void, EVP_CIPHER_CTX_free, (void *)) \
    f(int, EVP_CIPHER_CTX_copy, (void *, const void *)) \
    f(int, EVP_CIPHER_CTX_set_padding, (void *, int)) \
    f(int, EVP_CIPHER_CTX_get_key_length, (const void *)) \
    f(int, EVP_CipherInit_ex, (void *, const void *, void *, const void *, const void *, int)) \
    f(int, EVP_CipherUpdate, (void *, void *, int *, const void *, int)) \
    f(const void *, EVP_get_cipherbyname, (const char *))
LIBRARY(libcrypto, "libcrypto.so.3", LIBCRYPTO)

struct cipher {
    void *context; /* EVP_CIPHER_CTX with the key, to be copied */
    const cipher *essiv; /* of the IV, or NULL */
    uint64_t iv_mask; /* bits of the sector's number that go into the IV; 0: there is no IV */
    PyObject *owner; /* of the IV's cipher */
};

bool cipher_decrypt(const cipher *self, uint8_t *data, uint64_t length, uint64_t sector) {
    /* A context serves one thread at a time; a copy of 1 us spares a pool and its lock. */
    void *context = EVP_CIPHER_CTX_new(), *essiv = EVP_CIPHER_CTX_new();
    bool done = context && essiv && EVP_CIPHER_CTX_copy(context, self->context)
        && (!self->essiv || EVP_CIPHER_CTX_copy(essiv, self->essiv->context));
    for (const uint8_t *end = data + length; done && data < end; data += SECTOR, sector++) {
        uint64_t iv[2] = { htole64(sector & self->iv_mask) };
        int written;
        done = (!self->essiv || EVP_CipherUpdate(essiv, iv, &written, iv, sizeof iv))
            && (!self->iv_mask || EVP_CipherInit_ex(context, NULL, NULL, NULL, iv, -1))
            && EVP_CipherUpdate(context, data, &written, data, SECTOR) && written == SECTOR;
    }
    EVP_CIPHER_CTX_free(context); /* NULL is nothing to it */
    EVP_CIPHER_CTX_free(essiv);
    return done;
}

static void cipher_free(PyObject *capsule) {
    cipher *self = PyCapsule_GetPointer(capsule, CIPHER);
    EVP_CIPHER_CTX_free(self->context);
    Py_XDECREF(self->owner);
    PyMem_Free(self);
}

PyObject *cipher_new(PyObject *module, PyObject *args) {
    const char *name, *key;
    Py_ssize_t length;
    int encrypt;
    PyObject *essiv, *capsule;
    unsigned long long iv_mask;
    if (!PyArg_ParseTuple(args, "sy#pKO", &name, &key, &length, &encrypt, &iv_mask, &essiv))
        return NULL;
    if (!libcrypto())
        return PyErr_Format(PyExc_OSError, "libcrypto.so.3 cannot be loaded");
    cipher *self = PyMem_Calloc(1, sizeof *self);
    if (!self || !(capsule = PyCapsule_New(self, CIPHER, cipher_free))) {
        PyMem_Free(self);
        return PyErr_NoMemory();
    }
    self->iv_mask = iv_mask;
    self->owner = Py_NewRef(essiv);
    const void *algorithm = EVP_get_cipherbyname(name);
    if ((essiv == Py_None || (self->essiv = PyCapsule_GetPointer(essiv, CIPHER))) && algorithm
        && (self->context = EVP_CIPHER_CTX_new())
        && EVP_CipherInit_ex(self->context, algorithm, NULL, NULL, NULL, encrypt)
        && EVP_CIPHER_CTX_get_key_length(self->context) == length
        && EVP_CIPHER_CTX_set_padding(self->context, 0)
        && EVP_CipherInit_ex(self->context, NULL, NULL, key, NULL, encrypt))
        return capsule;
    Py_DECREF(capsule);
    return PyErr_Format(PyExc_ValueError, "OpenSSL has no %s of %zd bytes", name, length);
}

PyObject *cipher_call(PyObject *module, PyObject *args) {
    PyObject *capsule;
    Py_buffer view;
    unsigned long long sector;
    if (!PyArg_ParseTuple(args, "Ow*K", &capsule, &view, &sector))
        return NULL;
    const cipher *self = PyCapsule_GetPointer(capsule, CIPHER);
    bool done = self && view.len % SECTOR == 0;
    Py_BEGIN_ALLOW_THREADS
    done = done && cipher_decrypt(self, view.buf, (uint64_t)view.len, sector);
    Py_END_ALLOW_THREADS
    PyBuffer_Release(&view);
    return done ? Py_NewRef(Py_None) : PyErr_Format(PyExc_ValueError, "cannot decrypt that");
}
