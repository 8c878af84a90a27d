"""A diff misses nothing: put on top of the old snapshot it makes the new one, in every format;
and it is told from the tables that differ alone."""

from __future__ import annotations

import itertools
import shutil
import struct
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import damage, qemu
from support.qemu import GiB, KiB, MiB, RandomImage

from qcow2snap_core.errors import ImageError, SnapshotGone
from qcow2snap_core.image.disk import Disk
from qcow2snap_core.image.extents import ALLOCATED, HOLE_ZERO, Extent
from qcow2snap_core.image.opener import open_image
from qcow2snap_core.tables.diff import changes

SHAPES: dict[str, dict[str, Any]] = {
    "plain": {},
    "v2": {"options": {"compat": "0.10"}},
    "512": {"options": {"cluster_size": 512}, "size": MiB + 512},
    "compressed": {"compressed": True},
    "extended": {"options": {"extended_l2": "on"}, "compressed": True},
    "extended-16k": {"options": {"extended_l2": "on", "cluster_size": 16 * KiB}},
    "2M": {"options": {"cluster_size": 2 * MiB}, "size": 12 * MiB},
}


def content(disk: Disk) -> bytes:
    return disk.pread(disk.size, 0)


def assert_makes(old: Disk, new: Disk) -> list[Extent]:
    """The diff on top of the old content is the new content; it is in order and merged."""
    found = list(changes(old, new))
    expected = content(new)
    result = bytearray(content(old)[: new.size].ljust(new.size, b"\xee"))
    end, before = 0, None
    for offset, length, kind in found:
        assert length > 0
        assert offset > end or (offset == end and kind != before)
        end, before = offset + length, kind
        assert end <= new.size
        assert kind in (ALLOCATED, HOLE_ZERO)
        result[offset:end] = bytes(length) if kind == HOLE_ZERO else expected[offset:end]
    assert result == expected
    return found


@pytest.mark.parametrize("backed", [False, True], ids=["alone", "backed"])
@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("shape", SHAPES)
def test_it_makes_the_new_one_of_the_old(
    tmp_path: Path, shape: str, seed: int, backed: bool
) -> None:
    keys = SHAPES[shape]
    backing = None
    if backed:
        below = RandomImage(tmp_path / "below.qcow2", seed, int(keys.get("size", 4 * MiB) * 0.7))
        below.make([], 20)
        backing = (below.path.name, "qcow2")
    image = RandomImage(tmp_path / "disk.qcow2", seed, backing=backing, **keys)
    names = image.make(operations=8)
    with open_image(str(image.path)) as opened:
        disks = [opened.snapshot(name) for name in names] + [opened.active_disk()]
        for old, new in itertools.permutations(disks, 2):
            assert assert_makes(old, new)
        assert not list(changes(disks[0], disks[0]))


@pytest.mark.parametrize("options", [{"cluster_size": 512}, {}, {"extended_l2": "on"}])
def test_sizes_that_differ(tmp_path: Path, options: dict[str, object]) -> None:
    base = qemu.create(tmp_path / "base.qcow2", 150 * KiB)
    qemu.io(base, "write -P 9 0 150k")
    path = qemu.create(tmp_path / "disk.qcow2", 100 * KiB, backing=(base.name, "qcow2"), **options)
    names = []
    for n, size in enumerate([400 * KiB + 512, 65 * KiB, 3 * MiB, 130 * KiB]):
        qemu.io(path, f"write -P {n + 1} {10 * n}k 40k")
        qemu.take(path, f"s{n}")
        names.append(f"s{n}")
        qemu.run("qemu-img", "resize", "-q", "--shrink", "-f", "qcow2", path, size)
    with open_image(str(path)) as opened:
        disks = [opened.snapshot(name) for name in names] + [opened.active_disk()]
        for old, new in itertools.permutations(disks, 2):
            found = assert_makes(old, new)
            tail = sum(max(0, e.offset + e.length - max(e.offset, old.size)) for e in found)
            assert tail == max(0, new.size - old.size)


# Of a cluster: what was done before OLD, what between OLD and NEW, the diff.
CASES = [
    ("written", [], ["write -P 1 0 64k"], ALLOCATED),
    ("written again", ["write -P 1 0 64k"], ["write -P 2 0 64k"], ALLOCATED),
    ("compressed", ["write -P 1 0 64k"], ["discard 0 64k", "write -c -P 2 0 64k"], ALLOCATED),
    ("zeroed", ["write -P 1 0 64k"], ["write -z 0 64k"], HOLE_ZERO),
    ("discarded", ["write -P 1 0 64k"], ["write -z -u 0 64k"], HOLE_ZERO),
    ("zeros, differently", ["write -z 0 64k"], ["write -P 1 0 64k", "write -z 0 64k"], None),
    ("zeros over nothing", [], ["write -z 0 64k"], None),
    ("only read", ["write -P 1 0 64k"], ["read 0 64k"], None),
]


@pytest.mark.parametrize(("name", "before", "between", "kind"), CASES, ids=[c[0] for c in CASES])
def test_each_kind_of_change(
    tmp_path: Path, name: str, before: list[str], between: list[str], kind: int | None
) -> None:
    path = qemu.create(tmp_path / "disk.qcow2", 192 * KiB)
    qemu.io(path, "write -P 7 64k 64k", *before)
    qemu.take(path, "old")
    qemu.io(path, *between)
    qemu.take(path, "new")
    with open_image(str(path)) as opened:
        found = assert_makes(opened.snapshot("old"), opened.snapshot("new"))
    assert found == ([] if kind is None else [(0, 64 * KiB, kind)])


