"""What images, snapshots and disks say of themselves, held against QEMU's tools."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from support import qemu
from support.qemu import KiB, MiB
from support.server import ROOT
from support.tables import Entry, write_table
from support.vm import machine

import qcow2snap_core
from qcow2snap_core import Disk, Image, SnapshotGone, UsageError

SIZE = 4 * MiB


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = qemu.create(tmp_path / "disk.qcow2", SIZE)
    qemu.io(path, "write -P 7 0 1M", "write -z 3M 1M")
    qemu.take(path, "one")
    qemu.io(path, "write -P 8 1M 64k", "write -P 8 2560k 64k")
    qemu.take(path, "two")
    qemu.io(path, "write -P 9 2M 64k")
    return path


@pytest.fixture
def image(path: Path) -> Iterator[Image]:
    with qcow2snap_core.open(path) as opened:
        yield opened


def test_snapshots_are_those_of_qemu_img_info(path: Path, image: Image) -> None:
    for snapshot, listed in zip(image.snapshots, qemu.info(path)["snapshots"], strict=True):
        taken = datetime.fromtimestamp(listed["date-sec"], UTC)
        assert snapshot.date == taken + timedelta(microseconds=listed["date-nsec"] // 1000)
        assert snapshot.date.utcoffset() == timedelta(0)
        clock = listed["vm-clock-sec"] * 10**9 + listed["vm-clock-nsec"]
        found = (snapshot.id, snapshot.name, snapshot.vm_state_size, snapshot.vm_clock_nsec)
        assert found == (listed["id"], listed["name"], listed["vm-state-size"], clock)
        assert (snapshot.disk_size, snapshot.icount) == (SIZE, listed.get("icount"))


@pytest.mark.parametrize("sec", [0, 0x7FFFFFFF, 0xFFFFFFFF])
def test_any_date_that_an_image_has_is_one(path: Path, sec: int) -> None:
    write_table(path, [Entry(b"1", b"odd", 0, 0, date=(sec, 0xFFFFFFFF))])
    with qcow2snap_core.open(path) as image:
        (snapshot,) = image.snapshots
        assert snapshot.date == datetime(1970, 1, 1, tzinfo=UTC) + timedelta(
            seconds=sec, microseconds=0xFFFFFFFF // 1000
        )


def test_equal_is_what_is_the_same_entry(path: Path, image: Image) -> None:
    one, two = image.snapshots
    assert one == image.find("one") == image.open("one").snapshot
    assert {one: 1, two: 2}[image.find("2")] == 2
    assert one != two
    assert one != "one"
    qemu.delete(path, "two")
    qemu.take(path, "two")
    again = image.find("two")
    assert (again.id, again.name) == (two.id, two.name)
    assert again != two


def test_a_snapshot_that_was_deleted_is_not_opened(path: Path, image: Image) -> None:
    one = image.find("one")
    qemu.delete(path, "one")
    qemu.take(path, "one")
    with pytest.raises(SnapshotGone, match="snapshot 1 'one' .* was deleted"):
        image.open(one)
    assert image.open("one").snapshot != one


def test_what_is_open_cannot_be_pickled_but_a_snapshot_can(path: Path, image: Image) -> None:
    """Which is all that another process needs, to open it there."""
    for thing in (image, image.open("one")):
        for how in (pickle.dumps, copy.copy, copy.deepcopy):
            with pytest.raises(TypeError, match="cannot be pickled or copied: .*open"):
                how(thing)
    with qcow2snap_core.open(path) as other:
        one = pickle.loads(pickle.dumps(image.find("one")))
        assert other.open(one).pread(1, 0) == b"\7"


def test_a_snapshot_that_is_not_in_the_image_is_gone_and_not_damaged(
    image: Image, tmp_path: Path
) -> None:
    """There its L1 table would lie behind the end of the file."""
    small = qemu.create(tmp_path / "small.qcow2", SIZE)
    qemu.take(small, "one")
    with qcow2snap_core.open(small) as other, pytest.raises(SnapshotGone, match="2 'two'"):
        other.open(image.find("two"))


def test_an_id_comes_before_a_name(path: Path, image: Image) -> None:
    qemu.take(path, "1")
    assert [image.find(x).name for x in ("1", "3", "two")] == ["one", "1", "two"]
    with pytest.raises(UsageError, match=r"no snapshot '4' in .*: it has 1 'one', 2 'two', 3 '1'"):
        image.find("4")


def test_names_stay_on_the_line_of_a_repr(path: Path) -> None:
    write_table(path, [Entry(b"1\n", b"a\nb", 0, 0, date=(0, 0))])
    with qcow2snap_core.open(path) as image:
        (snapshot,) = image.snapshots
        assert repr(snapshot) == r"<Snapshot 1\n 'a\nb' of 1970-01-01 00:00:00+00:00>"


def test_reprs(path: Path, image: Image, monkeypatch: pytest.MonkeyPatch) -> None:
    where = str(path)
    one = image.find("one")
    assert repr(one) == f"<Snapshot 1 'one' of {one.date}>"
    assert repr(image) == f"<Image '{where}'>"
    named = f"snapshot 'one' (ID 1) of '{where}'"
    assert repr(image.open(one)) == f"<Disk: {named}, {SIZE} bytes>"
    assert repr(image.open(one, vm_state=True)) == f"<Disk: VM state of {named}, 0 bytes>"
    active = image.active()
    assert repr(active) == f"<Disk: active disk of '{where}', {SIZE} bytes>"
    assert repr(next(active.extents())) == "Extent(offset=0, length=1114112, type=0)"
    image.close()
    assert repr(image) == f"<Image '{where}', closed>"
    assert repr(active) == f"<Disk: active disk of '{where}', {SIZE} bytes>"


@pytest.mark.parametrize("name", ["one", "two", None])
def test_bytes_and_extents_are_those_of_qemu(path: Path, image: Image, name: str | None) -> None:
    disk = image.active() if name is None else image.open(name)
    assert disk.pread(SIZE, 0) == qemu.content(path, name)
    buffer = bytearray(SIZE)
    disk.pread_into(buffer, 0)
    assert buffer == qemu.content(path, name) == disk.raw().read(SIZE)
    extents = list(disk.extents())
    assert extents == qemu.extents(path if name is None else qemu.as_active(path, name))
    for extent in extents:
        assert (extent.is_hole, extent.is_zero) == ((extent.type == 3,) * 2)
    inside = list(disk.extents(512, MiB))
    assert (inside[0].offset, sum(e.length for e in inside)) == (512, MiB)


def test_extents_are_complete_however_many_there_are(tmp_path: Path) -> None:
    """An answer to an NBD client ends after 32,768 look-ups."""
    count = 40_000
    raw = tmp_path / "raw"
    raw.write_bytes((b"\7" * 512 + bytes(512)) * (count // 2))
    path = tmp_path / "disk.qcow2"
    options = ["-S", "512", "-O", "qcow2", "-o", "cluster_size=512"]
    qemu.run("qemu-img", "convert", "-f", "raw", *options, raw, path)
    qemu.take(path, "s")
    with qcow2snap_core.open(path) as image:
        extents = list(image.open("s").extents())
    assert extents == [(at * 512, 512, 3 if at % 2 else 0) for at in range(count)]


def test_the_active_disk_is_refused_while_a_qemu_writes(path: Path, image: Image) -> None:
    before = image.active()
    with machine(path):
        for read in (image.active, lambda: before.pread(1, 0), lambda: list(before.extents())):
            with pytest.raises(UsageError, match="is in use, a QEMU has it open for writing"):
                read()
        assert image.open("one").pread(1, 0) == b"\7"
    assert before.pread(1, 2 * MiB) == b"\x09"


def test_what_is_closed_raises_value_error(path: Path) -> None:
    image = qcow2snap_core.open(path)
    one, two, active = image.find("one"), image.open("two"), image.active()
    disk = image.open(one)
    under_way, changes = disk.extents(), qcow2snap_core.changes(disk, two)
    next(under_way)
    next(changes)
    raw = disk.raw()
    image.close()
    image.close()
    calls: list[Callable[[], object]] = [
        lambda: image.snapshots,
        lambda: image.find("one"),
        lambda: image.open(one),
        lambda: image.snapshot("one"),
        lambda: image.active(),
        lambda: image.__enter__(),
        lambda: disk.pread(1, 0),
        lambda: disk.pread(1, 3 * MiB),
        lambda: disk.pread_into(bytearray(1), 0),
        lambda: disk.extents(),
        lambda: next(under_way),
        lambda: disk.raw().read(1),
        lambda: raw.read(1),
        lambda: active.pread(1, 0),
        lambda: next(changes),
        lambda: list(qcow2snap_core.changes(disk, two)),
        lambda: qcow2snap_core.exclusive_sizes(image),
        lambda: qcow2snap_core.check(image),
        lambda: qcow2snap_core.copy(disk, path.with_name("out")),
        lambda: qcow2snap_core.split(image, path.with_name("out")),
        lambda: qcow2snap_core.join(image, path.with_name("out")),
    ]
    for call in calls:
        with pytest.raises(ValueError, match=r"I/O operation on closed image '.*'"):
            call()
    assert (one.name, disk.size, disk.snapshot) == ("one", SIZE, one)
    assert not path.with_name("out").exists()


def test_threads_read_the_disk_s_bytes_or_learn_that_it_was_closed(path: Path) -> None:
    """While others of its readers go on, and files are opened that take the closed one's number."""
    other = qemu.create(path.with_name("other.qcow2"), SIZE)
    qemu.io(other, "write -P 0xee 0 4M")
    expected = {b"\7" * 4096, bytes(4096)}
    calls: list[Callable[[Disk], bytes]] = [
        lambda disk: disk.pread(4096, 64 * KiB),
        lambda disk: disk.pread(4096, 3 * MiB),
        lambda disk: disk.raw().read(4096),
    ]
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)  # as many moments as there can be
    try:
        for _ in range(30):
            image = qcow2snap_core.open(path)
            found, ended = read_until_closed(image, image.open("one"), calls, other)
            assert found == expected
            assert ended == [ValueError] * len(calls)
    finally:
        sys.setswitchinterval(before)


