"""What keeps the server from starting is said in one line that says what to do; and what nbdkit
does before and beside serving: --dump-plugin, going into the background."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import struct
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import nbd
import pytest
from support import damage, qemu
from support.qemu import KiB, MiB
from support.server import PLUGIN, command, refused, serve


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    path = qemu.create(tmp_path / "disk.qcow2", MiB)
    qemu.take(path, "a")
    qemu.take(path, "it's\n\x1b[2J")
    return path


# --- Keys ---


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        (["fil=x"], "unknown key fil=: the keys are file, snapshot, snapshot-id, snapshot-name, "),
        (["snapshot_id=1"], "unknown key snapshot_id=: the keys are "),
        (["snapshot=a", "snapshot=b"], "snapshot= is given twice: give it once"),
        (["snapshot.id=1", "snapshot-id=1"], "snapshot-id= is given twice: give it once"),
        (["file=x"], "file= is given twice: give it once"),
        (["backing-format=vmdk"], "backing-format=vmdk: give raw or qcow2"),
        (["backing-format="], "backing-format=: give raw or qcow2"),
        (["l2-cache-size=many"], "l2-cache-size=: 'many' is no size: give bytes, or a number "),
        (["cluster-cache-size=-1"], "cluster-cache-size=: '-1' is no size: give bytes, or a "),
        (["cluster-cache-size=99E"], "cluster-cache-size=: '99E' is too large a size"),
        (["allow-dir="], "allow-dir= is empty: give a path"),
        (["allow-dir=/nowhere"], "allow-dir=/nowhere: no such file or directory: give an existing"),
        (["allow-dir=/dev/null"], "allow-dir=/dev/null: not a directory: give an existing"),
    ],
    ids=lambda x: "+".join(x) if isinstance(x, list) else "",
)
def test_a_bad_key_or_value(disk: Path, keys: list[str], said: str) -> None:
    assert said in refused(f"file={disk}", *keys)


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ([], "no image is given: add file=disk.qcow2"),
        (["snapshot=a"], "no image is given: add file=disk.qcow2"),
        (["file="], "file= is empty: give a path"),
    ],
)
def test_no_image(keys: list[str], said: str) -> None:
    assert said in refused(*keys)


@pytest.mark.parametrize(
    "keys", [["snapshot=b"], ["snapshot-id=3"], ["snapshot-id=1", "snapshot-name=b"]]
)
def test_no_such_snapshot_lists_those_there_are(disk: Path, keys: list[str]) -> None:
    line = refused(f"file={disk}", *keys)
    assert f"in '{disk}': it has 1 'a', 2 'it's\\n\\x1b[2J'" in line


def test_no_snapshots_at_all(tmp_path: Path) -> None:
    path = qemu.create(tmp_path / "disk.qcow2", MiB)
    assert "no snapshot 'a' in " in (line := refused(file=path, snapshot="a"))
    assert line.endswith(": it has none")


# --- Files ---


def a_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as s:
        s.bind(str(path))


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda path: None, "cannot open '{}': no such file or directory"),
        (lambda path: path.symlink_to("nowhere"), "cannot open '{}': no such file or directory"),
        (lambda path: path.symlink_to(path), "cannot open '{}': too many levels of symbolic links"),
        (os.mkfifo, "'{}' is a FIFO: give a regular file or a block device"),
        (Path.mkdir, "'{}' is a directory: give a regular file or a block device"),
        (a_socket, "'{}' is a socket: give a regular file or a block device"),
        (
            lambda path: path.symlink_to("/dev/zero"),
            "'{}' is a character device: give a regular file or a block device",
        ),
        (Path.touch, "'{}': not a qcow2 image (qemu-img info tells what it is)"),
        (lambda path: path.write_bytes(b"QFI\xfb" * 10), "'{}': the file ends inside the qcow2 he"),
        (lambda path: path.write_bytes(b"x" * 99999), "'{}': not a qcow2 image (qemu-img info te"),
    ],
    ids="missing dangling loop fifo directory socket device empty header raw".split(),
)
def test_what_is_no_image(tmp_path: Path, make: Callable[[Path], object], said: str) -> None:
    path = tmp_path / "x"
    make(path)
    assert said.format(path) in refused(file=path)


@pytest.mark.parametrize(
    ("offset", "field", "said"),
    [
        (4, struct.pack(">I", 1), "qcow2 version 1 is not supported, only 2 and 3 are"),
        (20, struct.pack(">I", 63), "cluster_bits is 63, the format allows 9 to 21"),
        (32, struct.pack(">I", 9), "encryption method 9 is unknown"),
        (79, b"\x02", "marked corrupt, its tables may not be what they say: run qemu-img check"),
        (72, b"\x80", "it needs features that are not supported: bit 63"),
    ],
)
def test_an_image_that_cannot_be_read(disk: Path, offset: int, field: bytes, said: str) -> None:
    qemu.patch(disk, offset, field)
    line = refused(file=disk)
    assert f"'{disk}': " in line
    assert said in line


# --- Backing files ---


def overlay(directory: Path, name: str, fmt: str = "raw") -> Path:
    """An image that names any backing file, also one that is not there."""
    directory.mkdir(exist_ok=True)
    path = qemu.create(directory / "disk.qcow2", MiB)
    qemu.take(path, "s")
    qemu.run("qemu-img", "rebase", "-u", "-b", "placeholder", "-F", fmt, path)
    qemu.patch(path, qemu.field64(path, 8), name.encode())
    qemu.patch(path, 16, struct.pack(">I", len(name)))
    return path


@pytest.fixture
def elsewhere(tmp_path: Path) -> Path:
    path = tmp_path / "images-old" / "base.raw"
    path.parent.mkdir()
    path.write_bytes(b"b" * MiB)
    return path


@pytest.mark.parametrize(
    "name", ["{}", "../images-old/base.raw", "link", "file:{}", "below/../../images-old/base.raw"]
)
def test_a_backing_file_outside_its_directory(tmp_path: Path, elsewhere: Path, name: str) -> None:
    path = overlay(tmp_path / "images", name.format(elsewhere))
    (path.parent / "link").symlink_to(elsewhere)
    (path.parent / "below").mkdir()
    line = refused(file=path)
    written = name.format(elsewhere)
    which = f"'{elsewhere}'"
    if written != str(elsewhere):
        which = f"'{written}', which leads to {which},"
    assert f"the backing file of '{path}': {which} lies outside the directory" in line
    hint = re.search(r"add (allow-dir=\S+) if you trust it", line)
    assert hint is not None
    with serve(f"file={path}", hint[1]) as server:
        assert server.read() == b"b" * MiB


@pytest.mark.parametrize(
    "name", ["nbd:localhost:1", "nbd://localhost/x", "json:{}", "fat:/etc", "http://x/y", "a:b"]
)
def test_a_protocol_name_is_never_followed(tmp_path: Path, name: str) -> None:
    path = overlay(tmp_path, name)
    said = f"'{name}' is a protocol name, only plain files are opened: qemu-img rebase -u can "
    assert said in refused(f"file={path}", "allow-dir=/")


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("missing", "cannot open '{0}/missing': no such file or directory"),
        ("fifo", "'{0}/fifo' is a FIFO: give a regular file or a block device"),
        ("/dev/zero", "'/dev/zero' is a character device: give a regular file or a block device"),
        (".", "'{0}/.' is a directory: give a regular file or a block device"),
    ],
)
def test_a_backing_file_that_is_none(tmp_path: Path, name: str, said: str) -> None:
    path = overlay(tmp_path, name)
    os.mkfifo(tmp_path / "fifo")
    line = refused(f"file={path}", "allow-dir=/")
    assert f"the backing file of '{path}': " + said.format(tmp_path) in line


def test_a_backing_file_of_another_format(tmp_path: Path) -> None:
    path = overlay(tmp_path, "base", fmt="vmdk")
    assert "has the format 'vmdk': only raw and qcow2 can be read" in refused(file=path)


def test_a_chain_that_loops(tmp_path: Path) -> None:
    path = overlay(tmp_path, "disk.qcow2", fmt="qcow2")
    assert f"the backing chain of '{path}' loops" in refused(file=path)


def test_a_backing_file_without_a_format_is_not_guessed(tmp_path: Path) -> None:
    path = overlay(tmp_path, "base")
    shutil.copyfile(qemu.create(tmp_path / "other.qcow2", 128 * KiB), tmp_path / "base")
    damage.drop_backing_format(path)
    said = "not record the format of its backing file 'base': add backing-format=raw or backing-fo"
    assert said in refused(file=path)
    for fmt, start in (("raw", b"QFI\xfb"), ("qcow2", bytes(4))):
        with serve(file=path, backing_format=fmt) as server:
            assert server.read()[:4] == start


def test_a_format_key_does_not_replace_a_recorded_one(tmp_path: Path) -> None:
    path = overlay(tmp_path, "base")
    shutil.copyfile(qemu.create(tmp_path / "other.qcow2", 128 * KiB), tmp_path / "base")
    with serve(file=path, backing_format="qcow2") as server:
        assert server.read()[:4] == b"QFI\xfb"


# --- Beside serving ---


def test_dump_plugin_tells_the_version() -> None:
    said = qemu.run("nbdkit", "python", PLUGIN, "--dump-plugin")
    assert re.search(r"^qcow2snap_version=\d+\.\d+", said, re.MULTILINE)


def test_relative_paths_are_of_where_it_was_started(tmp_path: Path, elsewhere: Path) -> None:
    """nbdkit changes to the root directory when it goes into the background."""
    overlay(tmp_path / "images", str(elsewhere))
    line = command(file="images/disk.qcow2", allow_dir="images-old")
    line[1:1] = ["-U", str(tmp_path / "socket"), "-P", str(tmp_path / "pid")]
    subprocess.run(line, cwd=tmp_path, check=True, timeout=60)  # returns once it is up
    pid = int((tmp_path / "pid").read_text())
    process = os.pidfd_open(pid)
    try:
        assert os.readlink(f"/proc/{pid}/cwd") == "/"
        client = nbd.NBD()
        client.connect_unix(str(tmp_path / "socket"))
        assert client.pread(4, 0) == b"bbbb"
        client.shutdown()
    finally:
        signal.pidfd_send_signal(process, signal.SIGTERM)
        os.close(process)
        deadline = time.monotonic() + 20
        while Path(f"/proc/{pid}/fd/0").exists():  # a zombie, if nobody collects it, has none
            assert time.monotonic() < deadline
            time.sleep(0.01)
