"""The active disk is read only while no QEMU writes to it, and no QEMU notices."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from support import qemu
from support.command import fails, qcow2snap, run
from support.qemu import KiB, MiB

from qcow2snap_core.errors import UsageError
from qcow2snap_core.image.opener import open_image
from qcow2snap_core.storage.locks import LockGuard


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    """With a backing file and a snapshot."""
    base = qemu.create(tmp_path / "base.qcow2", MiB)
    path = qemu.create(tmp_path / "disk.qcow2", MiB, backing=(base.name, "qcow2"))
    qemu.io(path, "write -P 1 0 64k")
    qemu.take(path, "one")
    qemu.io(path, "write -P 2 64k 64k")
    return path


@contextmanager
def opened(*options: object) -> Iterator[subprocess.Popen[bytes]]:
    """A qemu-io that has an image open, and has said so."""
    shell = ["qemu-io", "-f", "qcow2", *map(str, options)]
    with subprocess.Popen(shell, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin
        assert process.stdout
        process.stdin.write(b"length\n")
        process.stdin.flush()
        process.stdout.readline()
        yield process
        process.stdin.close()


def commands(path: Path) -> dict[str, list[object]]:
    out = path.parent / "out"
    return {
        "map": ["map", path, "@active"],
        "diff": ["diff", path, "one", "@active"],
        "diff, as the old one": ["diff", path, "@active", "one"],
        "copy": ["copy", path, "@active", out],
        "split": ["split", path, out],
        "compact": ["compact", path, out],
        "join": ["join", path, out],
    }


NAMES = list(commands(Path()))


@pytest.mark.parametrize("written", ["disk.qcow2", "base.qcow2"])
@pytest.mark.parametrize("name", NAMES)
def test_refused_while_a_qemu_may_write(disk: Path, name: str, written: str) -> None:
    with opened(disk.with_name(written)):
        said = fails(*commands(disk)[name])
    advice = {
        "split": ", or use backup and then restore, which leave out the active disk",
        "compact": ", or use backup and then restore, which leave out the active disk",
        "join": "",
    }.get(name, ", or take a snapshot and read that")
    said_of_it = "is in use, a QEMU has it open for writing: shut the virtual machine down"
    assert said.endswith(f"{written}' {said_of_it}{advice}")
    assert sorted(os.listdir(disk.parent)) == ["base.qcow2", "disk.qcow2"]


@pytest.mark.parametrize("name", NAMES)
def test_allowed_while_a_qemu_reads(disk: Path, name: str) -> None:
    with opened("-r", disk):
        assert run(*commands(disk)[name]).returncode == 0


@pytest.mark.parametrize("name", ["map", "diff", "copy"])
def test_snapshots_do_not_mind(disk: Path, name: str) -> None:
    line = ["one" if word == "@active" else word for word in commands(disk)[name]]
    with opened(disk):
        qcow2snap(*line)


def test_check_says_that_it_may_be_changing(disk: Path) -> None:
    with opened(disk):
        done = run("check", disk)
    assert (done.returncode, done.stdout) == (0, "no damage found\n")
    assert done.stderr.startswith(f"qcow2snap: '{disk}' is in use, a QEMU has it open for writing")
    assert qcow2snap("check", disk) == "no damage found\n"


def test_a_running_storage_daemon(disk: Path, tmp_path: Path) -> None:
    node = f"driver=qcow2,node-name=n,file.driver=file,file.filename={disk}"
    pid = tmp_path / "pid"
    process = subprocess.Popen(
        ["qemu-storage-daemon", "--blockdev", node, "--daemonize", "--pidfile", str(pid)]
    )
    assert process.wait(60) == 0  # it is ready
    try:
        assert "is in use" in fails("map", disk, "@active")
    finally:
        os.kill(int(pid.read_text()), 15)


def test_one_that_starts_later_is_noticed(disk: Path) -> None:
    with open_image(str(disk)) as image:
        active = image.active_disk(LockGuard(image.files))
        assert active.pread(1, 64 * KiB) == b"\2"
        with opened(disk), pytest.raises(UsageError, match="is in use"):
            active.pread(1, 64 * KiB)


def locks(path: Path) -> list[str]:
    """What the kernel lists for it."""
    inode = f":{path.stat().st_ino} "
    return [line for line in Path("/proc/locks").read_text().splitlines() if inode in line]


def test_no_lock_is_taken(disk: Path) -> None:
    """Or QEMU could not open the image while we have it."""
    with open_image(str(disk)) as image:
        active = image.active_disk(LockGuard(image.files))
        active.pread(1, 0)
        with opened(disk) as user:
            assert user.poll() is None
            assert locks(disk)
        assert not locks(disk)