def read_until_closed(
    image: Image, disk: Disk, calls: list[Callable[[Disk], bytes]], other: Path
) -> tuple[set[bytes], list[type[BaseException]]]:
    """What each call has returned, in a thread for each, and how that ended."""
    found: set[bytes] = set()
    ended: list[type[BaseException]] = []
    have_read = [threading.Event() for _ in calls]

    def work(call: Callable[[Disk], bytes], has_read: threading.Event) -> None:
        try:
            while True:
                found.add(call(disk))
                has_read.set()
        except BaseException as e:  # noqa: BLE001 (any other than ValueError is the finding)
            ended.append(type(e))
            has_read.set()

    threads = [threading.Thread(target=work, args=x) for x in zip(calls, have_read, strict=True)]
    for thread in threads:
        thread.start()
    for event in have_read:
        assert event.wait(60)
    image.close()
    files = [other.open("rb") for _ in range(20)]
    for thread in threads:
        thread.join(60)
    for file in files:
        file.close()
    return found, ended


def test_an_image_that_nobody_closed_is_let_go(path: Path) -> None:
    program = (
        "import gc, os, qcow2snap_core\n"
        f"qcow2snap_core.open({str(path)!r}).close()\n"
        "before = os.listdir('/proc/self/fd')\n"
        f"disk = qcow2snap_core.open({str(path)!r}).open('one')\n"
        "assert disk.pread(1, 0) == b'\\7'\n"  # which keeps it open
        "del disk; gc.collect()\n"
        "assert os.listdir('/proc/self/fd') == before\n"
    )
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True)
