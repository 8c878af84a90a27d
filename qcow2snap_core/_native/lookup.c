/* From guest offsets to pieces of files, through the table slices that Python has loaded.
 *
 * This mirrors Mapping.run and SubclusterMapping.run for the entries that a sound image has.
 * Whatever else it meets, a slice that is not in the cache, a compressed cluster that is not
 * decoded yet, a reserved bit, an unaligned offset, it hands back: Python looks again, loads,
 * judges and words the error.  Nothing here reads a file, and nothing is kept after the look-up. */
#include "engine.h"

static const uint64_t COPIED = 1ULL << 63, OFFSET_MASK = 0x00fffffffffffe00ULL, ZERO_FLAG = 1;
static const size_t MOST_PIECES = 1 << 14; /* a request of 64 MiB in clusters of 4 KiB */
static const size_t MOST_STEPS = 1 << 16; /* all under the lock: less than a millisecond */
enum { COMPRESSED_BIT = 62, L1_SLICE = (64 << 10) / 8 /* entries */ };
enum kind { UNALLOCATED, ZERO, DATA, COMPRESSED, ASK_PYTHON };

/* Neighbours that continue each other in one file become one piece, and one read. */
static bool add(plan *p, piece next) {
    piece *last = p->count ? &p->pieces[p->count - 1] : NULL;
    if (last && last->to + last->length == next.to && last->fd == next.fd
        && (next.fd < 0 || last->host + last->length == next.host) && last->cipher == next.cipher
        && (!next.cipher || last->sector + last->length / SECTOR == next.sector)) {
        last->length += next.length;
        return true;
    }
    if (p->count == p->room) {
        piece *more = p->room < MOST_PIECES ? PyMem_Malloc(4 * p->room * sizeof *more) : NULL;
        if (!more)
            return false;
        memcpy(more, p->pieces, p->count * sizeof *more);
        if (p->pieces != p->few)
            PyMem_Free(p->pieces);
        p->pieces = more;
        p->room *= 4;
    }
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

/* Whether the L1 table, as far as it is loaded, has no L2 table there. */
static bool no_l2_table(const layer *self, uint64_t l1_index) {
    uint64_t at = l1_index % L1_SLICE;
    Py_buffer view;
    if (l1_index >= self->l1_size
        || !get(self->tables, self->token, ~(int64_t)(l1_index - at), &view))
        return false;
    bool none = at < (uint64_t)view.len / 8 && !(((uint64_t *)view.buf)[at] & ~COPIED);
    PyBuffer_Release(&view);
    return none;
}

static bool add_below(const layer *self, plan *p, uint64_t offset, uint8_t *to, uint64_t length) {
    uint64_t size = self->lowest ? 0 : self[1].size;
    uint64_t inside = offset >= size ? 0 : size - offset < length ? size - offset : length;
    if (inside && !layer_plan(self + 1, p, offset, to, inside))
        return false;
    piece zeros = { .to = to + inside, .length = length - inside, .fd = -1 };
    return inside == length || add(p, zeros);
}

static bool add_data(
    const layer *self, plan *p, uint64_t guest, uint64_t host, uint8_t *to, uint64_t length) {
    piece next = { .to = to, .length = length, .fd = self->fd, .host = host };
    if (self->cipher) {
        if (host % SECTOR || length % SECTOR)
            return false;
        next.cipher = self->cipher;
        next.sector = (self->by_guest ? guest : host) / SECTOR;
    }
    return add(p, next);
}

static bool copy_decoded(const layer *self, uint64_t guest, uint8_t *to, uint64_t length) {
    uint64_t within = guest & ((1ULL << self->cluster_bits) - 1);
    Py_buffer view;
    if (!get(self->decoded, self->token, (int64_t)(guest - within), &view))
        return false;
    bool whole = view.len == (Py_ssize_t)1 << self->cluster_bits;
    if (whole)
        memcpy(to, (uint8_t *)view.buf + within, length);
    PyBuffer_Release(&view);
    return whole;
}

static enum kind standard(const layer *self, uint64_t entry, uint64_t *host) {
    bool copied = entry & COPIED; /* kept for a data file alone, whose offset 0 may be in use */
    entry &= ~COPIED;
    *host = entry & OFFSET_MASK;
    if (entry >> COMPRESSED_BIT)
        return self->data_file ? ASK_PYTHON : COMPRESSED;
    if ((copied && !self->data_file) || *host & ((1ULL << self->cluster_bits) - 1))
        return ASK_PYTHON;
    if (entry == *host)
        return entry || copied ? DATA : UNALLOCATED;
    return (entry ^ *host) == ZERO_FLAG && self->zero_flag ? ZERO : ASK_PYTHON;
}

/* The kind of the subcluster at WITHIN, and in *LENGTH how far it goes in this cluster. */
static enum kind subcluster(const layer *self, uint64_t entry, uint64_t bitmap, uint64_t within,
    uint64_t *host, uint64_t *length) {
    enum kind cluster = standard(self, entry, host);
    uint32_t alloc = (uint32_t)bitmap, zero = (uint32_t)(bitmap >> 32);
    if (cluster == COMPRESSED)
        return COMPRESSED;
    if ((cluster != DATA && cluster != UNALLOCATED) || alloc & zero
        || (alloc && cluster != DATA))
        return ASK_PYTHON;
    int bits = self->cluster_bits - 5;
    uint32_t first = (uint32_t)(within >> bits), end = first;
    bool is_data = alloc >> first & 1, is_zero = zero >> first & 1;
    while (end < 32 && (bool)(alloc >> end & 1) == is_data && (bool)(zero >> end & 1) == is_zero)
        end++;
    *length = ((uint64_t)end << bits) - within;
    return is_data ? DATA : is_zero ? ZERO : UNALLOCATED;
}

/* The clusters that one slice describes, from guest offset *AT on, up to END. */
static bool plan_slice(
    const layer *self, plan *p, const Py_buffer *view, uint64_t *at, uint64_t end, uint8_t *to) {
    const uint64_t *table = view->buf;
    uint64_t words = (uint64_t)view->len / 8, mask = (1ULL << self->slice_bits) - 1;
    uint64_t size = 1ULL << self->cluster_bits, index = *at >> self->cluster_bits;
    for (uint64_t stop = (index | mask) + 1; *at < end && index < stop;) {
        uint64_t within = *at & (size - 1), length = size - within, host;
        uint64_t slot = (index & mask) << self->extended;
        if (slot + (uint64_t)self->extended >= words || ++p->steps > MOST_STEPS)
            return false;
        enum kind kind = self->extended
            ? subcluster(self, table[slot], table[slot + 1], within, &host, &length)
            : standard(self, table[slot], &host);
        if (length > end - *at)
            length = end - *at;
        piece zeros = { .to = to, .length = length, .fd = -1 };
        if (!(kind == DATA ? add_data(self, p, *at, host + within, to, length)
                : kind == ZERO ? add(p, zeros)
                : kind == UNALLOCATED ? add_below(self, p, *at - self->base, to, length)
                : kind == COMPRESSED && copy_decoded(self, *at, to, length)))
            return false;
        *at += length;
        to += length;
        index = *at >> self->cluster_bits;
    }
    return true;
}

bool layer_plan(const layer *self, plan *p, uint64_t offset, uint8_t *to, uint64_t length) {
    if (!self->tables)
        return add(p, (piece){ .to = to, .length = length, .fd = self->fd, .host = offset });
    uint64_t start = self->base + offset, at = start, end = start + length;
    int l1_bits = self->cluster_bits + self->l2_bits; /* guest bytes behind an L1 entry */
    while (at < end) {
        Py_buffer view;
        int64_t slice = (int64_t)(at >> (self->cluster_bits + self->slice_bits));
        if (get(self->tables, self->token, slice, &view)) {
            bool done = plan_slice(self, p, &view, &at, end, to + (at - start));
            PyBuffer_Release(&view);
            if (!done)
                return false;
        } else {
            uint64_t next = ((at >> l1_bits) + 1) << l1_bits, n = (next < end ? next : end) - at;
            if (!no_l2_table(self, at >> l1_bits) || ++p->steps > MOST_STEPS
                || !add_below(self, p, at - self->base, to + (at - start), n))
                return false;
            at += n;
        }
    }
    return true;
}

bool layer_init(layer *self, PyObject *description, bool lowest) {
    PyObject *tables = NULL, *decoded = NULL, *token = NULL, *cipher = Py_None;
    if (!PyArg_ParseTuple(description, "iK|O!O!KiiipppKO!pO", &self->fd, &self->size,
            &PyDict_Type, &tables, &PyLong_Type, &token, &self->l1_size, &self->cluster_bits,
            &self->l2_bits, &self->slice_bits, &self->extended, &self->data_file,
            &self->zero_flag, &self->base, &PyDict_Type, &decoded, &self->by_guest, &cipher))
        return false;
    bool right = self->fd >= 0 && self->size <= INT64_MAX;
    if (tables) /* no sum of guest offsets and no shift here may overflow */
        right = right && decoded && self->base <= INT64_MAX - self->size && self->cluster_bits >= 9
            && self->cluster_bits <= 21 && self->l2_bits <= 21 && self->slice_bits >= 0
            && self->slice_bits <= self->l2_bits && (!self->extended || self->cluster_bits >= 14)
            && (cipher == Py_None || PyObject_TypeCheck(cipher, cipher_type));
    if (!right)
        return PyErr_Format(PyExc_ValueError, "not a layer");
    self->lowest = lowest;
    self->tables = Py_XNewRef(tables);
    self->decoded = Py_XNewRef(decoded);
    self->token = Py_XNewRef(token);
    self->cipher = cipher == Py_None ? NULL : Py_NewRef(cipher);
    return true;
}
