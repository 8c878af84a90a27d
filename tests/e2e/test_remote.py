"""An image behind an NBD server reads as the file does, and what goes wrong there is an error."""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path
from typing import Any

import nbd
import pytest
from support import qemu
from support.command import fails, qcow2snap
from support.live import running
from support.qemu import KiB, MiB, RandomImage
from support.remote import remote, remote_tcp
from support.running import eventually, listens
from support.server import command, refused, serve

from qcow2snap_core.image.opener import open_image

SHAPES: dict[str, dict[str, Any]] = {
    "defaults": {},
    "compressed": {"compressed": True},
    "512": {"options": {"cluster_size": 512}, "size": MiB},
    "2M-compressed": {"options": {"cluster_size": 2 * MiB}, "compressed": True, "size": 8 * MiB},
}


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.qcow2"
    RandomImage(path, seed=5).make(["one", "two"])
    return path


def fails_to_read(client: nbd.NBD, offset: int = 0) -> None:
    with pytest.raises(nbd.Error) as e:
        client.pread(64 * KiB, offset)
    assert e.value.errno == "EIO"


# --- What is read ---


@pytest.mark.parametrize("shape", SHAPES)
def test_every_snapshot_reads_as_from_the_file(tmp_path: Path, shape: str) -> None:
    path = tmp_path / "disk.qcow2"
    names = RandomImage(path, seed=3, **SHAPES[shape]).make()
    with remote("file", path) as server, serve(file=server.uri) as ours:
        for name in names:
            assert ours.copy(name) == qemu.content(path, name)


def test_it_reads_over_tcp(image: Path) -> None:
    with remote_tcp("file", image) as uri, serve(file=uri, snapshot="one") as ours:
        assert ours.copy() == qemu.content(image, "one")


@pytest.mark.parametrize(
    "filters",
    [
        ("--filter=multi-conn", "multi-conn-mode=disable"),  # one connection is all there may be
        ("--filter=limit", "limit=2"),  # more are refused
    ],
    ids=["one", "limited"],
)
def test_it_makes_do_with_few_connections(image: Path, filters: tuple[str, str]) -> None:
    with remote(filters[0], "file", image, filters[1]) as server, serve(file=server.uri) as ours:
        for name in ("one", "two"):
            assert ours.copy(name) == qemu.content(image, name)


def test_it_makes_do_with_a_server_that_lets_further_connections_wait(image: Path) -> None:
    socket = image.with_name("qemu.sock")
    line = ["qemu-nbd", "-r", "-t", "-e", "2", "-f", "raw", "-k", socket, image]
    process = subprocess.Popen(line, stdin=subprocess.DEVNULL)
    try:
        eventually(lambda: listens(socket))
        with serve(file=f"nbd+unix://?socket={socket}", snapshot="two") as ours:
            assert ours.copy() == qemu.content(image, "two")
    finally:
        process.kill()
        process.wait(20)


def test_it_reads_encrypted_connections_and_keeps_the_key_file_to_itself(
    tmp_path: Path, image: Path
) -> None:
    keys = tmp_path / "keys.psk"
    keys.write_text(f"alice:{'5a' * 32}\n")
    with remote("--tls=require", f"--tls-psk={keys}", "file", image) as server:
        uri = f"nbds+unix://alice@/?socket={server.socket}&tls-psk-file={keys}"
        with serve(file=uri) as ours:
            assert ours.copy("one") == qemu.content(image, "one")
        said = refused(file=uri, snapshot="none")
        assert "alice" not in said
        assert "keys.psk" not in said


# --- A running QEMU on the other side ---


def test_a_deleted_snapshot_is_noticed(image: Path) -> None:
    with remote("file", image) as server, serve(file=server.uri) as ours:
        with ours.connect("one") as client:
            assert client.pread(64 * KiB, 0) == qemu.content(image, "one")[: 64 * KiB]
            qemu.delete(image, "one")
            fails_to_read(client)
        assert "was deleted" in ours.log


