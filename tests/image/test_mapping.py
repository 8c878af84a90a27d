"""The mapping: whatever the L1 and L2 tables hold, the runs are what each cluster says alone."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.devices import opened

from qcow2snap_core.errors import ImageError
from qcow2snap_core.format import ondisk as q
from qcow2snap_core.image.mapping import COMPRESSED, DATA, UNALLOCATED, ZERO, Mapping
from qcow2snap_core.image.tablereader import Geometry
from qcow2snap_core.util.cache import BoundedCache

COPIED, PACKED = q.OFLAG_COPIED, q.OFLAG_COMPRESSED


def mapping(storage, bits, l1_offset, l1_size, version=3, cache=1 << 20, open_ended=True):
    geometry, tables = Geometry(bits, version), BoundedCache(cache)
    return Mapping(storage, geometry, l1_offset, l1_size, tables, 0, open_ended)


def write(path, bits, tables, copied=0):
    """A file with an L1 table for these L2 tables, a None for each that is missing.

    Returns the L1 table's offset.  A table's missing entries are zeros.
    """
    cluster = 1 << bits
    first = 1 + -(-8 * len(tables) // cluster)
    l1 = [0 if t is None else (first + n) * cluster | copied for n, t in enumerate(tables)]
    with open(path, "wb") as f:
        f.seek(cluster)
        f.write(struct.pack(f">{len(l1)}Q", *l1))
        for offset, table in zip(l1, tables, strict=True):
            if table is not None:
                f.seek(offset & ~copied)
                f.write(struct.pack(f">{len(table)}Q", *table))
        f.truncate((first + len(tables)) * cluster)
    return cluster


# --- Against a model that resolves each cluster for itself ---


def resolve(tables, bits, version, cluster):
    """(kind, host offset) of one cluster, straight from the words of the specification."""
    index, at = divmod(cluster, 1 << bits - 3)
    table = tables[index] if index < len(tables) else None
    entry = (table[at] if table and at < len(table) else 0) & ~COPIED
    host = entry & 0x00FFFFFFFFFFFE00
    if entry & PACKED:
        return COMPRESSED, entry
    if entry & ~0x00FFFFFFFFFFFE01 or host % (1 << bits) or (entry & 1 and version == 2):
        return None
    return (ZERO, 0) if entry & 1 else (DATA, host) if host else (UNALLOCATED, 0)


def model(tables, bits, version, offset, length):
    """The runs of a range, merged, up to the first cluster that is damaged."""
    runs, size, at = [], 1 << bits, offset
    while at < offset + length:
        n = min(offset + length, (at | size - 1) + 1) - at
        found = resolve(tables, bits, version, at >> bits)
        if found is None:
            return runs, True
        kind, host = found
        host += at % size if kind == DATA else 0
        last = runs[-1] if runs and kind != COMPRESSED else (0, 0, None, 0)
        if last[2] == kind and (kind != DATA or last[3] + last[1] == host):
            runs[-1] = (last[0], last[1] + n, *last[2:])
        else:
            runs.append((at, n, kind, host))
        at += n
    return runs, False


def found(m, offset, length):
    runs = []
    try:
        for start, n, kind, where in m.runs(offset, length):
            runs.append((start, n, kind, where if kind in (DATA, COMPRESSED) else 0))
    except ImageError:
        return runs, True
    return runs, False


def stretches(bits):
    """(first entry, step to the next, how many), as a guest and a fuzzer would write them."""
    size = 1 << bits
    host = st.integers(1, 300).map(lambda n: n * size)
    plain = [
        st.just((0, 0)),
        host.map(lambda h: (h, size)),
        host.map(lambda h: (h | COPIED, size)),
        host.map(lambda h: (h, 2 * size)),
        host.map(lambda h: (h, 0)),
        host.map(lambda h: ((1 << 56) - 512 * size + h, size)),
        host.map(lambda h: (h | PACKED | 0x123, 0x321)),
        st.just((PACKED, 0)),
    ]
    zero = [
        st.just((1, 0)),
        host.map(lambda h: (h | 1, size)),
        host.map(lambda h: (h | 1, 0)),
        st.just((COPIED | 1, 0)),
    ]
    bad = [
        host.map(lambda h: (h | 1 << 56, size)),
        host.map(lambda h: (h | 1 << 61, 0)),
        host.map(lambda h: (h | 2, size)),
        host.map(lambda h: (h | 0x100, 0)),
        host.map(lambda h: (h + size // 2 if bits > 9 else 0x82, size)),
    ]
    count = st.one_of(st.integers(1, 5), st.integers(1, 150))
    return st.tuples(st.one_of(*(st.one_of(k) for k in (plain, plain, zero, bad))), count)


@st.composite
def images(draw):
    """(cluster bits, version, tables, offset, length), the offset where something changes."""
    bits, version = draw(st.integers(9, 16)), draw(st.sampled_from([2, 3]))
    entries = 1 << bits - 3
    joints = [0]

    def table(first):
        built = [0] * draw(st.sampled_from([0, 0, 3, max(0, entries - 70)]))
        for (entry, step), count in draw(st.lists(stretches(bits), max_size=6)):
            joints.append(first + len(built))
            built += range(entry, entry + count * step, step) if step else [entry] * count
        return built[:entries]

    present = draw(st.lists(st.booleans(), max_size=4))
    tables = [table(n * entries) if p else None for n, p in enumerate(present)]
    joints += [n * entries for n in range(len(tables) + 1)]
    end = (len(tables) + 1) * entries << bits
    start = draw(st.sampled_from(joints)) + draw(st.integers(-3, 3)) << bits
    offset = max(0, min(start + draw(st.integers(0, (1 << bits) - 1)), end - 1))
    length = draw(st.one_of(st.integers(1, 6 << bits), st.integers(1, 400 << bits)))
    return bits, version, tables, offset, min(length, end - offset)


@settings(max_examples=400)
@given(images(), st.sampled_from([0, 100, 1 << 20]))
def test_the_runs_are_those_of_the_model(tmp_path, image, cache):
    """Gapless, in order, merged; up to the damaged cluster and no further."""
    bits, version, tables, offset, length = image
    path = tmp_path / "disk"
    l1_offset = write(path, bits, tables, copied=COPIED)
    with opened(path) as storage:
        m = mapping(storage, bits, l1_offset, len(tables), version, cache)
        expected = model(tables, bits, version, offset, length)
        assert found(m, offset, length) == expected
        assert found(m, offset, length) == expected, "from the cache"


@given(images())
def test_a_single_run_is_right_from_its_first_byte_on(tmp_path, image):
    bits, version, tables, offset, length = image
    path = tmp_path / "disk"
    l1_offset = write(path, bits, tables)
    runs, _ = model(tables, bits, version, offset, length)
    with opened(path) as storage:
        if not runs:
            with pytest.raises(ImageError):
                mapping(storage, bits, l1_offset, len(tables), version).run(offset, length)
            return
        n, kind, host = mapping(storage, bits, l1_offset, len(tables), version).run(offset, length)
        assert kind == runs[0][2]
        assert host == runs[0][3] or kind in (UNALLOCATED, ZERO)
        assert 0 < n <= runs[0][1]


@given(images())
def test_the_copied_bit_means_nothing(tmp_path, image):
    bits, version, tables, offset, length = image
    answers = []
    for flip in (0, COPIED):
        flipped = [t and [e ^ flip for e in t] for t in tables]
        l1_offset = write(tmp_path / "disk", bits, flipped, copied=flip)
        with opened(tmp_path / "disk") as storage:
            m = mapping(storage, bits, l1_offset, len(tables), version)
            answers.append(found(m, offset, length))
    assert answers[0] == answers[1]


# --- Tables that are cut short, or cannot be ---


@pytest.mark.parametrize("bits", [9, 12, 16, 17])
@pytest.mark.parametrize("kept", [0, 1, 5, 63])
def test_only_what_a_missing_part_of_a_table_maps_is_an_error(tmp_path, bits, kept):
    size, path = 1 << bits, tmp_path / "disk"
    table = [n * size for n in range(1, (size // 8) + 1)]
    l1_offset = write(path, bits, [None, table])
    start = size * size // 8  # of what the table maps
    with open(path, "r+b") as f:
        f.truncate(3 * size + 8 * kept + (kept % 8))  # and part of an entry
    with opened(path) as storage:
        m = mapping(storage, bits, l1_offset, 3)
        if kept:
            whole = ([(start, kept * size, DATA, size)], False)
            assert found(m, start, kept * size) == whole
            assert found(m, start, kept * size + 1) == (whole[0], True)
        for at in (kept, size // 8 - 1):
            with pytest.raises(ImageError, match="L2 table .*past the end of the file"):
                m.run(start + at * size, 1)
        assert found(m, start - size, size) == ([(start - size, size, UNALLOCATED, 0)], False)
        assert found(m, 2 * start, size) == ([(2 * start, size, UNALLOCATED, 0)], False)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (1 << 62 | 0x10000, "L1 entry 1 is invalid: 0x4000000000010000"),
        (1 << 56 | 0x10000, "L1 entry 1 is invalid"),
        (0x10001, "L1 entry 1 is invalid"),
        (0x10200, "L1 entry 1 is invalid"),
        (1 << 50, "L2 table at host offset 0x4000000000000 is past the end of the file"),
    ],
)
def test_an_l1_entry_that_cannot_be_concerns_only_what_it_maps(tmp_path, entry, message):
    path, bits = tmp_path / "disk", 16
    per_entry = 1 << 13 + bits
    l1_offset = write(path, bits, [[1 << 16], None, [2 << 16]])
    with open(path, "r+b") as f:
        f.seek(l1_offset + 8)
        f.write(struct.pack(">Q", entry))
    with opened(path) as storage:
        m = mapping(storage, bits, l1_offset, 3)
        for at in (per_entry, 2 * per_entry - 1):
            with pytest.raises(ImageError, match=message):
                m.run(at, 1)
        assert m.run(0, 512) == (512, DATA, 1 << 16)
        assert m.run(2 * per_entry, 512) == (512, DATA, 2 << 16)


def test_past_an_l1_that_may_be_short_all_is_unallocated(tmp_path):
    l1_offset = write(tmp_path / "disk", 9, [[512]])
    with opened(tmp_path / "disk") as storage:
        m = mapping(storage, 9, l1_offset, 1)
        far = 1 << 60
        assert found(m, far, 1 << 20) == ([(far, 1 << 20, UNALLOCATED, 0)], False)
        assert m.run(64 * 512, 99) == (99, UNALLOCATED, 0)
        assert m.reach is None


@pytest.mark.parametrize("tables", [[], [None], [[512]], [None, [0] * 64]])
def test_past_any_other_l1_is_an_error(tmp_path, tables):
    l1_offset = write(tmp_path / "disk", 9, tables)
    reach = len(tables) * 64 * 512
    with opened(tmp_path / "disk") as storage:
        m = mapping(storage, 9, l1_offset, len(tables), open_ended=False)
        assert m.reach == reach
        said = f"its L1 table of {len(tables)} entries covers only {reach} bytes"
        for at in (reach, reach + 1, 1 << 60):
            with pytest.raises(ImageError, match=said):
                m.run(at, 1)
        if tables:
            runs, failed = found(m, 0, reach)
            assert not failed
            assert found(m, 0, reach + 1) == (runs, True)
            assert found(m, 0, 1 << 62) == (runs, True)


def test_an_l1_of_many_slices(tmp_path):
    """20,000 entries: more than are read at a time; one table at either side of a joint."""
    tables = [None] * 20_000
    tables[8191], tables[8192], tables[19_999] = [512], [1024], [1536]
    l1_offset = write(tmp_path / "disk", 9, tables)
    with opened(tmp_path / "disk") as storage:
        m = mapping(storage, 9, l1_offset, len(tables))
        for index, host in ((8191, 512), (8192, 1024), (19_999, 1536), (8190, 0), (16_384, 0)):
            assert m.run(index * 64 * 512, 512) == (512, DATA if host else UNALLOCATED, host)


@pytest.mark.parametrize("bits", [17, 21])
def test_a_table_of_several_slices(tmp_path, bits):
    """Larger than the 64 KiB that are read at a time; runs go on across the joints."""
    size, entries = 1 << bits, 1 << bits - 3
    table = [n * size for n in range(1, entries + 1)]
    table[8192 + 100] = 0
    l1_offset = write(tmp_path / "disk", bits, [table])
    with opened(tmp_path / "disk") as storage:
        m = mapping(storage, bits, l1_offset, 1)
        hole = (8192 + 100) * size
        assert found(m, 0, entries * size) == (
            [
                (0, hole, DATA, size),
                (hole, size, UNALLOCATED, 0),
                (hole + size, entries * size - hole - size, DATA, hole + 2 * size),
            ],
            False,
        )
        assert m.run((entries - 1) * size + 5, 1) == (1, DATA, entries * size + 5)


@pytest.mark.parametrize("count", [1, 2, 63, 64, 65, 66, 127, 128, 129, 193])
@pytest.mark.parametrize(
    ("entry", "step", "kind"),
    [(0, 0, UNALLOCATED), (4096, 4096, DATA), (1, 0, ZERO), (4097, 4096, ZERO)],
)
def test_equal_entries_are_one_run_however_many(tmp_path, count, entry, step, kind):
    """They are compared many at a time."""
    table = [1 << 40] + [entry + n * step for n in range(count)] + [2 << 40] * 100
    l1_offset = write(tmp_path / "disk", 12, [table])
    with opened(tmp_path / "disk") as storage:
        n, found_kind, _ = mapping(storage, 12, l1_offset, 1).run(4096 + 5, 1 << 20)
        assert (found_kind, n) == (kind, count * 4096 - 5)
