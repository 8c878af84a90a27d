"""The traps that a guard can fall into, each laid by a real QEMU at the worst moment.

Nothing is raced here: a hook in the file's own class has QEMU act between two reads of ours.
"""

from __future__ import annotations

import random
import struct
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from itertools import count
from pathlib import Path

import pytest
from support import damage, qemu
from support.devices import opened
from support.guest import BLOCK, block
from support.live import running
from support.qemu import MiB
from support.server import serve
from support.tables import Entry

from qcow2snap_core.errors import ImageError, SnapshotGone
from qcow2snap_core.format.snapshot_table import read_fields, read_table
from qcow2snap_core.format.snapshots import Snapshot
from qcow2snap_core.image.guard import SnapshotGuard
from qcow2snap_core.image.image import Image
from qcow2snap_core.image.opener import open_image
from qcow2snap_core.storage.local import ExpectedBytes, File, Storage
from qcow2snap_core.tables.sharing import picture
from qcow2snap_core.tables.space import exclusive_sizes

HEADER_FIELDS = (12, 60)
BLOCKS = 64  # that the guest has written
HOLE = MiB  # where it never wrote


def named(storage: Storage, name: str) -> Snapshot:
    return next(s for s in read_table(storage).snapshots if s.name == name)


def place(s: Snapshot) -> tuple[object, ...]:
    """All that can be the same again."""
    return s.entry_offset, s.id, s.name, s.l1_table_offset


def watching(storage: Storage, snapshot: Snapshot) -> SnapshotGuard:
    """A guard that has seen its snapshot in the table."""
    guard = SnapshotGuard(storage, snapshot)
    guard.confirm()
    return guard


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return qemu.create(tmp_path / "disk.qcow2", 2 * MiB)


def act(
    monkeypatch: pytest.MonkeyPatch,
    do: Callable[[], None],
    before: Callable[[int, int], bool] = lambda length, offset: False,
    after: Callable[[int, int], bool] = lambda length, offset: False,
) -> None:
    """Have something done, once, before or after the first read of the file that fits."""
    read, read_into, holds = File.read, File.read_into, File.holds
    left = [do]

    def at(when: Callable[[int, int], bool], length: int, offset: int) -> None:
        if left and when(length, offset):
            left.pop()()

    def hooked_read(self: File, length: int, offset: int) -> bytes:
        at(before, length, offset)
        data = read(self, length, offset)
        at(after, length, offset)
        return data

    def hooked_read_into(self: File, buffer: bytearray, offset: int) -> int:
        at(before, len(buffer), offset)
        got = read_into(self, buffer, offset)
        at(after, len(buffer), offset)
        return got

    def hooked_holds(self: File, pieces: ExpectedBytes) -> bool:
        for content, offset in pieces:
            at(before, len(content), offset)
            same = holds(self, ((content, offset),))
            at(after, len(content), offset)
            if not same:
                return False
        return True

    monkeypatch.setattr(File, "holds", hooked_holds)
    monkeypatch.setattr(File, "read", hooked_read)
    monkeypatch.setattr(File, "read_into", hooked_read_into)


# --- The order: read, check, return ---


REQUESTS = {
    "data": (lambda disk: disk.pread(BLOCK, 0), block(0, 1)),
    "hole": (lambda disk: disk.pread(BLOCK, HOLE), bytes(BLOCK)),
    "extents": (
        lambda disk: [tuple(e) for e in disk.extents(0, disk.size)],
        [(0, BLOCKS * BLOCK, 0), (BLOCKS * BLOCK, 2 * MiB - BLOCKS * BLOCK, 3)],
    ),
}


@pytest.mark.parametrize("kind", REQUESTS)
def test_deleted_between_any_two_reads_of_a_request(path: Path, monkeypatch, kind: str) -> None:
    """Whichever read the delete comes before, nothing of what it freed is returned."""
    request, right = REQUESTS[kind]
    with running(path) as q, q.guest() as disk:
        for number in count():
            disk.zero(2 * MiB, 0)
            disk.pwrite(block(0, 1) * BLOCKS, 0)
            q.take("served")
            seen: list[int] = []

            def delete() -> None:
                q.delete("served")
                disk.pwrite(b"!" * 2 * MiB, 0)

            def this(length: int, offset: int, seen=seen, number=number) -> bool:
                seen.append(offset)
                return len(seen) > number

            with open_image(str(path)) as image, monkeypatch.context() as patch:
                served = image.snapshot("served")
                act(patch, delete, before=this)
                try:
                    got = request(served)
                except SnapshotGone:
                    assert len(seen) > number
                    continue
            assert got == right, f"deleted before read {number + 1} of {seen}"
            if len(seen) <= number:
                break
            # In the middle of the check, when all had been read.
            assert number == len(seen) - 1
    assert number >= 2 + len(["header", "table"])


