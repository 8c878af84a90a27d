/* Decoding compressed clusters with libdeflate and libzstd, straight to where they are wanted. */
#include "engine.h"

#define LIBDEFLATE(f) \
    f(void *, libdeflate_alloc_decompressor, (void)) \
    f(void, libdeflate_free_decompressor, (void *)) \
    f(int, libdeflate_deflate_decompress, (void *, const void *, size_t, void *, size_t, size_t *))
LIBRARY(libdeflate, "libdeflate.so.0", LIBDEFLATE)

#define LIBZSTD(f) \
    f(void *, ZSTD_createDCtx, (void)) \
    f(size_t, ZSTD_freeDCtx, (void *)) \
    f(size_t, ZSTD_findFrameCompressedSize, (const void *, size_t)) \
    f(size_t, ZSTD_decompressDCtx, (void *, void *, size_t, const void *, size_t))
LIBRARY(libzstd, "libzstd.so.1", LIBZSTD)

static bool deflate(const uint8_t *stream, size_t length, uint8_t *to, size_t size) {
    void *made = libdeflate_alloc_decompressor();
    bool done = made && !libdeflate_deflate_decompress(made, stream, length, to, size, NULL);
    libdeflate_free_decompressor(made); /* NULL is nothing to it */
    return done;
}

/* Frames of a single segment, as QEMU makes them: their window is the cluster itself.  How large a
 * window others may have is for Python to say. */
static bool zstd(const uint8_t *stream, size_t length, uint8_t *to, size_t size) {
    static const uint8_t magic[4] = { 0x28, 0xb5, 0x2f, 0xfd }, single_segment = 1 << 5;
    static void *idle; /* a context, which takes 15 us to make */
    if (length < 5 || memcmp(stream, magic, 4) || !(stream[4] & single_segment))
        return false;
    size_t frame = ZSTD_findFrameCompressedSize(stream, length); /* errors are huge numbers */
    void *context = __atomic_exchange_n(&idle, NULL, __ATOMIC_ACQ_REL);
    bool done = frame <= length && (context || (context = ZSTD_createDCtx()))
        && ZSTD_decompressDCtx(context, to, size, stream, frame) == size;
    ZSTD_freeDCtx(__atomic_exchange_n(&idle, context, __ATOMIC_ACQ_REL));
    return done;
}

decoder *decoder_named(const char *name) {
    if (!strcmp(name, "deflate"))
        return libdeflate() ? deflate : NULL;
    return !strcmp(name, "zstd") && libzstd() ? zstd : NULL;
}
