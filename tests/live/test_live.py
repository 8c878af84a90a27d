"""Snapshots read while a running QEMU writes, takes and deletes them: every byte is verified.

The short length is part of ``make test``; ``make test-live`` runs the same code for minutes.
"""

from __future__ import annotations

import errno
import os
import random
import threading
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import nbd
import pytest
from support import qemu, secret
from support.guest import BLOCK, Expected, Guest, Life, Reader, Salvo, Tally, block
from support.live import Qemu, running, stopped
from support.qemu import KiB, MiB
from support.server import Server, block_status, serve

LONG = os.environ.get("QCOW2SNAP_LIVE") == "long"
SECONDS = 60 if LONG else 3
ROUNDS = 100 if LONG else 4
KILLS = 20 if LONG else 2

BLOCKS = 8 * MiB // BLOCK
WRITTEN = 7 * MiB // BLOCK  # what lies behind is a hole for ever
HOLE = 7 * MiB


class Shape(NamedTuple):
    """How QEMU has the file open, and what the image is like."""

    cache: str
    options: dict[str, Any]
    compressed: bool = False
    discard: bool = False
    secrets: secret.Secrets = ()

    def make(self, path: Path) -> Guest:
        """The image; compressed, it begins as one that qemu-img compressed."""
        if self.secrets:
            secret.create(path, BLOCKS * BLOCK, self.secrets, **self.options)
            return Guest(BLOCKS)
        if not self.compressed:
            qemu.create(path, BLOCKS * BLOCK, **self.options)
            return Guest(BLOCKS)
        raw = path.with_suffix(".raw")
        raw.write_bytes(b"".join(block(n, 1) for n in range(BLOCKS)))
        qemu.run("qemu-img", "convert", "-c", "-f", "raw", "-O", "qcow2", raw, path)
        return Guest(BLOCKS, 1)

    def run(self, path: Path) -> Any:
        return running(path, self.cache, discard=self.discard, secrets=self.secrets)

    def img(self, path: Path, command: str, *arguments: str) -> None:
        """qemu-img, while nothing else has the image open."""
        given = secret.opened(path, self.secrets) if self.secrets else [path]
        qemu.run("qemu-img", command, *secret.objects(self.secrets), *arguments, *given)

    def serve(self, path: Path) -> AbstractContextManager[Server]:
        keys = {"passphrase": self.secrets[0]} if self.secrets else {}
        return serve(file=path, **keys)


SHAPES = {
    "writeback": Shape("writeback", {}),
    "none": Shape("none", {"cluster_size": 4 * KiB}, discard=True),
    "compressed": Shape("none", {}, compressed=True),
    "subclusters": Shape("writeback", {"extended_l2": "on"}, discard=True),
    "encrypted": Shape("none", {"encrypt.format": "luks"}, discard=True, secrets=("open sesame",)),
}


@pytest.fixture(params=SHAPES)
def shape(request: pytest.FixtureRequest) -> Shape:
    return SHAPES[request.param]


class Watched:
    """A snapshot with its readers."""

    def __init__(self, server: Server, expected: Expected, name: str, readers: int) -> None:
        self.life = Life()
        self.readers = [
            Reader(lambda: server.connect(name, extents=True), expected, self.life, n)
            for n in range(readers)
        ]

    def wait(self, reads: int = 0, failed: int = 0) -> None:
        for reader in self.readers:
            reader.wait(reads, failed)

    def finish(self) -> Tally:
        total = Tally()
        for reader in self.readers:
            total.add(reader.finish())
        return total


@contextmanager
def working(guest: Guest, q: Qemu) -> Iterator[None]:
    """The guest writes at random until the block ends."""
    connected, stop = threading.Event(), threading.Event()
    thread = threading.Thread(target=guest.work, args=(q, WRITTEN, connected, stop))
    thread.start()
    try:
        assert connected.wait(60)
        yield
    finally:
        stop.set()
        thread.join(120)


def exports(server: Server) -> list[str]:
    """The names as a client that connects now gets them."""
    names: list[str] = []
    handle = nbd.NBD()
    handle.set_opt_mode(True)
    handle.connect_unix(str(server.socket))
    handle.opt_list(lambda name, description: names.append(name))
    handle.opt_abort()
    return names


def assert_gone(handle: nbd.NBD) -> None:
    """Data, holes and extents, of both: nothing but EIO, and the client stays connected."""
    for offset in (0, HOLE):
        for ask in (handle.pread, lambda n, at: block_status(handle, at, n)):
            with pytest.raises(nbd.Error) as caught:
                ask(BLOCK, offset)
            assert caught.value.errnum == errno.EIO


