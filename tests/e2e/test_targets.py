"""What may be a target: nothing is destroyed that was not meant, and nobody works in vain."""

from __future__ import annotations

import os
import socket
import stat
import subprocess
import sys
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from support import command, qemu
from support.devices import attached, loop_device, mounted
from support.qemu import MiB
from support.server import ROOT

COMMANDS = ["copy", "compact", "split", "join"]
WANTED = {
    "copy": "give a file, a block device, a FIFO or an NBD URI",
    "compact": "give a file",
    "split": "give a directory that is absent or empty",
    "join": "give a file",
}


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = qemu.create(tmp_path_factory.mktemp("targets") / "disk.qcow2", MiB)
    qemu.io(path, "write -P 7 0 1M")
    qemu.take(path, "s")
    return path


@pytest.fixture(scope="module")
def locked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An encrypted image, whose passphrase would have to be asked for."""
    path = tmp_path_factory.mktemp("targets") / "locked.qcow2"
    secret = ["--object", "secret,id=s,data=x", "-o", "encrypt.format=luks,encrypt.key-secret=s"]
    options = ",encrypt.iter-time=10"
    qemu.run(
        *("qemu-img", "create", "-q", "-f", "qcow2", *secret[:-1], secret[-1] + options, path, "1M")
    )
    return path


def line(kind: str, image: Path, target: object) -> list[object]:
    return [kind, image, *(["s"] if kind == "copy" else []), target]


def fails(kind: str, image: Path, target: object, cwd: Path = ROOT) -> str:
    """The one line with which the command fails."""
    done = subprocess.run(
        [sys.executable, "-m", "qcow2snap_core", *map(str, line(kind, image, target))],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdin=subprocess.DEVNULL,
    )
    assert done.returncode == 1, done
    assert not done.stdout
    (said,) = done.stderr.splitlines()
    return said


def make_fifo(path: Path) -> None:
    os.mkfifo(path)


def make_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as s:
        s.bind(str(path))


def make_null(path: Path) -> None:
    try:
        os.mknod(path, stat.S_IFCHR | 0o666, os.makedev(1, 3))
    except PermissionError:
        pytest.skip("only root may make a device node")


def make_full_directory(path: Path) -> None:
    path.mkdir()
    (path / "kept").touch()


SPECIAL = {
    "FIFO": make_fifo,
    "socket": make_socket,
    "character device": make_null,
}


@pytest.mark.parametrize("linked", [False, True])
@pytest.mark.parametrize(
    ("kind", "what"),
    [pair for pair in product(COMMANDS, SPECIAL) if pair != ("copy", "FIFO")],
)
def test_special_files_stay(
    image: Path, tmp_path: Path, kind: str, what: str, linked: bool
) -> None:
    target = tmp_path / "target"
    SPECIAL[what](target)
    before = os.lstat(target)
    name = tmp_path / "link" if linked else target
    if linked:
        name.symlink_to(target)
    assert f"'{name}' is a {what}: {WANTED[kind]}" in fails(kind, image, name)
    assert os.lstat(target) == before


@pytest.mark.parametrize("kind", ["split", "join"])
def test_block_devices_are_for_copies_only(image: Path, tmp_path: Path, kind: str) -> None:
    with loop_device(tmp_path, bytes(2 * MiB)) as device:
        assert f"'{device}' is a block device: {WANTED[kind]}" in fails(kind, image, device)
        assert device.is_block_device()
        command.qcow2snap(*line("copy", image, device))
    assert (tmp_path / "device.img").read_bytes() == bytes([7]) * MiB + bytes(MiB)


@pytest.mark.parametrize("kind", COMMANDS)
@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("", "the target's name is empty"),
        ("missing/out", "there is no directory 'missing': make it first"),
        ("missing/../out", "there is no directory 'missing/..': make it first"),
        ("file/out", "not a directory"),
        ("file/../out", "not a directory"),
        ("full", None),
        ("full/", None),
        ("full/..", None),
        ("dangling", "'dangling' is a symlink that leads nowhere: remove it first"),
        ("dangling/", "leads nowhere"),
        ("circle", "too many levels of symbolic links"),
        ("n" * 300, "file name too long"),
    ],
)
def test_names_that_will_not_do(
    image: Path, tmp_path: Path, kind: str, name: str, said: str | None
) -> None:
    make_full_directory(tmp_path / "full")
    (tmp_path / "file").write_text("kept")
    (tmp_path / "dangling").symlink_to("nowhere")
    (tmp_path / "circle").symlink_to("circle")
    before = sorted(tmp_path.rglob("*"))
    if said is None:  # a directory that is not empty
        said = "is not empty: give" if kind == "split" else f"is a directory: {WANTED[kind]}"
    assert said in fails(kind, image, name, cwd=tmp_path)
    assert sorted(tmp_path.rglob("*")) == before
    assert (tmp_path / "file").read_text() == "kept"


@pytest.mark.parametrize("kind", ["copy", "compact", "join"])
@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("empty", "'empty' is a directory: "),
        ("empty/", "'empty/' is a directory: "),
        (".", "'.' is a directory: "),
        ("new/", "there is no directory 'new/', and no file can be called that"),
        ("file/", "not a directory"),
    ],
)
def test_a_directory_is_no_name_for_a_file(
    image: Path, tmp_path: Path, kind: str, name: str, said: str
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("kept")
    assert said in fails(kind, image, name, cwd=tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["empty", "file"]


def test_split_does_not_replace_the_directory_that_one_is_in(image: Path, tmp_path: Path) -> None:
    before = os.stat(tmp_path)
    for name in (".", str(tmp_path), f"../{tmp_path.name}"):
        said = fails("split", image, name, cwd=tmp_path)
        assert f"'{name}' is the current directory: give a name in it" in said
    assert os.stat(tmp_path).st_ino == before.st_ino
    (tmp_path / "file").touch()
    assert f"'file' is a regular file: {WANTED['split']}" in fails(
        "split", image, "file", cwd=tmp_path
    )


def test_a_read_only_device_is_told_at_once(image: Path, tmp_path: Path) -> None:
    backing = tmp_path / "device.img"
    backing.write_bytes(bytes(2 * MiB))
    with attached(backing, "--read-only") as device:
        assert fails("copy", image, device).endswith(f"'{device}' is read-only")


@pytest.mark.parametrize("kind", ["split", "join"])
def test_an_nbd_uri_is_for_copies_only(image: Path, kind: str) -> None:
    said = fails(kind, image, "nbd://user@localhost/x")
    assert f"'nbd://localhost/x' is remote: {WANTED[kind]}" in said


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        *((kind, name) for kind in COMMANDS for name in ("out", "./sub/../out", "up/../out")),
        *(("split", name) for name in ("out/", "empty", "empty/", "to-empty")),
        *((kind, name) for kind in ("copy", "join") for name in ("file", "to-file")),
    ],
)
def test_names_that_will_do(image: Path, tmp_path: Path, kind: str, name: str) -> None:
    """Each is what it is for the kernel: ``up/..`` is the parent of where ``up`` leads."""
    here = tmp_path / "here"
    for directory in ("here", "here/sub", "here/empty", "there", "there/sub"):
        (tmp_path / directory).mkdir()
    (here / "up").symlink_to("../there/sub")
    (here / "file").write_bytes(b"old")
    (here / "to-file").symlink_to("file")
    (here / "to-empty").symlink_to("empty")
    force = ["--force"] if name in ("file", "to-file") else []
    done = subprocess.run(
        [sys.executable, "-m", "qcow2snap_core", *map(str, line(kind, image, name)), *force],
        cwd=here,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        timeout=120,
        check=True,
        stdout=subprocess.DEVNULL,
    )
    assert done.returncode == 0
    out = {
        "to-file": here / "file",
        "to-empty": here / "empty",
        "up/../out": tmp_path / "there/out",
    }
    made = out.get(name, here / name)
    if kind == "split":
        qemu.run("qemu-img", "check", "-q", made / "active.qcow2")
    elif kind in ("compact", "join"):
        qemu.run("qemu-img", "check", "-q", made)
    else:
        assert made.read_bytes() == bytes([7]) * MiB
    assert (here / "to-file").is_symlink()
    assert (here / "to-empty").is_symlink()


@pytest.mark.parametrize("kind", COMMANDS)
def test_a_mount_point_is_not_replaced(image: Path, tmp_path: Path, kind: str) -> None:
    """A rename would fail, but after all the work."""
    if kind == "split":
        with mounted(tmp_path / "mnt", "-t", "tmpfs", "tmpfs") as target:
            assert "is a mount point" in fails(kind, image, target)
        return
    (tmp_path / "inner").mkdir()
    for name in ("one", "inner/two"):
        (tmp_path / name).write_text("kept")
    done = subprocess.run(
        ["mount", "--bind", tmp_path / "inner/two", tmp_path / "one"], check=False, timeout=60
    )
    if done.returncode:
        pytest.skip("no mount here")
    try:
        assert "is a mount point" in fails(kind, image, tmp_path / "one")
    finally:
        qemu.run("umount", tmp_path / "one")


@pytest.mark.parametrize("kind", COMMANDS)
def test_a_read_only_filesystem_is_seen_at_once(image: Path, tmp_path: Path, kind: str) -> None:
    with mounted(tmp_path / "mnt", "-t", "tmpfs", "-o", "ro", "tmpfs") as where:
        said = fails(kind, image, where / "out")
    assert f"cannot write into the directory '{where}': read-only file system" in said


@pytest.mark.parametrize("kind", COMMANDS)
def test_a_bad_target_is_told_before_a_passphrase_is_asked_for(
    locked: Path, tmp_path: Path, kind: str
) -> None:
    """``-`` needs a terminal, and would fail for want of it."""
    target = tmp_path / "socket"
    make_socket(target)
    words = [*line(kind, locked, target), "--passphrase", "-"]
    assert "is a socket" in command.fails(*words)
    words = [*line(kind, locked, tmp_path / "out"), "--passphrase", "-"]
    assert "terminal" in command.fails(*words)


@pytest.fixture
def shared(image: Path) -> Iterator[Path]:
    """A directory that everybody reaches, with the image in it; pytest's own are private."""
    with TemporaryDirectory() as name:
        directory = Path(name)
        directory.chmod(0o777)
        (directory / "disk.qcow2").write_bytes(image.read_bytes())
        (directory / "disk.qcow2").chmod(0o644)
        yield directory


