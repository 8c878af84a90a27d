"""Clients that misbehave: the others get the right bytes, and memory comes back.

No client here leaves with a read in flight: nbdkit 1.32 aborts then, whatever its plugin.
"""

from __future__ import annotations

import random
import socket
import struct
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import nbd
import pytest
from support import qemu
from support.qemu import KiB, MiB
from support.server import Server, serve
from support.tables import Entry, write_table

SIZE = 32 * MiB
OPTION_MAGIC = b"IHAVEOPT"
EXPORT_NAME, LIST, INFO, GO = 1, 3, 6, 7


@pytest.fixture(scope="module")
def disk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("clients")
    noise = directory / "noise"
    noise.write_bytes(random.Random(7).randbytes(MiB - 1))
    path = qemu.create(directory / "disk.qcow2", SIZE)
    qemu.io(path, f"write -s {noise} 0 {SIZE}")
    qemu.take(path, "s")
    return path


@pytest.fixture(scope="module")
def content(disk: Path) -> bytes:
    return qemu.content(disk, "s")


@pytest.fixture(scope="module")
def server(disk: Path) -> Iterator[Server]:
    with serve(file=disk) as running:
        yield running


@contextmanager
def raw(server: Server, *, greeted: bool = True) -> Iterator[socket.socket]:
    """A bare socket; greeted: through the first exchange, where options are sent."""
    with socket.socket(socket.AF_UNIX) as s:
        s.settimeout(60)
        s.connect(str(server.socket))
        if greeted:
            assert receive(s, 18)[:16] == b"NBDMAGIC" + OPTION_MAGIC
            s.sendall(struct.pack(">I", 3))
        yield s


def receive(s: socket.socket, length: int) -> bytes:
    data = b""
    while len(data) < length:
        more = s.recv(length - len(data))
        assert more, f"it hung up after {len(data)} of {length} bytes"
        data += more
    return data


def send_option(s: socket.socket, option: int, data: bytes, length: int | None = None) -> None:
    s.sendall(OPTION_MAGIC + struct.pack(">II", option, len(data) if length is None else length))
    s.sendall(data)


def go(name: bytes) -> bytes:
    return struct.pack(">I", len(name)) + name + b"\0\0"


def until_it_hangs_up(s: socket.socket) -> bytes:
    data = b""
    with suppress(ConnectionError):
        while more := s.recv(65536):
            data += more
    return data


def is_served(server: Server, content: bytes) -> None:
    with server.connect("s") as client:
        for at in (0, 5 * MiB + 11, SIZE - 64 * KiB):
            assert client.pread(64 * KiB, at) == content[at : at + 64 * KiB]
    assert "Traceback" not in server.log


@pytest.mark.parametrize("seed", range(8))
def test_garbage_instead_of_a_handshake(server: Server, content: bytes, seed: int) -> None:
    rng = random.Random(seed)
    with raw(server, greeted=seed % 2 == 0) as s:
        with suppress(ConnectionError):
            s.sendall(rng.randbytes(rng.randrange(1, 5000)))
            s.shutdown(socket.SHUT_WR)
        until_it_hangs_up(s)
    is_served(server, content)


@pytest.mark.parametrize("option", [EXPORT_NAME, INFO, GO])
@pytest.mark.parametrize(
    "name",
    [b"\xff\xfe", b"x" * 4096, b"x" * 4097, b"x" * 60000, b"s\0", "s\u0301".encode(), b"/vmstate"],
    ids=["not-utf-8", "4096", "4097", "60000", "nul", "accent", "vmstate"],
)
def test_an_export_name_that_there_is_not(
    server: Server, content: bytes, name: bytes, option: int
) -> None:
    with raw(server) as s:
        with suppress(ConnectionError):
            send_option(s, option, name if option == EXPORT_NAME else go(name))
            s.shutdown(socket.SHUT_WR)
        answer = until_it_hangs_up(s)
    error = option.to_bytes(4, "big") + b"\x80"
    assert not answer or error in answer, "it was opened"
    is_served(server, content)


@pytest.mark.parametrize("length", [0xFFFFFFFF, 0x7FFFFFFF, 1 << 24])
@pytest.mark.parametrize("option", [EXPORT_NAME, LIST, GO, 10, 0xFFFFFFFF])
def test_an_option_longer_than_all_memory(server: Server, content: bytes, option, length) -> None:
    with raw(server) as s:
        with suppress(ConnectionError):  # it may hang up before all is sent
            send_option(s, option, b"x" * 100, length)
            s.shutdown(socket.SHUT_WR)
        until_it_hangs_up(s)
    is_served(server, content)


