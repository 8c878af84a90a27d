"""A deleted snapshot gives nothing any more; what others do to the image concerns nobody."""

from __future__ import annotations

import os
import shutil
import struct
import threading
from itertools import count
from pathlib import Path

import pytest
from support.qemu import KiB, MiB, create, delete, field64, io, patch, run, snapshots, take
from support.tables import Entry

from qcow2snap_core import ImageError, SnapshotGone
from qcow2snap_core.format import ondisk as q
from qcow2snap_core.image import guard
from qcow2snap_core.image.opener import open_image

# What the served snapshot holds, 64 KiB each.
DATA, COMPRESSED, ZERO, HOLE = 0, 64 * KiB, 128 * KiB, 192 * KiB
EXPECTED = {DATA: 1, COMPRESSED: 2, ZERO: 0, HOLE: 0}


@pytest.fixture(scope="module", params=["0.10", "1.1"])
def original(tmp_path_factory, request):
    """An image with the snapshots "before", "served" and "after"."""
    path = create(tmp_path_factory.mktemp("guard") / "disk.qcow2", MiB, compat=request.param)
    take(path, "before")
    zeros = [] if request.param == "0.10" else ["write -z 128k 64k"]
    io(path, "write -P 1 0 64k", "write -c -P 2 64k 64k", *zeros)
    take(path, "served")
    io(path, "write -P 3 0 256k")
    take(path, "after")
    return path


@pytest.fixture
def path(tmp_path, original):
    return Path(shutil.copy(original, tmp_path))


@pytest.fixture
def disk(path):
    with open_image(str(path)) as image:
        yield image.snapshot("served")


def assert_served(disk):
    for offset, byte in EXPECTED.items():
        assert disk.pread(512, offset) == bytes([byte]) * 512
    assert sum(e.length for e in disk.extents(0, MiB)) == MiB


def assert_gone(disk):
    for offset in EXPECTED:
        with pytest.raises(SnapshotGone, match="snapshot 2 'served' of 20.* was deleted from '/"):
            disk.pread(512, offset)
        with pytest.raises(SnapshotGone):
            next(disk.extents(offset, 512))
    with pytest.raises(SnapshotGone):
        disk.confirm()


@pytest.mark.parametrize("cached", [False, True])
def test_nothing_of_a_deleted_snapshot_is_served(path, disk, cached):
    """Nor what is in the caches: tables and decoded clusters."""
    if cached:
        assert_served(disk)
    delete(path, "served")
    assert_gone(disk)
    assert_gone(disk)


def test_a_deleted_snapshot_stays_gone_when_its_clusters_are_used_again(path, disk):
    assert_served(disk)
    delete(path, "served")
    io(path, "write -P 9 256k 512k")
    assert_gone(disk)


def test_the_last_snapshot_can_be_deleted_too(path, disk):
    for name in ("before", "after", "served"):
        delete(path, name)
    assert_gone(disk)


@pytest.mark.parametrize("between", [0, 1])
def test_one_taken_again_under_its_name_is_another(path, disk, between):
    assert_served(disk)
    delete(path, "after")
    delete(path, "served")
    for n in range(between):
        take(path, f"between {n}")
    take(path, "served")
    assert "served" in snapshots(path)
    assert_gone(disk)


def test_one_that_differs_in_its_time_alone_is_another(path, disk):
    """Count, offset, ID, name, clusters: all the same, as happens in every fourth try."""
    offset = snapshots(path)["served"].entry_offset
    assert_served(disk)
    nsec = field64(path, offset + 16) & 0xFFFFFFFF
    patch(path, offset + 20, struct.pack(">I", nsec ^ 1))
    assert_gone(disk)


@pytest.mark.parametrize("others", [["before"], ["after"], ["before", "after"]])
def test_other_snapshots_may_go(path, disk, others):
    for name in others:
        delete(path, name)
        assert_served(disk)


def test_other_snapshots_may_come_and_go(path, disk):
    for n in range(5):
        take(path, f"new {n}")
        assert_served(disk)
        delete(path, "before" if n == 0 else f"new {n - 1}")
        assert_served(disk)


def test_another_may_take_its_name(path, disk):
    take(path, "served")
    assert_served(disk)


def test_the_active_disk_may_change(path, disk):
    io(path, "write -P 5 0 1M", "discard 0 128k")
    assert_served(disk)
    if run("qemu-img", "info", "-U", path).count("compat: 1.1"):
        run("qemu-img", "resize", "-q", "-f", "qcow2", path, "2M")
        assert_served(disk)


def test_qemu_may_revert_to_it(path, disk):
    """Which flips the COPIED bits of its tables."""
    run("qemu-img", "snapshot", "-a", "served", path)
    assert_served(disk)
    io(path, "write -P 8 0 256k")
    assert_served(disk)


def test_an_old_entry_may_get_more_extra_data(tmp_path):
    """QEMU adds what is missing when it rewrites the table."""
    path = create(tmp_path / "disk.qcow2", MiB, compat="0.10")
    io(path, "write -P 1 0 64k")
    take(path, "served")
    real = snapshots(path)["served"]
    old = Entry(b"2", b"served", real.l1_table_offset, real.l1_size)
    patch(path, real.entry_offset, old.pack())
    with open_image(str(path)) as image:
        disk = image.snapshot("served")
        before = snapshots(path)["served"].entry_length
        assert disk.pread(512, 0) == b"\1" * 512
        take(path, "another")
        assert snapshots(path)["served"].entry_length > before
        assert disk.pread(512, 0) == b"\1" * 512
        delete(path, "served")
        with pytest.raises(SnapshotGone):
            disk.pread(512, 0)