def test_steady_load(tmp_path: Path, shape: Shape) -> None:
    """Snapshots come and go under a guest that writes; each has readers for all its life."""
    path = tmp_path / "disk.qcow2"
    guest = shape.make(path)
    total, kept, rng = Tally(), Tally(), random.Random(3)
    with ExitStack() as stack:
        server = stack.enter_context(shape.serve(path))
        q = stack.enter_context(shape.run(path))
        with q.guest() as disk:
            guest.write_all(disk, WRITTEN)
        stack.enter_context(working(guest, q))
        keep = Watched(server, guest.take(q, "keep"), "keep", 2)
        living: dict[str, Watched] = {}
        number, end = 0, time.monotonic() + SECONDS
        while time.monotonic() < end:
            while len(living) < 3:
                name = f"s{number}"
                living[name] = Watched(server, guest.take(q, name), name, 1)
                number += 1
            assert exports(server) == ["keep", *living]
            for watched in living.values():
                watched.wait(reads=5)
            name = rng.choice(list(living))
            watched = living.pop(name)
            watched.life.end(lambda name=name: q.delete(name))
            assert exports(server) == ["keep", *living]
            watched.wait(failed=3)
            total.add(watched.finish())
        for watched in living.values():
            total.add(watched.finish())
        kept = keep.finish()
    assert total.bad == {}, total
    assert kept.bad == {}
    assert kept.failed == 0
    assert total.failed >= 3 * number - 9
    print(f"{number} snapshots: {total}; one all the time: {kept}")


def test_deleted_under_load(tmp_path: Path, shape: Shape) -> None:
    """Deleted in the middle of reads and its clusters overwritten at once; taken again under the
    same name and ID, it is another."""
    path = tmp_path / "disk.qcow2"
    guest = shape.make(path)
    total = Tally()
    with ExitStack() as stack:
        server = stack.enter_context(shape.serve(path))
        q = stack.enter_context(shape.run(path))
        disk = stack.enter_context(q.guest())
        guest.write_all(disk, WRITTEN // 2)
        keep = Watched(server, guest.take(q, "keep"), "keep", 1)
        for _ in range(ROUNDS):
            guest.write_all(disk, WRITTEN, step=16)
            served = Watched(server, guest.take(q, "served"), "served", 3)
            identity = qemu.snapshots(path)["served"]
            with ExitStack() as held:
                old = held.enter_context(server.connect("served", extents=True))
                guest.write_all(disk, WRITTEN // 3)  # so that some of its clusters are its own
                served.wait(reads=5)
                served.life.end(lambda: q.delete("served"))
                guest.write_all(disk, WRITTEN)
                served.wait(failed=3)
                assert_gone(old)
                again = Watched(server, guest.take(q, "served"), "served", 1)
                assert qemu.snapshots(path)["served"].id == identity.id
                again.wait(reads=5)
                assert_gone(old)
                served.wait(failed=3)
                total.add(served.finish())
                again.life.end(lambda: q.delete("served"))
                again.wait(failed=1)
                total.add(again.finish())
        kept = keep.finish()
    assert total.bad == {}, total
    assert kept.bad == {}
    assert kept.failed == 0
    print(f"{ROUNDS} rounds: {total}; one all the time: {kept}")


def test_deleted_while_the_server_hangs(tmp_path: Path, shape: Shape) -> None:
    """Stopped with reads at any point between their first byte and their last check, and let go
    when the clusters have been freed and overwritten."""
    path = tmp_path / "disk.qcow2"
    guest = shape.make(path)
    total, rng = Tally(), random.Random(6)
    with ExitStack() as stack:
        server = stack.enter_context(shape.serve(path))
        q = stack.enter_context(shape.run(path))
        disk = stack.enter_context(q.guest())
        for _ in range(2 * ROUNDS):
            guest.write_all(disk, WRITTEN)
            expected = guest.take(q, "served")
            guest.write_all(disk, WRITTEN // 3)
            with ExitStack() as held:
                handles = [held.enter_context(server.connect("served")) for _ in range(16)]
                salvo = Salvo(handles, expected, rng)
                time.sleep(rng.random() * 0.004)  # anywhere in the middle of them
                with stopped(server.process):
                    q.delete("served")
                    guest.write_all(disk, WRITTEN)
                total.add(salvo.collect())
    assert total.bad == {}, total
    print(f"{2 * ROUNDS} rounds: {total}")


def test_qemu_killed_in_the_middle_of_writing(tmp_path: Path, shape: Shape) -> None:
    """Killed, started again on the same file, killed again: the server never notices."""
    path = tmp_path / "disk.qcow2"
    guest = shape.make(path)
    rng = random.Random(5)
    with ExitStack() as stack:
        server = stack.enter_context(shape.serve(path))
        watched: list[Watched] = []
        for number in range(KILLS):
            with shape.run(path) as q:
                with q.guest() as disk:
                    guest.write_all(disk, WRITTEN)
                with working(guest, q):
                    name = f"s{number}"
                    watched.append(Watched(server, guest.take(q, name), name, 1))
                    watched[-1].wait(reads=2 + rng.randrange(20))
                    q.kill()
                for each in watched:
                    each.wait(reads=2)
            if len(watched) > 3:
                first = watched.pop(0)
                shape.img(path, "check", "-q", "-r", "leaks")
                first.life.end(lambda n=number: shape.img(path, "snapshot", "-d", f"s{n - 3}"))
                first.wait(failed=2)
                assert first.finish().bad == {}
        for each in watched:
            tally = each.finish()
            assert tally.bad == {}
            assert tally.failed == 0
