"""Extended L2 entries against a model of ten lines: one subcluster at a time, as the spec says
it, where the mapping finds runs."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qcow2snap_core.errors import ImageError
from qcow2snap_core.format import ondisk as q
from qcow2snap_core.image.mapping import COMPRESSED, DATA, UNALLOCATED, ZERO, Mapping
from qcow2snap_core.image.subclusters import SubclusterMapping
from qcow2snap_core.image.tablereader import Geometry
from qcow2snap_core.storage.local import Storage, open_storage
from qcow2snap_core.util.cache import BoundedCache

BITS = 16
CLUSTER = 1 << BITS
SUB = CLUSTER // 32
ALL = 2**32 - 1
L1, L2 = CLUSTER, 2 * CLUSTER

Entry = tuple[int, int]


def mapping(file: Storage, entries: list[Entry], *, data_file: bool = False) -> Mapping:
    """The mapping of an L1 with one L2 table that begins with these entries."""
    table = b"".join(struct.pack(">QQ", *e) for e in entries)
    with open(file.path, "wb") as f:
        f.write(bytes(L1) + struct.pack(">Q", L2 | q.OFLAG_COPIED))
        f.seek(L2)
        f.write(table.ljust(CLUSTER, b"\0"))
    geometry = Geometry(BITS, 3, True, data_file)
    return SubclusterMapping(file, geometry, L1, 1, BoundedCache(1 << 20), 1)


def model(entries: list[Entry], offset: int) -> tuple[int, int]:
    """What one byte is: (kind, host offset)."""
    entry, bitmap = entries[offset // CLUSTER]
    if entry & q.OFLAG_COMPRESSED:
        return COMPRESSED, entry & ~q.OFLAG_COPIED
    bit = offset % CLUSTER // SUB
    if bitmap >> bit & 1:
        return DATA, (entry & q.OFFSET_MASK) + offset % CLUSTER
    return (ZERO if bitmap >> 32 + bit & 1 else UNALLOCATED), 0


@st.composite
def entry(draw: st.DrawFn) -> Entry:
    kinds = st.sampled_from(["unallocated", "zero", "data", "mixed", "compressed"])
    kind = draw(kinds)
    if kind == "compressed":
        return q.OFLAG_COMPRESSED | draw(st.integers(0, 2**55)), 0
    host = draw(st.integers(0, 6)) * CLUSTER + (10 * CLUSTER if kind in ("data", "mixed") else 0)
    copied = q.OFLAG_COPIED if host and draw(st.booleans()) else 0
    if kind == "mixed":
        alloc = draw(st.integers(0, ALL))
        return host | copied, alloc | (draw(st.integers(0, ALL)) & ~alloc) << 32
    return host | copied, {"unallocated": 0, "zero": ALL << 32, "data": ALL}[kind]


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Storage]:
    path = tmp_path_factory.mktemp("extended") / "image"
    path.touch()
    storage = open_storage(str(path))
    yield storage
    storage.close()


def runs(found: Iterator[tuple[int, int, int, int]]) -> Iterator[tuple[int, int, int]]:
    """(offset, kind, host offset) of each subcluster that begins in a run, and its start."""
    for start, length, kind, host in found:
        for at in sorted({start, *range(-(-start // SUB) * SUB, start + length, SUB)}):
            yield at, kind, host + at - start if kind == DATA else host


@settings(max_examples=300)
@given(st.lists(entry(), min_size=1, max_size=5), st.data())
def test_every_subcluster_is_what_the_spec_says(
    file: Storage, entries: list[Entry], data: st.DataObject
) -> None:
    size = len(entries) * CLUSTER
    start = data.draw(st.integers(0, size - 1))
    length = data.draw(st.integers(1, size - start))
    found = list(mapping(file, entries).runs(start, length))
    assert [r[0] for r in found] == [start, *(r[0] + r[1] for r in found[:-1])]
    assert sum(r[1] for r in found) == length
    for at, kind, host in runs(iter(found)):
        assert (kind, host) == model(entries, at), hex(at)


@given(st.lists(entry(), min_size=1, max_size=5))
def test_runs_are_as_long_as_can_be(file: Storage, entries: list[Entry]) -> None:
    found = list(mapping(file, entries).runs(0, len(entries) * CLUSTER))
    for (_, length, kind, host), (_, _, next_kind, next_host) in pairwise(found):
        same = kind == next_kind and kind != COMPRESSED
        assert not (same and (kind != DATA or next_host == host + length))


@pytest.mark.parametrize("count", [2, 63, 64, 65, 513, 1000])
@pytest.mark.parametrize("uniform", [0, ALL, ALL << 32])
def test_equal_clusters_are_one_run(file: Storage, count: int, uniform: int) -> None:
    host = 8 * CLUSTER if uniform == ALL else 0
    entries = [(host + n * CLUSTER if host else 0, uniform) for n in range(count)]
    last = (0, ALL << 32) if uniform == 0 else (0, 0)
    found = list(mapping(file, [*entries, last]).runs(0, (count + 1) * CLUSTER))
    assert [r[1] for r in found] == [count * CLUSTER, CLUSTER]


@pytest.mark.parametrize(
    ("first", "bitmap", "said"),
    [
        (8 * CLUSTER, 1 << 5 | 1 << 37, "both data and zero"),
        (0, 1, "data without a host offset"),
        (8 * CLUSTER + 512, 1, "unaligned host offset"),
        (8 * CLUSTER | 1, 1, "reserved bits"),  # the zero flag of standard entries
        (8 * CLUSTER | 1 << 60, 1, "reserved bits"),
    ],
)
def test_what_the_spec_forbids_is_damage(file: Storage, first: int, bitmap: int, said: str) -> None:
    with pytest.raises(ImageError, match=said):
        mapping(file, [(first, bitmap)]).run(0, 512)


def test_in_a_data_file_the_first_cluster_lies_at_offset_0(file: Storage) -> None:
    table = mapping(file, [(q.OFLAG_COPIED, ALL), (q.OFLAG_COPIED | CLUSTER, 3)], data_file=True)
    assert table.run(0, 2 * CLUSTER)[1:] == (DATA, 0)
    assert table.run(CLUSTER, CLUSTER) == (2 * SUB, DATA, CLUSTER)
