"""No image costs more memory or time than the limits in ondisk.py allow.

Memory is counted with tracemalloc and work in look-ups or reads, so that nothing here depends on
how fast the machine is.
"""

from __future__ import annotations

import struct
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from support import qemu
from support.devices import opened
from support.qemu import MiB
from support.tables import Entry, write_table

from qcow2snap_core import ondisk as q
from qcow2snap_core.exports import exports_of
from qcow2snap_core.guard import SnapshotGuard
from qcow2snap_core.snapshots import Snapshot, read_table

ALLOWED = 64 * MiB


@contextmanager
def bounded(limit: int = ALLOWED) -> Iterator[None]:
    """Python's objects must not take more at any moment."""
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < limit
    finally:
        tracemalloc.stop()


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    path = qemu.create(tmp_path / "disk.qcow2", MiB)
    qemu.take(path, "real")
    return path


def fill_table(path: Path, count: int, name: Callable[[int], bytes], extra: bytes = b"") -> None:
    real = qemu.snapshots(path)["real"]
    place = real.l1_table_offset, real.l1_size
    write_table(path, [Entry(b"%d" % n, name(n), *place, extra=extra) for n in range(count)])


# --- The snapshot table ---

EXTRA = struct.pack(">QQQ", 0, MiB, 2**64 - 1)
TABLES = {
    "most-entries": (65536, lambda n: b"nightly-%d" % n, EXTRA, 65536),
    "largest-extra": (10000, lambda n: b"%d" % n, EXTRA + bytes(1000), 10000),
    # One character of four bytes makes Python keep four bytes for each of the others.
    "longest-names": (1000, lambda n: "😀".encode() + b"x" * 65000 + b"%d" % n, EXTRA, 64),
}


@pytest.mark.parametrize("kind", TABLES)
def test_a_large_snapshot_table(disk: Path, kind: str) -> None:
    count, name, extra, kept = TABLES[kind]
    fill_table(disk, count, name, extra)
    with opened(disk) as storage, bounded():
        table = read_table(storage)
        assert len(table.snapshots) == kept
        if kept < count:
            assert table.damage is not None
            assert "too long" in table.damage
        assert exports_of(table.snapshots)


def test_a_guard_of_a_late_entry_keeps_little_of_the_table(disk: Path) -> None:
    fill_table(disk, 20000, lambda n: b"x" * 100 + b"%d" % n, EXTRA)
    with opened(disk) as storage:
        last = read_table(storage).snapshots[-1]
        guard = SnapshotGuard(storage, last)
        with bounded(MiB):
            guard.check()
            guard.check()
        qemu.patch(disk, last.entry_offset - 8, b"!")  # of the entry before
        with opened(disk) as other:
            assert read_table(other).snapshots[-1] == last
        assert not proves(guard, storage)


def proves(guard: SnapshotGuard, storage: object) -> bool:
    proof = guard._proof
    assert proof is not None
    return proof.holds(storage)  # type: ignore[arg-type]


def test_a_damaged_table_is_not_believed_in_for_long(disk: Path) -> None:
    """Each try costs all the entries before the damage, and each client tries."""
    fill_table(disk, 30000, lambda n: b"%d" % n, EXTRA)
    last = last_entry(disk)
    qemu.patch(disk, last.entry_offset + 36, b"\xff" * 4)
    with opened(disk) as storage:
        reads = count_reads(storage)
        table = read_table(storage)
        assert len(table.snapshots) == 29999
        first = len(reads)
        read_table(storage, (table.fields, table.damage))
        assert len(reads) - first <= first // 2
    assert q.MAX_TABLE_SECONDS < 1


def last_entry(path: Path) -> Snapshot:
    with opened(path) as storage:
        return read_table(storage).snapshots[-1]


def count_reads(storage: object) -> list[int]:
    """The offsets of all reads from now on."""
    offsets: list[int] = []
    read = storage.read  # type: ignore[attr-defined]

    def counted(length: int, offset: int) -> bytes:
        offsets.append(offset)
        return read(length, offset)

    storage.read = counted  # type: ignore[attr-defined]
    return offsets