def test_requests_past_the_end(server: Server, content: bytes) -> None:
    with server.connect("s", extents=True) as client:
        for length, offset in ((1, SIZE), (2, SIZE - 1), (512, 1 << 62), (512, 2**63 - 512)):
            with pytest.raises(nbd.Error):
                client.pread(length, offset)
            with pytest.raises(nbd.Error):
                client.block_status(length, offset, lambda *_: 0)
            with pytest.raises(nbd.Error):
                client.cache(length, offset)
        assert client.pread(512, SIZE - 512) == content[-512:]


def open_raw(s: socket.socket) -> None:
    """From the options to where requests are sent."""
    send_option(s, EXPORT_NAME, b"s")
    size, _ = struct.unpack(">QH", receive(s, 10))
    assert size == SIZE
    # NBD_FLAG_C_NO_ZEROES was sent: no 124 zeros follow.


def request(kind: int, length: int, offset: int = 0) -> bytes:
    return struct.pack(">IHHQQI", 0x25609513, 0, kind, 42, offset, length)


@pytest.mark.parametrize("sent", [1, 4, 16, 27])
def test_a_client_that_leaves_in_the_middle_of_a_request(
    server: Server, content: bytes, sent: int
) -> None:
    with raw(server) as s:
        open_raw(s)
        s.sendall(request(0, 4096)[:sent])
    is_served(server, content)


@pytest.mark.parametrize(
    "bad",
    [
        b"\0" * 28,
        request(99, 512),
        request(0, 0),
        request(1, 512) + b"x" * 512,
        request(6, 1 << 30),
    ],
    ids=["magic", "command", "empty", "write", "zero"],
)
def test_a_bad_request(server: Server, content: bytes, bad: bytes) -> None:
    with raw(server) as s:
        open_raw(s)
        with suppress(ConnectionError):
            s.sendall(bad)
            s.shutdown(socket.SHUT_WR)
        until_it_hangs_up(s)
    is_served(server, content)


def test_a_client_that_does_not_read_its_answer(server: Server, content: bytes) -> None:
    with raw(server) as slow:
        open_raw(slow)
        slow.sendall(request(0, SIZE))  # far more than a socket buffers
        for _ in range(5):
            is_served(server, content)
        magic, error, handle = struct.unpack(">IIQ", receive(slow, 16))
        assert (magic, error, handle) == (0x67446698, 0, 42)
        assert receive(slow, SIZE) == content
        slow.sendall(request(2, 0))


def test_thousands_of_connections_leave_nothing_behind(server: Server, content: bytes) -> None:
    def connections(count: int) -> None:
        for n in range(count):
            with raw(server, greeted=bool(n % 4)) as s:
                if n % 4 > 1:
                    send_option(s, GO, go(b"s" if n % 4 == 2 else b"none"))
        for _ in range(count // 20):
            is_served(server, content)

    connections(500)  # what allocators keep for good
    before = server.memory()
    connections(2000)
    assert server.memory() - before < 8 * MiB


def test_refusals_leave_little_behind(tmp_path: Path) -> None:
    """nbdkit 1.32 never frees an exception, so what it holds must not be much: half a kilobyte,
    and not a table of snapshots."""
    path = qemu.create(tmp_path / "many.qcow2", MiB)
    qemu.take(path, "real")
    real = qemu.snapshots(path)["real"]
    place = real.l1_table_offset, real.l1_size
    write_table(path, [Entry(b"%d" % n, b"name-%d" % n, *place) for n in range(300)])

    def refusals(count: int) -> None:
        for _ in range(count):
            with raw(server) as s:
                send_option(s, GO, go(b"none"))
                receive(s, 20)

    with serve(file=path) as server:
        refusals(50)
        before = server.memory()
        refusals(300)
        assert server.memory() - before < 3 * MiB


@pytest.mark.parametrize("option", [GO, INFO])
def test_a_refused_client_is_told_what_it_got_wrong_but_no_path_of_the_host(
    disk: Path, tmp_path: Path, option: int
) -> None:
    """nbdkit sends it the last line of the log since 1.42, and nothing before."""
    image = tmp_path / "here.qcow2"
    image.write_bytes(disk.read_bytes())
    with serve(file=image, snapshot="s") as running:
        asked = refusal(running, option, b"nope")
        assert not asked or b"no export 'nope'" in asked
        assert "no export 'nope'" in running.log
        image.write_bytes(image.read_bytes()[:4096])  # no table any more
        told = refusal(running, option, b"s")
        assert not told or told.endswith(b"the server's log says why")
        assert bytes(tmp_path) not in asked + told
        assert f"{image}" in running.log
        assert "Traceback" not in running.log


def refusal(server: Server, option: int, name: bytes) -> bytes:
    """What the server says with an error."""
    with raw(server) as s:
        send_option(s, option, go(name))
        _, answered, kind, length = struct.unpack(">QIII", receive(s, 20))
        assert answered == option
        assert kind & 1 << 31, "it was opened"
        return receive(s, length)
