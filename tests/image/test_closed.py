"""What is closed is closed: ValueError, and never bytes of the file that came after it."""

from __future__ import annotations

import gc
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support import qemu
from support.devices import loop_device
from support.qemu import KiB, MiB
from support.remote import remote
from support.server import ROOT

from qcow2snap_core.image.disk import Disk
from qcow2snap_core.image.image import Image
from qcow2snap_core.image.opener import Options, open_image
from qcow2snap_core.storage.local import open_storage
from qcow2snap_core.storage.locks import LockGuard

SIZE = 4 * MiB
OURS, THEIRS = b"\x07", b"\xee"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """The first half of it is data, in the snapshot and in a backing file."""
    base = qemu.create(tmp_path / "base.qcow2", SIZE)
    qemu.io(base, f"write -P 7 1M {MiB}")
    path = qemu.create(tmp_path / "disk.qcow2", None, backing=(base, "qcow2"))
    qemu.io(path, f"write -P 7 0 {MiB}", f"write -z 3M {MiB}")
    qemu.take(path, "s")
    return path


@pytest.fixture(params=["file", "device", "remote"])
def opened(request: pytest.FixtureRequest, path: Path, tmp_path: Path) -> Iterator[Image]:
    """The same image in every kind of storage."""
    if request.param == "file":
        yield open_image(str(path))
    elif request.param == "device":
        (tmp_path / "device").mkdir()
        with loop_device(tmp_path / "device", path.read_bytes().ljust(8 * MiB, b"\0")) as device:
            yield open_image(str(device), Options(allow_dirs=["/"]))
    else:
        with remote("file", path) as server:
            yield open_image(server.uri, Options(allow_dirs=["/"]))


# Each gets the image and the disk that were open, and what was made of them before the end.
CALLS: dict[str, Callable[[Image, Disk, dict[str, Any]], object]] = {
    "snapshots": lambda image, disk, had: image.snapshots,
    "table": lambda image, disk, had: image.table(),
    "snapshot": lambda image, disk, had: image.snapshot("s"),
    "disk": lambda image, disk, had: image.disk(had["entry"]),
    "vm state": lambda image, disk, had: image.disk(had["entry"], vm_state=True),
    "active_disk": lambda image, disk, had: image.active_disk(),
    "files": lambda image, disk, had: image.files,
    "each file": lambda image, disk, had: had["files"][-1].size(),
    "each file's bytes": lambda image, disk, had: had["files"][-1].read(1, 0),
    "each file's holes": lambda image, disk, had: list(had["base"].holes(0, SIZE)),
    "chain": lambda image, disk, had: image.chain,
    "with": lambda image, disk, had: image.__enter__(),
    "pread": lambda image, disk, had: disk.pread(4096, 0),
    "pread of zeros": lambda image, disk, had: disk.pread(512, 3 * MiB),
    "pread of nothing": lambda image, disk, had: disk.pread(0, 0),
    "pread of a backing file": lambda image, disk, had: disk.pread(512, MiB),
    "pread_into": lambda image, disk, had: disk.pread_into(bytearray(512), 0),
    "extents": lambda image, disk, had: next(disk.extents(0, SIZE)),
    "extents under way": lambda image, disk, had: next(had["extents"]),
    "check": lambda image, disk, had: disk.confirm(),
    "raw": lambda image, disk, had: disk.raw().read(1),
    "raw.read": lambda image, disk, had: had["raw"].read(1),
    "raw.readall": lambda image, disk, had: had["raw"].readall(),
    "raw.seek": lambda image, disk, had: had["raw"].seek(0),
    "raw.tell": lambda image, disk, had: had["raw"].tell(),
    "the active disk's pread": lambda image, disk, had: had["active"].pread(512, 0),
    "the active disk's zeros": lambda image, disk, had: had["active"].pread(512, 3 * MiB),
    "the active disk's extents": lambda image, disk, had: next(had["active"].extents(0, SIZE)),
    "a quiet disk's zeros": lambda image, disk, had: had["quiet"].pread(512, 3 * MiB),
}