@pytest.mark.parametrize("below", [ALLOCATED, HOLE_ZERO])
def test_what_is_unallocated_now_is_the_backing_files(tmp_path: Path, below: int) -> None:
    base = qemu.create(tmp_path / "base.qcow2", 64 * KiB)
    if below == ALLOCATED:
        qemu.io(base, "write -P 9 0 64k")
    path = qemu.create(tmp_path / "disk.qcow2", 64 * KiB, backing=(base.name, "qcow2"))
    qemu.take(path, "nothing")
    qemu.io(path, "write -P 1 0 64k")
    qemu.take(path, "data")
    with open_image(str(path)) as opened:
        found = assert_makes(opened.snapshot("data"), opened.snapshot("nothing"))
    assert found == [(0, 64 * KiB, below)]


# --- Tables put together by hand ---

CLUSTER, COUNT = 512, 130  # the disk has three L2 tables
COMPRESSED = 1 << 62


@pytest.fixture(scope="module")
def table_image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two snapshots with L2 tables of their own."""
    path = qemu.create(
        tmp_path_factory.mktemp("diff") / "disk.qcow2", COUNT * CLUSTER, cluster_size=CLUSTER
    )
    for name in ("old", "new"):
        qemu.io(path, f"write -P 1 0 {COUNT * CLUSTER}")
        qemu.take(path, name)
    qemu.io(path, f"write -P 1 0 {COUNT * CLUSTER}")
    return path


HOSTS = [0x2000, 0x2200, 0x2400, 0x2600]
ENTRIES = [0, 1, *HOSTS, HOSTS[0] | 1, COMPRESSED | HOSTS[0], COMPRESSED | HOSTS[0] + 20]


def meaning(entry: int) -> tuple[str, int]:
    if entry & COMPRESSED:
        return "compressed", entry
    return ("zero", 0) if entry & 1 or not entry else ("data", entry)


@settings(max_examples=150)
@given(
    st.lists(
        st.tuples(
            st.integers(0, COUNT - 1),
            st.sampled_from(ENTRIES),
            st.sampled_from(ENTRIES),
            st.integers(0, 3),
        ),
        max_size=40,
        unique_by=lambda row: row[0],
    )
)
def test_any_entries(table_image: Path, rows: list[tuple[int, int, int, int]]) -> None:
    olds = [0x3000 + n * CLUSTER for n in range(COUNT)]
    news = list(olds)
    copied = [0] * COUNT
    for cluster, old, new, bits in rows:
        olds[cluster], news[cluster], copied[cluster] = old, new, bits
    for name, entries, bit in (("old", olds, 1), ("new", news, 2)):
        for first in range(0, COUNT, 64):
            raw = b"".join(
                struct.pack(">Q", e | (1 << 63 if c & bit and not e & COMPRESSED else 0))
                for e, c in zip(
                    entries[first : first + 64], copied[first : first + 64], strict=True
                )
            )
            qemu.patch(table_image, damage.l2_table(table_image, name, first * CLUSTER), raw)
    expected = {
        n: HOLE_ZERO if meaning(news[n])[0] == "zero" else ALLOCATED
        for n in range(COUNT)
        if meaning(olds[n]) != meaning(news[n])
    }
    with open_image(str(table_image)) as opened:
        found = list(changes(opened.snapshot("old"), opened.snapshot("new")))
    listed = {
        n: e.type
        for e in found
        for n in range(e.offset // CLUSTER, (e.offset + e.length) // CLUSTER)
    }
    assert listed == expected


# --- What is read, and when ---


def test_shared_tables_are_not_read(tmp_path: Path) -> None:
    """An L2 table that both share is garbage, and nobody notices."""
    path = qemu.create(tmp_path / "disk.qcow2", 2 * GiB)
    qemu.io(path, "write -P 1 0 64k", "write -P 1 1G 64k")
    qemu.take(path, "old")
    qemu.io(path, "write -P 2 1G 64k")
    qemu.take(path, "new")
    qemu.patch(path, damage.l2_table(path, "old", 0), b"\x7f" * 64 * KiB)
    with open_image(str(path)) as opened:
        found = list(changes(opened.snapshot("old"), opened.snapshot("new")))
        with pytest.raises(ImageError, match="guest offset 0x0"):
            opened.snapshot("new").pread(512, 0)
    assert found == [(GiB, 64 * KiB, ALLOCATED)]


@pytest.mark.parametrize("snapshot", ["old", "new"])
def test_damage_is_an_error(tmp_path: Path, snapshot: str) -> None:
    path = qemu.create(tmp_path / "disk.qcow2", MiB)
    for name in ("old", "new"):
        qemu.io(path, "write -P 1 0 128k")
        qemu.take(path, name)
    damage.put64(path, damage.l1_entry(path, snapshot, 0), damage.END_OF_FILE)
    with (
        open_image(str(path)) as opened,
        pytest.raises(ImageError, match=f"'{snapshot}'.*guest offset 0x0.*past the end"),
    ):
        list(changes(opened.snapshot("old"), opened.snapshot("new")))


@pytest.mark.parametrize("gone", ["old", "new"])
def test_nothing_is_said_of_a_snapshot_that_was_deleted(tmp_path: Path, gone: str) -> None:
    path = qemu.create(tmp_path / "disk.qcow2", MiB)
    for name in ("old", "new"):
        qemu.io(path, "write -P 1 0 128k")
        qemu.take(path, name)
    copy = shutil.copyfile(path, tmp_path / "copy.qcow2")
    with open_image(str(copy)) as opened:
        found = changes(opened.snapshot("old"), opened.snapshot("new"))
        qemu.delete(copy, gone)
        with pytest.raises(SnapshotGone, match=f"'{gone}'"):
            next(found)