def test_other_snapshots_come_and_go_while_the_file_grows(image: Path) -> None:
    expected = qemu.content(image, "one")
    with remote("file", image) as server, serve(file=server.uri) as ours:
        with ours.connect("one") as client:
            for number in range(3):
                before = image.stat().st_size
                qemu.io(image, f"write -P {number + 1} 0 4M")
                qemu.take(image, f"new{number}")
                assert image.stat().st_size > before
                assert client.pread(MiB, 0) == expected[:MiB]
        assert ours.copy("new2") == qemu.content(image, "new2")
        assert not ours.log


def test_a_new_snapshot_behind_the_end_of_a_moment_ago(
    image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The size is asked for now and then; that is no reason to call what is new damaged."""
    monkeypatch.setattr("qcow2snap_core.storage.connections._SIZE_HOLDS_FOR", 1e6)
    with remote("file", image) as server, open_image(server.uri) as opened:
        known = [s.name for s in opened.snapshots]
        for n in range(3):
            qemu.io(image, f"write -P {n + 1} 0 4M")
            assert opened.storage.size() < image.stat().st_size
            qemu.take(image, f"new{n}")
            known.append(f"new{n}")
            assert opened.table().damage is None
            assert [s.name for s in opened.snapshots] == known
            qemu.io(image, f"write -P {n + 7} 0 4M")
            qemu.take(image, f"other{n}")  # its table is where the old one was, its data is not
            known.append(f"other{n}")
            disk = opened.snapshot(f"other{n}")
            assert list(disk.extents(0, MiB)) == [(0, MiB, 0)]
            assert disk.pread(MiB, 0) == bytes([n + 7]) * MiB


def test_a_running_qemu_may_take_delete_and_write(image: Path) -> None:
    expected = qemu.content(image, "one")
    with (
        running(image) as vm,
        vm.guest() as guest,
        remote("file", image) as server,
        serve(file=server.uri) as ours,
        ours.connect("one") as client,
    ):
        for number in range(5):
            guest.pwrite(bytes([number + 1]) * MiB, number * 512 * KiB)
            vm.take("other")
            assert client.pread(len(expected), 0) == expected
            vm.delete("other")
            assert client.pread(len(expected), 0) == expected
        assert not ours.log
        vm.delete("one")
        guest.pwrite(b"x" * 4 * MiB, 0)
        fails_to_read(client)


def test_the_way_back_survives_going_into_the_background(image: Path) -> None:
    socket, pid = image.with_name("ours.sock"), image.with_name("ours.pid")
    with remote("file", image) as server:
        line = command("-U", socket, "-P", pid, file=f"nbd+unix://?socket={server.socket.name}")
        subprocess.run(line, cwd=server.socket.parent, check=True, timeout=60)
        try:
            server.kill()
            server.start()
            qemu.run("nbdcopy", f"nbd+unix:///one?socket={socket}", image.with_name("copy"))
        finally:
            os.kill(int(pid.read_text()), signal.SIGTERM)
    assert image.with_name("copy").read_bytes() == qemu.content(image, "one")


# --- What goes wrong ---


@pytest.mark.parametrize(
    ("number", "said"), [("EIO", "nput/output error"), ("ESHUTDOWN", "server is shutting down")]
)
def test_errors_of_the_server_are_eio_and_pass(
    tmp_path: Path, image: Path, number: str, said: str
) -> None:
    trigger = tmp_path / "fail"
    error = ("error-pread-rate=100%", f"error-file={trigger}", f"error-pread={number}")
    with remote("--filter=error", "file", image, *error) as server, serve(file=server.uri) as ours:
        with ours.connect("one") as client:
            trigger.touch()
            fails_to_read(client)
            trigger.unlink()
            assert client.pread(MiB, 0) == qemu.content(image, "one")[:MiB]
        [line] = ours.log.splitlines()
        assert "host offset" in line
        assert said in line


def test_a_lost_connection_is_made_again(image: Path) -> None:
    expected = qemu.content(image, "one")
    with remote("file", image) as server, serve(file=server.uri) as ours:
        ours.copy("one")  # over several connections
        with ours.connect("one") as client:
            server.kill()
            server.start()
            assert client.pread(MiB, MiB) == expected[MiB : 2 * MiB]
        assert ours.copy("one") == expected
        assert not ours.log


def test_a_dead_server_is_an_error_until_it_is_back(image: Path) -> None:
    expected = qemu.content(image, "one")
    with remote("file", image) as server, serve(file=server.uri) as ours:
        ours.copy("one")
        with ours.connect("one") as client:
            server.kill()
            fails_to_read(client)
            fails_to_read(client)
            assert all("onnection refused" in line for line in ours.log.splitlines()), ours.log
            server.start()
            assert client.pread(MiB, MiB) == expected[MiB : 2 * MiB]


@pytest.mark.parametrize(
    ("uri", "why"),
    [
        ("nbd+unix://?socket=/nowhere/sock", "o such file or directory"),
        ("nbd+unix://", "socket"),
        ("nbd://[::1", "URI"),
    ],
)
def test_a_server_that_is_not_there_is_one_line(uri: str, why: str) -> None:
    said = refused(file=uri)
    assert f"cannot open '{uri}': " in said
    assert why in said


def test_what_is_no_image_is_one_line() -> None:
    with remote("null", "1M") as server:
        assert "not a qcow2" in refused(file=server.uri)


# --- What a remote image names ---


def test_a_relative_backing_name_is_refused(tmp_path: Path) -> None:
    qemu.create(tmp_path / "base.qcow2", MiB)
    top = qemu.create(tmp_path / "top.qcow2", None, backing=("base.qcow2", "qcow2"))
    qemu.take(top, "one")
    with remote("file", top) as server:
        said = refused(file=server.uri, allow_dir="/", cwd=tmp_path)
    assert "'base.qcow2' is relative, and an image behind NBD lies in no directory" in said


def test_an_absolute_backing_name_wants_allow_dir(tmp_path: Path) -> None:
    base = RandomImage(tmp_path / "base.qcow2", seed=1)
    base.make([])
    top = RandomImage(tmp_path / "top.qcow2", seed=2, backing=(base.path, "qcow2"))
    top.make(["one"], 4)
    with remote("file", top.path) as server:
        assert f"add allow-dir={tmp_path} " in refused(file=server.uri)
        with serve(file=server.uri, allow_dir=tmp_path) as ours:
            assert ours.copy("one") == qemu.content(top.path, "one")


def test_an_image_does_not_make_us_connect(tmp_path: Path) -> None:
    base = qemu.create(tmp_path / "base.qcow2", MiB)
    with remote("file", base) as server:
        top = qemu.create(tmp_path / "top.qcow2", MiB, backing=(server.uri, "qcow2"))
        assert "is a protocol name" in refused(file=top, allow_dir="/")


# --- The command ---


@pytest.mark.parametrize("words", [["list"], ["map", "one"], ["diff", "one", "two"], ["check"]])
def test_commands_say_of_the_remote_image_what_they_say_of_the_file(
    image: Path, words: list[str]
) -> None:
    with remote("file", image) as server:
        said = qcow2snap(words[0], server.uri, *words[1:])
    assert said == qcow2snap(words[0], image, *words[1:])


def test_a_snapshot_of_a_remote_image_is_copied(image: Path) -> None:
    target = image.with_name("copy.raw")
    with remote("file", image) as server:
        qcow2snap("copy", server.uri, "one", target)
        assert target.read_bytes() == qemu.content(image, "one")
        qcow2snap("copy", server.uri, "--since", "one", "two", target)
        assert target.read_bytes() == qemu.content(image, "two")
        assert "cannot be the target" in fails("copy", server.uri, "one", server.uri)


def test_what_needs_a_local_file_says_so(image: Path) -> None:
    with remote("file", image) as server:
        for words in ("split", "join"):
            said = fails(words, server.uri, image.with_name("out"))
            assert "is remote: copy the image to a local file first" in said
