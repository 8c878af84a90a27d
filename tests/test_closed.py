"""A closed image refuses every use, and no descriptor number of it reads another file."""

from __future__ import annotations

import os
import threading

import pytest
from support.qemu import KiB, MiB, create, io, take

import qcow2snap_core

SIZE = 2 * MiB

USES = {
    "snapshots": lambda image, disk: image.snapshots,
    "snapshot": lambda image, disk: image.snapshot("s"),
    "data": lambda image, disk: disk.pread(512, 0),
    "data not read before": lambda image, disk: disk.pread(512, MiB),
    "zeros": lambda image, disk: disk.pread(512, SIZE - 512),
    "into a buffer": lambda image, disk: disk.pread_into(bytearray(9), 0),
    "extents": lambda image, disk: list(disk.extents(0, SIZE)),
    "a file object": lambda image, disk: disk.raw().read(10),
    "the active disk": lambda image, disk: image.active_disk().pread(512, SIZE - 512),
}


@pytest.fixture
def path(tmp_path):
    path = create(tmp_path / "disk", SIZE)
    io(path, "write -P 1 0 64k", "write -P 2 1M 64k")
    take(path, "s")
    return path


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("others", [0, 50], ids=["alone", "numbers taken again"])
def test_it_raises_value_error(path, tmp_path, use, others):
    (tmp_path / "other").write_bytes(path.read_bytes().replace(b"\1" * 512, b"\xee" * 512))
    image = qcow2snap_core.open(str(path))
    disk = image.snapshot("s")
    disk.pread(64 * KiB, 0)
    image.close()
    image.close()
    fds = [os.open(tmp_path / "other", os.O_RDONLY) for _ in range(others)]
    with pytest.raises(ValueError, match="closed image"):
        USES[use](image, disk)
    for fd in fds:
        os.close(fd)


def test_what_was_begun_before_is_refused_too(path):
    image = qcow2snap_core.open(str(path))
    extents = image.snapshot("s").extents(0, SIZE)
    raw = image.snapshot("s").raw()
    image.close()
    with pytest.raises(ValueError, match="closed image"):
        next(extents)
    with pytest.raises(ValueError, match="closed image"):
        raw.readall()


def test_the_number_is_given_back_when_nobody_can_use_it(path):
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(20):
        with qcow2snap_core.open(str(path)) as image:
            image.snapshot("s").pread(512, 0)
    del image
    assert len(os.listdir("/proc/self/fd")) == before


def test_readers_in_other_threads_never_see_another_file(path, tmp_path):
    """They read on while the image is closed, and files are opened in its place."""
    other = tmp_path / "other"
    other.write_bytes(b"\xee" * path.stat().st_size)
    for _ in range(30):
        image = qcow2snap_core.open(str(path))
        disk = image.snapshot("s")
        started = threading.Barrier(4)
        wrong = []

        def read(disk=disk, started=started, wrong=wrong):
            started.wait()
            while True:
                try:
                    data = disk.pread(4096, 0)
                except ValueError:
                    return
                if data != b"\1" * 4096:
                    wrong.append(data)

        threads = [threading.Thread(target=read) for _ in range(3)]
        for thread in threads:
            thread.start()
        started.wait()
        image.close()
        fds = [os.open(other, os.O_RDONLY) for _ in range(20)]
        for thread in threads:
            thread.join()
        for fd in fds:
            os.close(fd)
        assert wrong == []
