"""The thread model: many connections leave nothing behind, filters that call from threads of
their own are served right, and a state that another thread kept is left alone."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from pathlib import Path

import nbd
import pytest
from support import qemu
from support.qemu import MiB, RandomImage
from support.running import eventually
from support.server import ROOT, Server, serve


@pytest.fixture(scope="module")
def disk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("threads") / "disk.qcow2"
    RandomImage(path, 11, size=8 * MiB, compressed=True).make(["s"], 60)
    return path


@pytest.fixture(scope="module")
def expected(disk: Path) -> bytes:
    return qemu.content(disk, "s")


def use(server: Server, connections: int) -> None:
    for _ in range(connections):
        with server.connect() as client:
            for at in range(0, 16 * 65536, 65536):
                client.pread(512, at)


def test_a_thousand_connections_leave_no_memory_behind(disk: Path) -> None:
    """A kept thread state is at least 5 KiB: without its release they would be 5 MiB."""
    with serve(file=disk, snapshot="s") as server:
        threads = server.threads()
        use(server, 200)
        # The first client starts a thread that imports what words an error: 3 MiB with Python 3.14.
        eventually(lambda: server.threads() <= threads)
        before = server.memory()
        use(server, 1000)
        assert server.memory() - before < 2 * MiB


FILTERS = [
    ("readahead",),
    ("scan",),
    ("cow",),
    ("cache",),
    ("retry",),
    ("cache", "readahead"),
    ("retry", "cow", "scan", "readahead"),
    ("noparallel",),
]


@pytest.mark.parametrize("filters", FILTERS, ids="+".join)
def test_under_filters_with_threads_of_their_own(
    disk: Path, expected: bytes, filters: tuple[str, ...]
) -> None:
    with serve(file=disk, snapshot="s", filters=filters) as server:
        assert server.copy() == expected  # over several connections
        assert server.read() == expected  # over one, once more
        use(server, 20)
        if "readahead" in filters:
            idle(server)


def idle(server: Server) -> None:
    """Wait until nothing is prefetched: nbdkit 1.42 and later crash when they are stopped while
    the readahead filter does (docs/upstream-nbdkit.md)."""
    before = None
    while before != (used := Path(f"/proc/{server.pid}/stat").read_text().split()[13:15]):
        before = used
        time.sleep(0.3)


def test_many_clients_at_once(disk: Path, expected: bytes) -> None:
    with serve(file=disk, snapshot="s") as server:
        clients = [nbd.NBD() for _ in range(16)]
        buffers = []
        for number, client in enumerate(clients):
            client.connect_unix(str(server.socket))
            for at in range(number * 4096, len(expected) - MiB, MiB):
                buffer = nbd.Buffer(70_000)
                buffers.append((at, client, client.aio_pread(buffer, at), buffer))
        for at, client, cookie, buffer in buffers:
            while not client.aio_command_completed(cookie):
                client.poll(-1)
            assert buffer.to_bytearray() == expected[at : at + 70_000]
        for client in clients:
            client.shutdown()


def test_clients_that_hang_up_without_a_word(disk: Path, expected: bytes) -> None:
    """With no read in flight: nbdkit 1.32 itself does not always survive the other case."""
    with serve(file=disk, snapshot="s") as server:
        for _ in range(50):
            client = nbd.NBD()
            client.connect_unix(str(server.socket))
            client.pread(512, 0)
            del client  # closes the socket
        for _ in range(50):  # in the middle of the handshake
            with socket.socket(socket.AF_UNIX) as s:
                s.connect(str(server.socket))
                s.recv(8)
        assert server.copy() == expected


# Threads that Python did not make, as nbdkit's are; ctypes brackets their callbacks as nbdkit does.
FOREIGN = """
import ctypes, sys
sys.path.insert(0, sys.argv[1])
from qcow2snap_core.serve.threadstate import KeptThreadState

libc, python = ctypes.CDLL(None), ctypes.PyDLL(None)
python.PyInterpreterState_Get.restype = ctypes.c_void_p
python.PyInterpreterState_ThreadHead.restype = ctypes.c_void_p
python.PyInterpreterState_ThreadHead.argtypes = [ctypes.c_void_p]
python.PyThreadState_Next.restype = ctypes.c_void_p
python.PyThreadState_Next.argtypes = [ctypes.c_void_p]
CALLBACK = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p)

def states():
    state = python.PyInterpreterState_ThreadHead(python.PyInterpreterState_Get())
    count = 0
    while state:
        count += 1
        state = python.PyThreadState_Next(state)
    return count

def in_a_thread(*steps):
    errors = []
    def body(_):
        try:
            for step in steps:
                callback = CALLBACK(lambda _, step=step: step() and None)
                callback(None)
        except BaseException as e:
            errors.append(e)
    thread, callback = ctypes.c_ulong(), CALLBACK(body)
    assert libc.pthread_create(ctypes.byref(thread), None, callback, None) == 0
    assert libc.pthread_join(thread, None) == 0
    assert not errors, errors

kept = []
keep = lambda: kept.append(KeptThreadState())
release = lambda: kept[-1].release()
"""

CASES = {
    "released-where-it-was-kept": "in_a_thread(keep, release); assert states() == 1",
    "released-twice": "in_a_thread(keep, release, release); assert states() == 1",
    "kept-twice": "in_a_thread(keep, keep, release, kept[:1].clear, lambda: kept[0].release());"
    "assert states() == 1",
    "never-released": "in_a_thread(keep); assert states() == 2",
    "released-elsewhere": "in_a_thread(keep); in_a_thread(release); assert states() == 2",
    "released-by-the-main-thread": "in_a_thread(keep); release(); assert states() == 2",
    "often": "for i in range(300): in_a_thread(keep, release)\nassert states() == 1",
}


@pytest.mark.parametrize("case", CASES)
def test_a_state_is_released_by_its_own_thread_only(case: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", f"{FOREIGN}\n{CASES[case]}\nprint('alive')", ROOT],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, "alive\n"), done.stderr