def test_deleted_after_the_check_has_begun(path: Path, monkeypatch) -> None:
    """The data was still the snapshot's then: whether this request fails is no matter, but what
    it returns is right, and the next one fails."""
    with running(path) as q, q.guest() as disk, open_image(str(path)) as image:
        disk.pwrite(block(0, 1) * BLOCKS, 0)
        q.take("served")
        served = image.snapshot("served")
        act(monkeypatch, lambda: q.delete("served"), after=lambda *r: r == HEADER_FIELDS)
        with suppress(SnapshotGone):
            assert served.pread(BLOCK, 0) == block(0, 1)
        with pytest.raises(SnapshotGone):
            served.pread(BLOCK, 0)


ASKED_OF_ALL: dict[str, Callable[[Image, Sequence[Snapshot]], object]] = {
    "space": exclusive_sizes,
    "strips": lambda image, snapshots: [
        strip.cells for strip in picture(image, snapshots, 16).strips[:-1]
    ],
}


@pytest.mark.parametrize("kind", ASKED_OF_ALL)
def test_one_of_many_deleted_between_any_two_reads(path: Path, monkeypatch, kind: str) -> None:
    """What is told of any of them is right, or nothing is: its clusters become others' tables and
    data, and whoever shared with it does so no more."""
    ask = ASKED_OF_ALL[kind]
    with running(path) as q, q.guest() as disk:
        for number in count():
            for n, name in enumerate(("old", "middle", "new")):
                disk.pwrite(block(0, n) * BLOCKS, n * BLOCK)
                q.take(name)
            disk.pwrite(b"!" * MiB, 0)
            seen: list[int] = []

            def delete() -> None:
                q.delete("middle")
                disk.pwrite(b"?" * MiB, 0)

            def this(length: int, offset: int, seen=seen, number=number) -> bool:
                seen.append(offset)
                return len(seen) > number

            with open_image(str(path)) as image:
                snapshots = image.snapshots
                right = ask(image, snapshots)
                with monkeypatch.context() as patch:
                    act(patch, delete, before=this)
                    with suppress(SnapshotGone):
                        assert ask(image, snapshots) == right, f"before read {number + 1}"
                        assert number >= len(seen) - 1
                if len(seen) > number:
                    with pytest.raises(SnapshotGone, match="snapshot .* 'middle' of .* was del"):
                        ask(image, snapshots)
            for name in ("old", "new") if len(seen) > number else ("old", "middle", "new"):
                q.delete(name)
            if len(seen) <= number:
                break
    assert number >= len(["L1 tables", "of", "each", "L2 tables", "header", "table"])


def test_a_list_is_made_anew_when_one_was_deleted_meanwhile(path: Path, monkeypatch) -> None:
    with running(path) as q, q.guest() as disk, open_image(str(path)) as image:
        for n, name in enumerate(("old", "middle", "new")):
            disk.pwrite(block(0, n) * BLOCKS, n * BLOCK)
            q.take(name)
        l1 = named(image.storage, "new").l1_table_offset
        act(monkeypatch, lambda: q.delete("middle"), after=lambda length, offset: offset == l1)
        table, sizes = image.of_all(partial(exclusive_sizes, image))
        assert [s.name for s in table.snapshots] == ["old", "new"]
        assert sizes == exclusive_sizes(image, image.snapshots)


# --- What looks like the served snapshot and is not ---


def test_deleted_and_taken_again_at_the_same_place(path: Path) -> None:
    """Header, place, ID, name and L1 offset all come back; the time does not."""
    rng = random.Random(4)
    with running(path) as q, opened(path) as storage:
        q.take("first")
        q.take("served")
        served = named(storage, "served")
        guard = watching(storage, served)
        for _ in range(200):
            q.delete("served")
            for n in range(rng.randrange(3)):
                q.take(f"other{n}")
                q.delete(f"other{n}")
            q.take("served")
            if place(named(storage, "served")) == place(served):
                break
        else:
            pytest.fail("it never came back to the same place")
        with pytest.raises(SnapshotGone):
            guard.confirm()


def test_an_old_entry_left_standing_behind_a_shorter_table(path: Path) -> None:
    """QEMU clears nothing behind a table: header and entry can be the old bytes, though the new
    table of as many entries ends before that entry."""
    with running(path) as q, opened(path) as storage:
        q.take("a long name" * 20)
        q.take("served")
        served = named(storage, "served")
        guard = watching(storage, served)
        fields, entry = read_fields(storage), damage.table_entry(path, served.entry_offset)
        q.delete("a long name" * 20)
        q.delete("served")
        for n in range(20):
            q.take(f"b{n}")
            q.take(f"c{n}")
            if read_fields(storage) == fields:
                break
            q.delete(f"b{n}")
            q.delete(f"c{n}")
        else:
            pytest.fail("the header never came back")
        assert damage.table_entry(path, served.entry_offset) == entry
        with pytest.raises(SnapshotGone):
            guard.confirm()


# --- What looks as if it were gone and is not ---


