"""A server that hangs, as clients of the plugin and users of the command meet it."""

from __future__ import annotations

import signal
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import nbd
import pytest
from support import command, qemu
from support.qemu import KiB, MiB, RandomImage
from support.remote import remote
from support.running import eventually, started, until
from support.server import refused, serve

FOREVER = "1000000"

# A file whose reads from HELD on wait as long as there is another file, and say so.
HOLDING = """
import os, time
import nbdkit
API_VERSION = 2
keys = {}
def config(key, value): keys[key] = value
def open(readonly): return os.open(keys["path"], os.O_RDONLY)
def get_size(fd): return os.fstat(fd).st_size
def can_multi_conn(fd): return True
def pread(fd, buffer, offset, flags):
    if os.path.exists(keys["hold"]) and offset >= int(keys["from"]):
        with __builtins__.open(keys["hold"], "w") as f: f.write("reached")
        while os.path.exists(keys["hold"]): time.sleep(0.01)
    os.preadv(fd, [buffer], offset)
"""


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.qcow2"
    RandomImage(path, seed=5).make(["one", "two"])
    return path


@contextmanager
def silent(directory: Path) -> Iterator[tuple[socket.socket, str]]:
    """A socket that lets everybody in."""
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(directory / "silent"))
        listening.listen()
        listening.settimeout(60)
        yield listening, f"nbd+unix://?socket={directory}/silent"


def test_clients_get_eio_and_the_log_one_line(image: Path) -> None:
    expected = qemu.content(image, "one")
    with (
        remote("file", image) as server,
        serve(file=server.uri, remote_timeout="2") as ours,
        ours.connect("one") as client,
    ):
        assert client.pread(64 * KiB, 0) == expected[: 64 * KiB]
        server.freeze()
        with pytest.raises(nbd.Error) as e:
            client.pread(64 * KiB, MiB)
        assert e.value.errno == "EIO"
        server.thaw()
        assert client.pread(64 * KiB, MiB) == expected[MiB : MiB + 64 * KiB]
        [line] = ours.log.splitlines()
        assert "the server has not answered for 2 s" in line


def test_it_stops_while_the_server_hangs(image: Path) -> None:
    with (
        remote("file", image) as server,
        serve(file=server.uri, remote_timeout="2") as ours,
        ours.connect("one") as client,
    ):
        server.freeze()
        client.aio_pread(nbd.Buffer(64 * KiB), 0)
        client.poll(0)


@pytest.mark.parametrize(
    "words", [["list"], ["check"], ["copy", "one", "out"]], ids=lambda words: words[0]
)
def test_a_server_that_never_says_anything_is_one_line(tmp_path: Path, words: list[str]) -> None:
    with silent(tmp_path) as (_, uri):
        more = [tmp_path / word if word == "out" else word for word in words[1:]]
        said = command.fails(words[0], uri, *more, "--remote-timeout", "0.3")
    assert said.endswith(f"cannot open '{uri}': the server has not answered for 0.3 s")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["silent"]


def test_the_plugin_does_not_start_with_it(tmp_path: Path) -> None:
    with silent(tmp_path) as (_, uri):
        said = refused(file=uri, remote_timeout="0.3")
    assert "the server has not answered for 0.3 s" in said


@pytest.mark.parametrize("words", [["list"], ["copy", "one", "out"]], ids=lambda words: words[0])
def test_ctrl_c_while_it_connects(tmp_path: Path, words: list[str]) -> None:
    with silent(tmp_path) as (listening, uri):
        more = [tmp_path / word if word == "out" else word for word in words[1:]]
        with started(words[0], uri, *more, "--remote-timeout", FOREVER) as process:
            connection, _ = listening.accept()
            process.send_signal(signal.SIGINT)
            out, err = process.communicate(timeout=60)
        connection.close()
    assert (process.returncode, out, err) == (130, "", "")


