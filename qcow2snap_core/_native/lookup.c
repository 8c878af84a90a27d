/* From guest offsets to pieces of files, through the table slices that Python has loaded.
 *
 * This mirrors Mapping.run and SubclusterMapping.run for the entries that a sound image has.
 * Whatever else it meets, a slice that is not in the cache, a compressed cluster that is not
 * decoded yet, a reserved bit, an unaligned offset, it hands back: Python looks again, loads,
 * judges and words the error.  Nothing here reads a file, and nothing is kept after the look-up. */
#include "engine.h"

static const uint64_t COPIED = 1ULL << 63, OFFSET_MASK = 0x00fffffffffffe00ULL, ZERO_FLAG = 1;
static const size_t MOST_STEPS = 1 << 16; /* all under the lock: less than a millisecond */
static const uint64_t STREAM_BYTES_A_STEP = 128; /* the slowest ones: a third of a second in all */
enum { COMPRESSED_BIT = 62, L1_SLICE = (64 << 10) / 8 /* entries */ };

/* Neighbours that continue each other in one file become one piece, and one read; what is next to
 * each other in the request is so in each layer, and so are the numbers of its sectors. */
static bool add(plan *p, piece next) {
    piece *last = p->count ? &p->pieces[p->count - 1] : NULL;
    if (last && last->to + last->length == next.to && last->from == next.from
        && (!next.from || last->host + last->length == next.host)
        && !last->stream && !next.stream) {
        last->length += next.length;
        return true;
    }
    if (p->count == p->room)
        return false;
    p->pieces[p->count++] = next;
    return true;
}

/* What one of Python's caches holds, as a view to be released; false where it has nothing. */
static bool get(PyObject *cache, PyObject *token, int64_t index, Py_buffer *view) {
    PyObject *number = PyLong_FromLongLong(index);
    PyObject *key = number ? PyTuple_Pack(2, token, number) : NULL;
    PyObject *value = key ? PyDict_GetItemWithError(cache, key) : NULL;
    bool found = value && PyObject_GetBuffer(value, view, PyBUF_SIMPLE) == 0;
    Py_XDECREF(key);
    Py_XDECREF(number);
    PyErr_Clear();
    return found;
}

/* How many bytes from AT on have no L2 table, up to where the next one begins; 0: ask Python. */
static uint64_t without_l2_table(const layer *self, uint64_t at) {
    int shift = self->cluster_bits + self->l2_bits;
    uint64_t index = at >> shift, slot = index % L1_SLICE;
    Py_buffer view;
    if (!get(self->tables, self->token, ~(int64_t)(index - slot), &view))
        return 0;
    bool none = slot < (uint64_t)view.len / 8 && !(((uint64_t *)view.buf)[slot] & ~COPIED);
    PyBuffer_Release(&view);
    return none ? ((index + 1) << shift) - at : 0;
}

/* From Python's cache, or to be decoded if all of it is wanted: then nobody needs it there. */
static bool add_compressed(
    const layer *self, plan *p, uint64_t guest, uint64_t entry, uint8_t *to, uint64_t length) {
    uint64_t size = 1ULL << self->cluster_bits, within = guest & (size - 1);
    Py_buffer view;
    if (get(self->decoded, self->token, (int64_t)(guest - within), &view)) {
        bool whole = (uint64_t)view.len == size;
        if (whole)
            memcpy(to, (uint8_t *)view.buf + within, length);
        PyBuffer_Release(&view);
        return whole;
    }
    int offset_bits = COMPRESSED_BIT - (self->cluster_bits - 8);
    uint64_t host = entry & ((1ULL << offset_bits) - 1);
    uint64_t sectors = (entry >> offset_bits & ((size >> 8) - 1)) + 1;
    piece next = { .to = to, .length = length, .from = self, .host = host,
        .stream = sectors * SECTOR - host % SECTOR };
    p->steps += next.stream / STREAM_BYTES_A_STEP;
    return self->decode && length == size && host >= size && add(p, next);
}