@pytest.mark.parametrize("kind", ["copy", "compact", "join"])
def test_what_one_may_not_replace_is_told_at_once(shared: Path, kind: str) -> None:
    out = shared / "out"
    out.write_text("kept")
    out.chmod(0o644)
    done = command.as_nobody(*line(kind, shared / "disk.qcow2", out))
    assert f"'{out}' may not be written: permission denied" in done.stderr
    out.chmod(0o666)
    shared.chmod(0o1777)
    done = command.as_nobody(*line(kind, shared / "disk.qcow2", out))
    assert f"'{out}' is another user's, which cannot be replaced in the sticky" in done.stderr
    shared.chmod(0o755)
    for target in (out, shared / "new"):
        done = command.as_nobody(*line(kind, shared / "disk.qcow2", target))
        assert f"cannot write into the directory '{shared}': permission denied" in done.stderr
        assert done.returncode == 1
    assert out.read_text() == "kept"


def test_an_update_in_place_needs_the_file_alone(shared: Path) -> None:
    out = shared / "out"
    out.write_bytes(bytes(MiB))
    out.chmod(0o666)
    shared.chmod(0o755)
    words = ["copy", shared / "disk.qcow2", "--since", "s", "--trust-base", "s", out]
    assert command.as_nobody(*words).returncode == 1
    assert command.as_nobody(*words, "--in-place").returncode == 0


def test_extracting_into_a_closed_directory_is_refused_at_once(shared: Path) -> None:
    shared.chmod(0o755)
    done = command.as_nobody("extract", shared / "disk.qcow2", "s", "/etc", shared)
    said = f"qcow2snap: cannot write into the directory '{shared}': permission denied\n"
    assert (done.returncode, done.stderr) == (1, said)