@pytest.mark.parametrize(
    ("words", "first"),
    [(["list"], 0), (["copy", "one", "out"], 0), (["copy", "one", "out"], 256 * KiB)],
    ids=["the header", "the header, copy", "data, copy"],
)
def test_ctrl_c_while_it_reads(tmp_path: Path, image: Path, words: list[str], first: int) -> None:
    script, hold = tmp_path / "holding.py", tmp_path / "hold"
    script.write_text(HOLDING)
    with remote("python", script, f"path={image}", f"hold={hold}", f"from={first}") as server:
        hold.touch()
        more = [tmp_path / word if word == "out" else word for word in words[1:]]
        with started(words[0], server.uri, *more, "--remote-timeout", FOREVER) as process:
            until(lambda: hold.read_text() == "reached", process)
            process.send_signal(signal.SIGINT)
            out, err = process.communicate(timeout=60)
        hold.unlink()
    assert (process.returncode, out, err) == (130, "", "")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["disk.qcow2", "holding.py"]


# A target that hangs in one kind of request as long as there is a file, and says so.
TARGET = """
import os, time
import nbdkit
API_VERSION = 2
keys = {}
disk = bytearray(8 << 20)
def config(key, value): keys[key] = value
def hang(request):
    if request == keys["in"]:
        with __builtins__.open(keys["hold"], "w") as f: f.write("reached")
        while os.path.exists(keys["hold"]): time.sleep(0.01)
def open(readonly): return 1
def get_size(h): return len(disk)
def can_multi_conn(h): return keys["many"] == "yes"
def pread(h, buffer, offset, flags):
    hang("read")
    buffer[:] = disk[offset : offset + len(buffer)]
def pwrite(h, buffer, offset, flags):
    hang("write")
    disk[offset : offset + len(buffer)] = buffer
def zero(h, count, offset, flags):
    hang("zero")
    disk[offset : offset + count] = bytes(count)
def flush(h, flags): hang("flush")
def close(h): hang("close")
"""


@contextmanager
def target(directory: Path, where: str, many: str) -> Iterator[tuple[str, Path]]:
    script, hold = directory / "target.py", directory / "hold"
    script.write_text(TARGET)
    hold.touch()
    with remote("python", script, f"hold={hold}", f"in={where}", f"many={many}") as server:
        yield server.uri, hold
        hold.unlink(missing_ok=True)


@pytest.mark.parametrize("many", ["yes", "no"], ids=["four connections", "one"])
@pytest.mark.parametrize("where", ["write", "zero", "flush", "read"])
def test_ctrl_c_while_the_target_hangs(tmp_path: Path, image: Path, where: str, many: str) -> None:
    with (
        target(tmp_path, where, many) as (uri, hold),
        started("copy", image, "one", uri) as process,
    ):
        until(lambda: hold.read_text() == "reached", process)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (130, "", "")


def test_a_target_that_hangs_when_all_is_done_is_left(tmp_path: Path, image: Path) -> None:
    with target(tmp_path, "close", "no") as (uri, hold):
        words = ["copy", image, "one", uri, "--remote-timeout", "0.3"]
        assert command.here(*words).startswith(f"{uri}: ")
        eventually(lambda: hold.read_text() == "reached")


def test_a_target_that_never_says_anything_is_one_line(tmp_path: Path, image: Path) -> None:
    with silent(tmp_path) as (_, uri):
        said = command.fails("copy", image, "one", uri, "--remote-timeout", "0.3")
    assert said.endswith(f"cannot open '{uri}': the server has not answered for 0.3 s")


def test_ctrl_c_while_the_target_lets_nobody_in(tmp_path: Path, image: Path) -> None:
    with (
        silent(tmp_path) as (listening, uri),
        started("copy", image, "one", uri, "--remote-timeout", FOREVER) as process,
    ):
        connection, _ = listening.accept()
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
        connection.close()
    assert (process.returncode, out, err) == (130, "", "")
