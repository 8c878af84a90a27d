"""A block device that a running QEMU writes past the page cache, as it does on LVM."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import nbd
import pytest
from support import qemu
from support.devices import loop_device
from support.guest import BLOCK, Guest, Life, Reader
from support.live import CACHE_MODES, running
from support.qemu import MiB
from support.server import Server, serve

BLOCKS = 4 * MiB // BLOCK
ROUNDS = 5


@pytest.fixture(params=[512, 4096], ids=["512", "4k"])
def device(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Path]:
    with loop_device(tmp_path, bytes(64 * MiB), request.param) as device:
        qemu.run("qemu-img", "create", "-q", "-f", "qcow2", device, BLOCKS * BLOCK)
        yield device


def flags_of(server: Server, device: Path) -> list[int]:
    """With which flags nbdkit has the device open."""
    process = Path(f"/proc/{server.pid}")
    return [
        int(line.split()[1], 8)
        for fd in (process / "fd").iterdir()
        if os.path.realpath(fd) == str(device)
        for line in (process / "fdinfo" / fd.name).read_text().splitlines()
        if line.startswith("flags:")
    ]


@pytest.mark.parametrize("cache", CACHE_MODES)
def test_a_snapshot_on_a_device_deleted_under_load(device: Path, cache: str) -> None:
    with (
        serve(file=device) as server,
        running(device, cache) as q,
        q.guest() as disk,
    ):
        assert [bool(f & os.O_DIRECT) for f in flags_of(server, device)] == [True]
        guest = Guest(BLOCKS)
        guest.write_all(disk, BLOCKS)
        kept = Reader(lambda: server.connect("keep"), guest.take(q, "keep"), Life(), 1, False)
        for number in range(ROUNDS):
            guest.write_all(disk, BLOCKS)
            life = Life()
            expected = guest.take(q, "served")
            guest.write_all(disk, BLOCKS // 3)
            reader = Reader(lambda: server.connect("served"), expected, life, number, False)
            reader.wait(reads=5)
            life.end(lambda: q.delete("served"))
            guest.write_all(disk, BLOCKS)
            reader.wait(failed=3)
            assert reader.finish().bad == {}
        tally = kept.finish()
        assert tally.bad == {}
        assert tally.failed == 0


def test_nothing_comes_from_the_page_cache(device: Path) -> None:
    """The cache is made stale on purpose: the file behind the loop device is changed instead."""
    old, new = b"old!" * (BLOCK // 4), b"new!" * (BLOCK // 4)
    with running(device, "none") as q, q.guest() as disk:
        disk.pwrite(old, 0)
        q.take("served")
    backing = Path(Path(f"/sys/block/{device.name}/loop/backing_file").read_text().strip())
    with (
        open(device, "rb", buffering=0) as cached,
        serve(file=device, snapshot="served") as server,
        server.connect() as handle,
    ):
        host = cached.read(64 * MiB).index(old)
        assert handle.pread(BLOCK, 0) == old
        qemu.patch(backing, host, new)
        assert os.pread(cached.fileno(), BLOCK, host) == old, "the cache is not stale"
        assert handle.pread(BLOCK, 0) == new
        qemu.patch(backing, 60, bytes(12))  # no snapshot any more: the guard sees it
        assert os.pread(cached.fileno(), 12, 60) != bytes(12), "the cache is not stale"
        with pytest.raises(nbd.Error):
            handle.pread(BLOCK, 0)
