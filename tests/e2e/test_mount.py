"""``qcow2snap mount`` and ``serve``: a snapshot as a file, and nothing left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from support import command, damage, qemu
from support.qemu import KiB, MiB
from support.running import eventually, processes_with, started, until
from support.server import ROOT

pytestmark = pytest.mark.skipif(not os.access("/dev/fuse", os.W_OK), reason="no FUSE here")

SIZE = 4 * MiB


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("mount") / "disk.qcow2"
    qemu.RandomImage(path, seed=9, size=SIZE).make(["one"])
    return path


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_disk_is_there_until_interrupted(image: Path, tmp_path: Path, number: int) -> None:
    with started("mount", image, "one", tmp_path) as process:
        until((tmp_path / "disk").exists, process)
        assert (tmp_path / "disk").read_bytes() == qemu.content(image, "one")
        with (
            pytest.raises(OSError, match=r"Permission denied|Read-only"),
            open(tmp_path / "disk", "r+b") as f,
        ):
            f.write(b"x")
        process.send_signal(number)
        _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (128 + number, "")
    assert os.listdir(tmp_path) == []
    eventually(lambda: not processes_with(str(image)))


def test_a_name_that_no_command_line_can_hold(image: Path, tmp_path: Path) -> None:
    copy = tmp_path / "disk.qcow2"
    copy.write_bytes(image.read_bytes())
    damage.rename(copy, {"one": b"o\0ne"})
    directory = tmp_path / "directory"
    directory.mkdir()
    with started("mount", copy, "1", directory) as process:
        until((directory / "disk").exists, process)
        assert (directory / "disk").read_bytes() == qemu.content(image, "one")


def test_unmounting_ends_it(image: Path, tmp_path: Path) -> None:
    with started("mount", image, "one", tmp_path) as process:
        until((tmp_path / "disk").exists, process)
        # Refused while anybody looks at the directory, as the command itself did just now.
        line = ["fusermount3", "-q", "-u", tmp_path]
        eventually(lambda: subprocess.run(line, check=False).returncode == 0)
        assert process.wait(60) == 0


def test_after_a_kill_nothing_stays_mounted(image: Path, tmp_path: Path) -> None:
    with started("mount", image, "one", tmp_path) as process:
        until((tmp_path / "disk").exists, process)
        process.kill()
        process.wait(60)
        eventually(lambda: not os.path.ismount(tmp_path))


@pytest.mark.parametrize("stream", [">/dev/full", ">&-", "2>/dev/full", ">&- 2>&- <&-"])
def test_it_is_there_whether_that_can_be_said_or_not(
    image: Path, tmp_path: Path, stream: str
) -> None:
    line = f'exec "$@" {stream}'
    words = ["-m", "qcow2snap_core", "mount", image, "one", tmp_path]
    process = subprocess.Popen(["sh", "-c", line, "sh", sys.executable, *words], cwd=ROOT)
    try:
        eventually(lambda: process.poll() is not None or (tmp_path / "disk").exists())
        assert (tmp_path / "disk").read_bytes() == qemu.content(image, "one")
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 130
    finally:
        process.terminate()
        process.wait(60)


def test_one_partition(tmp_path: Path) -> None:
    path, where = qemu.create(tmp_path / "disk.qcow2", SIZE), tmp_path / "mnt"
    where.mkdir()
    entry = bytes([0, 0, 0, 0, 0x83, 0, 0, 0]) + (128).to_bytes(4, "little") * 2
    (tmp_path / "mbr").write_bytes(bytes(446) + entry + bytes(48) + b"\x55\xaa")
    qemu.io(path, f"write -s {tmp_path}/mbr 0 512", "write -P 7 64k 64k")
    qemu.take(path, "one")
    said = command.fails("mount", "--partition", 2, path, "one", where)
    assert said.endswith(": this disk has 1 partition: name one, --partition 1 (Linux, 64 KiB)")
    with started("mount", "--partition", 1, path, "one", where) as process:
        until((where / "disk").exists, process)
        assert (where / "disk").read_bytes() == b"\7" * 64 * KiB


def encrypted(path: Path, secret: Path) -> None:
    """An image with 7s in its first 64 KiB and a snapshot, and its passphrase in a file."""
    key = ["--object", f"secret,id=s,file={secret}"]
    options = "encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10"
    qemu.run("qemu-img", "create", "-q", *key, "-f", "qcow2", "-o", options, path, SIZE)
    opened = f"driver=qcow2,file.filename={path},encrypt.key-secret=s"
    qemu.run("qemu-io", *key, "--image-opts", "-c", "write -P 7 0 64k", opened)
    qemu.run("qemu-img", "snapshot", "-c", "one", *key, "--image-opts", opened)


@pytest.mark.parametrize("length", [13, 64 * KiB])  # a pipe takes no more than 64 KiB
def test_an_encrypted_image_with_its_secret_kept_out_of_sight(tmp_path: Path, length: int) -> None:
    path, where = tmp_path / "disk.qcow2", tmp_path / "mnt"
    words = f"correct horse {os.getpid()}"
    secret = words.ljust(length, "!")
    where.mkdir()
    (tmp_path / "secret").write_text(secret)
    encrypted(path, tmp_path / "secret")
    line = ["mount", path, "one", where, "--passphrase", f"+{tmp_path}/secret"]
    with started(*line) as process:
        until((where / "disk").exists, process)
        assert (where / "disk").read_bytes() == b"\7" * 64 * KiB + bytes(SIZE - 64 * KiB)
        assert processes_with(words) == []


def test_a_passphrase_of_two_lines_is_refused_and_not_cut(tmp_path: Path) -> None:
    path, where = tmp_path / "disk.qcow2", tmp_path / "mnt"
    where.mkdir()
    (tmp_path / "secret").write_text("correct\nhorse")
    encrypted(path, tmp_path / "secret")
    secret = "--passphrase=correct\nhorse"
    assert command.run("copy", path, "one", tmp_path / "copy", secret).returncode == 0
    assert (tmp_path / "copy").read_bytes()[: 64 * KiB] == b"\7" * 64 * KiB
    said = command.fails("mount", path, "one", where, secret)
    assert said == "qcow2snap: --passphrase holds a line feed: nbdkit reads one line only"


REFUSED = {
    "no such snapshot": (["three", "mnt"], "it has 1 'one'"),
    "no such directory": (["one", "none"], "there is no directory"),
    "no partitions": (["one", "mnt", "--partition", "1"], "has no partitions: leave out --part"),
}


@pytest.mark.parametrize(("line", "expected"), REFUSED.values(), ids=REFUSED.keys())
def test_what_cannot_be_mounted_is_one_line(
    image: Path, tmp_path: Path, line: list[str], expected: str
) -> None:
    (tmp_path / "mnt").mkdir()
    snapshot, directory, *more = line
    said = command.fails("mount", image, snapshot, tmp_path / directory, *more)
    assert expected in said


def test_serve_passes_on_what_follows(image: Path) -> None:
    run = ["-U", "-", "--filter=offset", f"range={MiB}", "--run", 'nbdinfo --size "$uri"']
    assert command.qcow2snap("serve", image, "one", *run) == f"{MiB}\n"


def test_serve_without_a_snapshot_serves_all(image: Path) -> None:
    run = [
        "-U",
        "-",
        "l2-cache-size=1M",
        "--run",
        'nbdinfo --size "nbd+unix:///1?socket=$unixsocket"',
    ]
    assert command.qcow2snap("serve", image, *run) == f"{SIZE}\n"