def test_all_that_can_be_called_raises_value_error(opened: Image) -> None:
    disk = opened.snapshot("s")
    had = {
        "entry": opened.snapshots[0],
        "files": opened.files,
        "base": open_storage(opened.files[-1].path),
        "extents": disk.extents(0, SIZE),
        "raw": disk.raw(),
        "active": opened.active_disk(),
        "quiet": opened.active_disk(LockGuard(opened.files)),
    }
    next(had["extents"])
    assert had["raw"].read(2) == OURS * 2
    for name in ("active", "quiet"):  # so that the tables are in the cache
        assert had[name].pread(512, 0) + had[name].pread(512, 3 * MiB) == OURS * 512 + bytes(512)
    opened.close()
    had["base"].close()
    for name, call in CALLS.items():
        with pytest.raises(ValueError, match=r"I/O operation on closed image '.*'"):
            pytest.fail(f"{name}: {call(opened, disk, had)!r}")
    opened.close()  # a second time is none


def look_alike(path: Path, of: Path) -> Path:
    """The same image with other data in every cluster: a guard that reads it finds its snapshot."""
    shutil.copy(of, path)
    content = bytearray(path.read_bytes())
    path.write_bytes(content.replace(OURS * 64 * KiB, THEIRS * 64 * KiB))
    return path


def read_until_closed(image: Image, read: Callable[[], bytes], others: list[Path]) -> set[bytes]:
    """What several threads read while the image is closed and many other files are opened."""
    found: set[bytes] = set()
    ended: list[type[BaseException]] = []
    going = threading.Barrier(5)

    def work() -> None:
        going.wait()
        try:
            while True:
                found.add(read())
        except BaseException as e:  # noqa: BLE001 (any other than ValueError is the finding)
            ended.append(type(e))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    going.wait()
    while not found and not ended:
        pass
    image.close()
    fds = [os.open(other, os.O_RDONLY) for other in others * 20]
    for thread in threads:
        thread.join(60)
    for fd in fds:
        os.close(fd)
    assert ended == [ValueError] * 4
    return found


@pytest.mark.parametrize("which", ["snapshot", "active"])
def test_no_byte_of_the_next_file_below_concurrent_reads(
    path: Path, tmp_path: Path, which: str
) -> None:
    others = [look_alike(tmp_path / p.name.upper(), p) for p in (path, tmp_path / "base.qcow2")]
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)  # as many moments as there can be
    try:
        for _ in range(50):
            image = open_image(str(path))
            disk = image.snapshot("s") if which == "snapshot" else image.active_disk()
            read = lambda disk=disk: disk.pread(8, 64) + disk.pread(8, MiB)  # noqa: E731
            assert read_until_closed(image, read, others) == {OURS * 16}
    finally:
        sys.setswitchinterval(before)


def test_reads_of_a_remote_file_under_way_end_too(path: Path) -> None:
    with remote("--filter=delay", "file", path, "delay-read=5ms") as server:
        image = open_image(server.uri, Options(allow_dirs=["/"]))
        disk = image.active_disk()
        assert read_until_closed(image, lambda: disk.pread(8, 64), []) == {OURS * 8}


def test_the_number_is_given_back_in_the_end(path: Path) -> None:
    open_image(str(path)).close()  # what is opened once for all
    gc.collect()  # what earlier tests have left
    before = sorted(os.listdir("/proc/self/fd"))
    for _ in range(3):
        with open_image(str(path)) as image:
            disk = image.snapshot("s")
        assert sorted(os.listdir("/proc/self/fd")) != before  # it is still taken
        numbers = set(os.listdir("/proc/self/fd")) - set(before)
        assert not any(
            os.get_inheritable(int(n)) for n in numbers if os.path.exists(f"/proc/self/fd/{n}")
        )
        del image, disk
        gc.collect()
        assert sorted(os.listdir("/proc/self/fd")) == before


def test_closing_needs_no_further_descriptor(path: Path) -> None:
    """At the limit of open files there is none to be had."""
    script = f"""
import os, resource, qcow2snap_core
image = qcow2snap_core.open({str(path)!r})
disk = image.snapshot("s")
resource.setrlimit(resource.RLIMIT_NOFILE, (20, 20))
try:
    while os.open("/dev/null", os.O_RDONLY): pass
except OSError:
    image.close()
try:
    disk.pread(1, 0)
except ValueError as e:
    print(e)
"""
    said = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert "closed image" in said.stdout