@pytest.mark.parametrize("half", ["count", "offset"])
@pytest.mark.parametrize("change", ["take", "delete"])
def test_a_header_half_old_and_half_new(path: Path, monkeypatch, half: str, change: str) -> None:
    """Its twelve bytes straddle two cache lines.  It looks whole twice in a row: the writer was
    held up between the halves."""
    for name in ("other", "served"):
        qemu.take(path, name)
    with opened(path) as storage:
        guard = watching(storage, named(storage, "served"))
        old = read_fields(storage)
        if change == "take":
            qemu.take(path, "third")
        else:
            qemu.delete(path, "other")
        new = read_fields(storage)
        torn = new[:4] + old[4:] if half == "count" else old[:4] + new[4:]
        qemu.patch(path, 60, torn)
        reads: list[int] = []

        def fourth(length: int, offset: int) -> bool:
            reads.append(offset)
            return reads.count(60) == 4

        with monkeypatch.context() as patch:
            act(patch, lambda: qemu.patch(path, 60, new), after=fourth)
            guard.confirm()
        assert reads.count(60) > 2, "the header was not looked at again"
        qemu.patch(path, 60, new)
        guard.confirm()


def test_the_old_table_is_zeros_while_the_header_is_old(path: Path, monkeypatch) -> None:
    """QEMU frees and discards it between our read of the header and that of the table."""
    with running(path, discard=True) as q, opened(path) as storage:
        q.take("served")
        served = named(storage, "served")
        guard = watching(storage, served)
        places = []

        def take() -> None:
            q.take("another")
            places.append(storage.read(40, served.entry_offset))

        with monkeypatch.context() as patch:
            act(patch, take, after=lambda *read: read == HEADER_FIELDS)
            guard.confirm()
        assert places == [bytes(40)]
        with monkeypatch.context() as patch:
            act(patch, lambda: q.delete("another"), after=lambda *read: read == HEADER_FIELDS)
            assert [s.name for s in read_table(storage).snapshots] == ["served"]


def test_an_old_entry_that_qemu_upgrades(tmp_path: Path) -> None:
    """It had no extra data; whenever the table is rewritten, QEMU gives it some."""
    path = qemu.create(tmp_path / "old.qcow2", MiB, compat="0.10")
    qemu.take(path, "served")
    with opened(path) as storage:
        real = named(storage, "served")
        old = Entry(b"1", b"served", real.l1_table_offset, real.l1_size, date=(5, 6))
        qemu.patch(path, real.entry_offset, old.pack())
        served = named(storage, "served")
        guard = watching(storage, served)
        with running(path) as q:
            q.take("another")
            guard.confirm()
            now = named(storage, "served")
            assert len(damage.table_entry(path, now.entry_offset)) > len(old.pack())
            q.delete("served")
            with pytest.raises(SnapshotGone):
                guard.confirm()


def test_a_flag_that_qemu_flips_in_place(path: Path) -> None:
    """COPIED, in the L2 entries of a snapshot that goes on living: when another with the same
    clusters is deleted, they are its own."""
    tables = []

    def look() -> None:
        l2 = qemu.field64(path, l1) & (1 << 63) - 1
        tables.append(qemu.peek(path, l2, 4 * 8))
        with open_image(str(path)) as image:
            assert image.snapshot("served").pread(2 * MiB, 0) == expected

    with running(path) as q, q.guest() as disk, opened(path) as storage:
        disk.pwrite(block(0, 1) * BLOCKS, 0)
        q.take("served")
        l1 = named(storage, "served").l1_table_offset
        expected = block(0, 1) * BLOCKS + bytes(2 * MiB - BLOCKS * BLOCK)
        with serve(file=path) as server, server.connect("served") as early:
            assert early.pread(BLOCK, 0) == expected[:BLOCK]
            look()
            q.take("second")
            disk.pwrite(b"!" * BLOCKS * BLOCK, 0)
            look()
            q.delete("second")
            look()
            assert early.pread(2 * MiB, 0) == expected
    changed = bytes(x ^ y for x, y in zip(tables[0], tables[-1], strict=True))
    assert changed == struct.pack(">Q", 1 << 63) * 4, "QEMU flipped nothing"


# --- What cannot be told ---


def test_a_table_that_stays_damaged_is_not_taken_for_a_deleted_snapshot(path: Path) -> None:
    """It may be repaired."""
    qemu.take(path, "served")
    with opened(path) as storage:
        guard = watching(storage, named(storage, "served"))
        fields = read_fields(storage)
        qemu.patch(path, 60, struct.pack(">IQ", 1, 1 << 40))
        with pytest.raises(ImageError, match="cannot tell whether snapshot 1 'served' .* is still"):
            guard.confirm()
        qemu.patch(path, 60, fields)
        guard.confirm()


def test_a_deleted_snapshot_is_gone_for_all_its_readers_and_for_good(path: Path) -> None:
    qemu.take(path, "served")
    whole = path.read_bytes()
    with opened(path) as storage:
        guard = watching(storage, named(storage, "served"))
        qemu.delete(path, "served")
        said: list[str] = []

        def ask() -> None:
            with pytest.raises(SnapshotGone) as caught:
                guard.confirm()
            said.append(str(caught.value))

        threads = [threading.Thread(target=ask) for _ in range(8)]
        for t in threads:
            t.start()
        for t in threads:
            t.join()
        qemu.patch(path, 0, whole)
        ask()
        assert len(said) == 9
        assert len(set(said)) == 1