/* What the L2 entry says of guest offset AT, and for how much of *LENGTH it says the same. */
static bool plan_cluster(const layer *self, plan *p, const uint64_t *entry, uint64_t at,
    uint8_t *to, uint64_t *length) {
    uint64_t size = 1ULL << self->cluster_bits, within = at & (size - 1);
    uint64_t host = *entry & OFFSET_MASK, flags = (*entry ^ host) & ~COPIED;
    bool copied = *entry & COPIED; /* kept for a data file alone, whose offset 0 may be in use */
    if (*length > size - within)
        *length = size - within;
    if (flags >> COMPRESSED_BIT)
        return !self->data_file && add_compressed(self, p, at, *entry, to, *length);
    /* A bit for each subcluster; those of a standard cluster are all alike. */
    bool zeros = !self->extended && self->zero_flag && flags == ZERO_FLAG;
    uint32_t alloc = self->extended ? (uint32_t)entry[1] : !flags && (host || copied) ? ~0U : 0;
    uint32_t zero = self->extended ? (uint32_t)(entry[1] >> 32) : zeros ? ~0U : 0;
    if ((flags && !zeros) || host & (size - 1) || (copied && !self->data_file) || alloc & zero
        || (alloc && !host && !copied))
        return false;
    int bits = self->cluster_bits - 5, first = (int)(within >> bits);
    bool is_data = alloc >> first & 1, is_zero = zero >> first & 1;
    uint32_t others = ((is_data ? ~alloc : alloc) | (is_zero ? ~zero : zero)) >> first;
    uint64_t end = (uint64_t)(others ? first + __builtin_ctz(others) : 32) << bits;
    if (*length > end - within)
        *length = end - within;
    if (is_zero)
        return add(p, (piece){ .to = to, .length = *length });
    if (!is_data)
        return layer_plan(self + 1, p, at - self->base, to, *length);
    host += within;
    return !(self->cipher && (host | *length) % SECTOR)
        && add(p, (piece){ .to = to, .length = *length, .from = self, .host = host,
            .sector = (self->by_guest ? at : host) / SECTOR });
}

bool layer_plan(const layer *self, plan *p, uint64_t offset, uint8_t *to, uint64_t length) {
    uint64_t have = offset < self->size ? self->size - offset : 0;
    uint64_t past_end = length > have ? length - have : 0;
    if (past_end && !add(p, (piece){ .to = to + have, .length = past_end }))
        return false;
    length -= past_end;
    if (length && !self->tables)
        return add(p, (piece){ .to = to, .length = length, .from = self, .host = offset });
    int shift = self->cluster_bits + self->slice_bits; /* of the guest bytes behind a slice */
    uint64_t mask = (1ULL << self->slice_bits) - 1;
    bool done = true;
    for (uint64_t n, at = self->base + offset, end = at + length; done && at < end;) {
        uint64_t slice = at >> shift;
        Py_buffer view;
        if (get(self->tables, self->token, (int64_t)slice, &view)) {
            for (; done && at < end && at >> shift == slice; at += n, to += n) {
                uint64_t slot = (at >> self->cluster_bits & mask) << self->extended;
                n = end - at;
                done = (slot + (uint64_t)self->extended) * 8 + 8 <= (uint64_t)view.len
                    && ++p->steps <= MOST_STEPS
                    && plan_cluster(self, p, (uint64_t *)view.buf + slot, at, to, &n);
            }
            PyBuffer_Release(&view);
        } else {
            n = without_l2_table(self, at);
            n = n < end - at ? n : end - at;
            done = n && ++p->steps <= MOST_STEPS
                && layer_plan(self + 1, p, at - self->base, to, n);
            at += n;
            to += n;
        }
    }
    return done;
}

bool layer_init(layer *self, PyObject *description) {
    const char *decoder = NULL;
    PyObject *capsule = Py_None;
    if (!PyArg_ParseTuple(description, "iK|O!O!iiipppKO!pOz", &self->fd, &self->size,
            &PyDict_Type, &self->tables, &PyLong_Type, &self->token, &self->cluster_bits,
            &self->l2_bits, &self->slice_bits, &self->extended, &self->data_file,
            &self->zero_flag, &self->base, &PyDict_Type, &self->decoded, &self->by_guest,
            &capsule, &decoder))
        return false;
    bool right = self->fd >= 0 && self->size <= INT64_MAX && self->base <= INT64_MAX - self->size
        && (capsule == Py_None || (self->cipher = PyCapsule_GetPointer(capsule, CIPHER)));
    if (self->tables) /* no sum of guest offsets and no shift may overflow */
        right = right && self->decoded && self->cluster_bits >= 9 && self->cluster_bits <= 21
            && self->l2_bits <= 21 && self->slice_bits >= 0 && self->slice_bits <= self->l2_bits
            && (!self->extended || self->cluster_bits >= 14);
    if (!right)
        return PyErr_Format(PyExc_ValueError, "not a layer");
    self->decode = decoder ? decoder_named(decoder) : NULL;
    return true;
}
