"""A server that hangs is an error after a while, and nothing else waits for it."""

from __future__ import annotations

import os
import random
import signal
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest
from support.qemu import KiB, MiB
from support.remote import Remote, remote
from support.running import eventually

from qcow2snap_core.errors import StorageError, UsageError
from qcow2snap_core.storage.connections import Silent
from qcow2snap_core.storage.remote import RemoteFile
from qcow2snap_core.util.interrupts import Interrupted, deferred

DATA = random.Random(1).randbytes(256 * KiB)
FOREVER = 1e6
ONE = ("--filter=multi-conn", "multi-conn-mode=disable")


class Freezer:
    """Has a server hang, and only then little patience with it, as machines may be slow."""

    def __init__(self, server: Remote, file: RemoteFile, patience: float) -> None:
        self._server, self._there, self._patience = server, file._connections, patience

    def freeze(self) -> None:
        self._server.freeze()
        self._there._patience = self._patience

    def thaw(self) -> None:
        self._there._patience = FOREVER
        self._server.thaw()


@contextmanager
def opened(directory: Path, patience: float, *filters: str) -> Iterator[tuple[Freezer, RemoteFile]]:
    path = directory / "disk.raw"
    path.write_bytes(DATA)
    with remote(*filters[:1], "file", path, *filters[1:]) as server:
        file = RemoteFile(server.uri, FOREVER)
        try:
            yield Freezer(server, file, patience), file
        finally:
            file.close()


@pytest.mark.parametrize("filters", [(), ONE], ids=["many", "one"])
def test_it_is_an_error_and_the_next_read_connects_anew(
    tmp_path: Path, filters: tuple[str, ...]
) -> None:
    with opened(tmp_path, 0.3, *filters) as (server, file):
        assert file.read(512, 0) == DATA[:512]
        server.freeze()
        for _ in range(3):  # over the connection that there was, and two that are never made
            with pytest.raises(StorageError, match=r"offset 0x200 failed: .* answered for 0.3 s"):
                file.read(512, 512)
        server.thaw()
        assert file.read(512, 512) == DATA[512:1024]


@pytest.mark.parametrize("filters", [(), ONE], ids=["many", "one"])
def test_those_who_wait_for_their_turn_do_not_wait_for_ever(
    tmp_path: Path, filters: tuple[str, ...]
) -> None:
    with opened(tmp_path, 0.3, *filters) as (server, file), ThreadPoolExecutor(20) as pool:
        server.freeze()
        for future in [pool.submit(file.read, 512, n * 512) for n in range(20)]:
            assert isinstance(future.exception(60), StorageError)
        server.thaw()
        assert file.read(len(DATA), 0) == DATA


def test_closing_does_not_wait_for_it(tmp_path: Path) -> None:
    with opened(tmp_path, FOREVER) as (server, file), ThreadPoolExecutor(1) as pool:
        server.freeze()
        reading = pool.submit(file.read, 512, 0)
        eventually(lambda: not file._connections._idle)  # it has been sent
        file.close()
        assert not reading.done()
        server.thaw()
        assert reading.result(60) == DATA[:512]


def test_whoever_stops_waiting_leaves_room_for_others(tmp_path: Path) -> None:
    with opened(tmp_path, FOREVER) as (server, file):
        server.freeze()
        for _ in range(10):  # more than there are connections; most of them while connecting
            with deferred():
                os.kill(os.getpid(), signal.SIGINT)
                with pytest.raises(Interrupted):
                    file.read(512, 0)
        with deferred():  # forget the last one
            server.thaw()
            assert file.read(512, 0) == DATA[:512]


def test_its_size_is_the_last_one_that_was_seen(tmp_path: Path) -> None:
    with opened(tmp_path, 0.3) as (server, file):
        server.freeze()
        file._connections._measured = 0  # as if that were long ago
        assert file.size() == len(DATA)


def test_a_server_that_lets_everybody_in_and_says_nothing(tmp_path: Path) -> None:
    path = tmp_path / "sock"
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(path))
        listening.listen()
        with pytest.raises(UsageError, match=r"cannot open '.*': .* not answered for 0.3 s"):
            RemoteFile(f"nbd+unix://?socket={path}", 0.3)


def test_a_slow_answer_is_waited_for_as_long_as_some_of_it_comes(tmp_path: Path) -> None:
    path = tmp_path / "disk.raw"
    path.write_bytes(random.Random(2).randbytes(2 * MiB))
    patience, pieces = 2.0, 50
    with remote("file", path) as server, _slow(server, tmp_path, 2 * MiB // pieces) as uri:
        file = RemoteFile(uri, patience)
        began = time.monotonic()
        assert file.read(2 * MiB, 0) == path.read_bytes()
        assert time.monotonic() - began > patience
        file.close()


@contextmanager
def _slow(server: Remote, directory: Path, step: int) -> Iterator[str]:
    """The server behind a slow line: so many bytes, a little pause, and so on."""
    listening = socket.socket(socket.AF_UNIX)
    listening.bind(str(directory / "slow"))
    listening.listen()

    def pump(source: socket.socket, target: socket.socket, pause: float) -> None:
        while data := source.recv(step, socket.MSG_WAITALL if pause and begun.is_set() else 0):
            target.sendall(data)
            time.sleep(pause if len(data) == step else 0)
        target.shutdown(socket.SHUT_WR)

    begun = threading.Event()

    def serve() -> None:
        client, _ = listening.accept()
        behind = socket.socket(socket.AF_UNIX)
        behind.connect(str(server.socket))
        other = threading.Thread(target=pump, args=(client, behind, 0), daemon=True)
        other.start()
        pump(behind, client, 0.05)
        other.join()
        client.close()
        behind.close()

    with listening:
        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield f"nbd+unix://?socket={directory}/slow"
        thread.join(60)


def test_silence_is_an_error_of_storage() -> None:
    assert issubclass(Silent, StorageError)