@pytest.mark.parametrize("fields", [bytes(12), struct.pack(">IQ", 3, 1 << 40), b"\xff" * 12])
def test_a_header_that_is_whole_again_is_believed_again(path, disk, fields):
    """A damaged table is not a deleted snapshot; one that lists none is."""
    whole = path.read_bytes()[60:72]
    patch(path, 60, fields)
    with pytest.raises(ImageError) as caught:
        disk.pread(512, 0)
    assert isinstance(caught.value, SnapshotGone) == (fields == bytes(12))
    patch(path, 60, whole)
    if fields == bytes(12):
        assert_gone(disk)
    else:
        assert "cannot tell whether snapshot 2 'served'" in str(caught.value)
        assert_served(disk)


def test_damage_behind_its_entry_does_not_matter(path, disk):
    patch(path, snapshots(path)["after"].entry_offset + 36, b"\xff" * 4)
    assert_served(disk)


def test_a_truncated_file_is_an_error_and_nothing_worse(path, disk):
    assert_served(disk)
    for length in (64 * KiB, 100, 62, 0):
        os.truncate(path, length)
        with pytest.raises(ImageError):
            disk.pread(512, DATA)
        with pytest.raises(ImageError):
            list(disk.extents(0, MiB))


class Looks:
    """How often the header's fields are read: twice for each look at the table."""

    def __init__(self, image):
        self.count = 0
        read = image.storage.read

        def counted(length, offset):
            if offset == q.SNAPSHOT_FIELDS_OFFSET:
                self.count += 1
            return read(length, offset)

        image.storage.read = counted

    def of(self, action):
        before = self.count
        action()
        return self.count - before


def fails(disk, offset=0):
    with pytest.raises(ImageError, match="cannot tell whether snapshot 2 'served'"):
        disk.pread(512, offset)


DAMAGES = {
    "in the header": lambda path: os.truncate(path, 62),
    "before the table": lambda path: os.truncate(path, 64 * KiB),
    "inside the table": lambda path: os.truncate(path, snapshots(path)["served"].entry_offset + 9),
    "an entry": lambda path: patch(path, snapshots(path)["before"].entry_offset + 36, b"\xff"),
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_a_damage_that_lasts_is_waited_for_once(path, kind):
    """It may be a table that QEMU is writing; one that is the same again is not."""
    whole = path.read_bytes()
    with open_image(str(path)) as image:
        disk = image.snapshot("served")
        assert_served(disk)
        looks = Looks(image)
        DAMAGES[kind](path)
        assert looks.of(lambda: fails(disk)) > 20
        assert looks.of(lambda: [fails(disk, at) for at in EXPECTED]) == 2 * len(EXPECTED)
        path.write_bytes(whole)
        assert_served(disk)
        patch(path, 60, b"\xff" * 12)  # another damage
        assert looks.of(lambda: fails(disk)) > 20
        assert looks.of(lambda: fails(disk)) == 2
        path.write_bytes(whole)
        delete(path, "served")
        assert_gone(disk)


def test_readers_of_a_damaged_image_wait_for_it_together(path):
    with (
        open_image(str(path)) as image,
        open_image(str(path)) as other,
    ):
        disk, lonely = image.snapshot("served"), other.snapshot("served")
        looks = Looks(image)
        os.truncate(path, 64 * KiB)
        alone = Looks(other).of(lambda: fails(lonely))
        readers = [threading.Thread(target=fails, args=(disk,)) for _ in range(8)]
        for reader in readers:
            reader.start()
        for reader in readers:
            reader.join()
        assert looks.count <= alone + 2 * 7


def test_a_file_replaced_by_rename_goes_on_being_served(path, disk):
    other = create(path.with_name("other.qcow2"), MiB)
    os.replace(other, path)
    assert_served(disk)


def test_the_reason_for_a_failed_read_is_that_the_snapshot_is_gone(path, disk):
    """Where its tables were, there may be anything now."""
    l1 = snapshots(path)["served"].l1_table_offset
    delete(path, "served")
    patch(path, l1, b"\xff" * 64)
    assert_gone(disk)


def test_an_image_lists_what_there_is_now(path):
    with open_image(str(path)) as image:
        take(path, "new")
        assert image.snapshot("new").pread(512, 0) == b"\3" * 512
        delete(path, "new")
        assert "new" not in [s.name for s in image.snapshots]


def test_many_readers_are_served_while_snapshots_come_and_go(path, disk):
    failures, stop = [], threading.Event()

    def read():
        try:
            while not stop.is_set():
                assert_served(disk)
        except BaseException as e:  # noqa: BLE001 (handed over to the test)
            failures.append(e)

    readers = [threading.Thread(target=read) for _ in range(4)]
    for reader in readers:
        reader.start()
    for n in range(8):
        take(path, f"new {n}")
        delete(path, f"new {n}")
    stop.set()
    for reader in readers:
        reader.join()
    assert not failures


def test_a_header_that_never_stands_still_is_an_error_in_the_end(path, monkeypatch):
    """A remote server may make one, if no QEMU does; nobody hangs, in the guard or in a list."""
    monkeypatch.setattr(guard, "_PAUSE", 0)
    with open_image(str(path)) as image:
        disk = image.snapshot("served")
        assert_served(disk)
        read, turn = image.storage.read, count()

        def changing(length, offset):
            data = read(length, offset)
            if offset == q.SNAPSHOT_FIELDS_OFFSET:
                return struct.pack(">I", 3 + next(turn) % 2) + data[4:]
            return data

        image.storage.read = changing
        delete(path, "after")  # the guard has to look again
        with pytest.raises(ImageError, match="is still in '.*': the table never settles"):
            disk.pread(512, DATA)
        with pytest.raises(ImageError, match="the snapshot table changes too fast to be read"):
            image.table()
