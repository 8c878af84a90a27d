"""``qcow2snap copy`` to files, devices and NBD exports: QEMU's bytes, and holes stay holes."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from support import command, damage, devices, qemu
from support.qemu import KiB, MiB

SIZE = 8 * MiB
JUNK = b"\xaa"


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random content with three snapshots, the last of which is of another size."""
    path = tmp_path_factory.mktemp("copy") / "disk.qcow2"
    qemu.RandomImage(path, seed=6, size=SIZE, compressed=True).make(["one", "two"], 30)
    qemu.run("qemu-img", "resize", "-q", path, SIZE + 3 * MiB)
    qemu.io(path, f"write -P 7 {SIZE} 1M", "write -P 8 1M 64k")
    qemu.take(path, "long")
    return path


@contextmanager
def exported(directory: Path, *nbdkit: str) -> Iterator[str]:
    """The URI of an nbdkit that serves something writable."""
    socket, ready = directory / "target.sock", directory / "target.pid"
    process = subprocess.Popen(
        ["nbdkit", "-f", "-U", socket, "-P", ready, *nbdkit], stderr=subprocess.DEVNULL
    )
    try:
        while not ready.exists():
            assert process.poll() is None
            time.sleep(0.01)
        yield f"nbd+unix:///?socket={socket}"
    finally:
        process.terminate()
        process.wait()


@pytest.mark.parametrize("snapshot", ["one", "two", "long"])
def test_a_new_file_holds_the_snapshot(image: Path, tmp_path: Path, snapshot: str) -> None:
    out = tmp_path / "out.raw"
    said = command.qcow2snap("copy", image, snapshot, out)
    assert out.read_bytes() == qemu.snapshot_content(image, snapshot)
    assert said.startswith(f"{out}: ")
    assert said.count("\n") == 1


def test_holes_stay_holes(tmp_path: Path) -> None:
    path = qemu.create(tmp_path / "disk.qcow2", "1T")
    qemu.io(path, "write -P 1 5M 64k", "write -z 10M 64k", "write -P 1 999G 64k")
    qemu.take(path, "one")
    out = tmp_path / "out.raw"
    command.qcow2snap("copy", path, "one", out)
    assert out.stat().st_size == 1 << 40
    assert out.stat().st_blocks * 512 <= 3 * 64 * KiB


def test_a_file_that_is_there_is_replaced_and_keeps_its_mode(image: Path, tmp_path: Path) -> None:
    out, link = tmp_path / "out.raw", tmp_path / "link"
    out.write_bytes(JUNK * 20 * MiB)
    out.chmod(0o640)
    link.symlink_to(out)
    said = command.fails("copy", image, "one", link)
    assert said.endswith(f"'{link}' is there already: add --force to replace it")
    assert out.read_bytes() == JUNK * 20 * MiB
    command.qcow2snap("copy", "--force", image, "one", link)
    assert out.read_bytes() == qemu.snapshot_content(image, "one")
    assert out.stat().st_mode & 0o777 == 0o640
    assert link.is_symlink()


@pytest.mark.parametrize("nbdkit", [[], ["--filter=nozero"], ["--filter=noparallel"]], ids=str)
def test_an_nbd_export_is_written_and_zeroed(
    image: Path, tmp_path: Path, nbdkit: list[str]
) -> None:
    served = tmp_path / "served.raw"
    served.write_bytes(JUNK * (SIZE + MiB))
    with exported(tmp_path, *nbdkit, "file", str(served)) as uri:
        command.qcow2snap("copy", image, "two", uri)
    data = served.read_bytes()
    assert data[:SIZE] == qemu.snapshot_content(image, "two")
    assert data[SIZE:] == JUNK * MiB, "what lies behind the disk is none of our business"


def test_a_device_is_written_and_zeroed(image: Path, tmp_path: Path) -> None:
    with devices.loop_device(tmp_path, JUNK * SIZE) as device:
        command.qcow2snap("copy", image, "two", device)
        assert device.read_bytes() == qemu.snapshot_content(image, "two")


def test_a_device_that_is_too_small_is_not_touched(image: Path, tmp_path: Path) -> None:
    with devices.loop_device(tmp_path, JUNK * (SIZE - 512)) as device:
        said = command.fails("copy", image, "two", device)
        assert device.read_bytes() == JUNK * (SIZE - 512)
    assert "too small" in said
    assert str(SIZE) in said


def test_an_export_that_is_too_small_is_not_touched(image: Path, tmp_path: Path) -> None:
    with exported(tmp_path, "memory", "1M") as uri:
        assert "too small" in command.fails("copy", image, "two", uri)


def test_a_server_that_fails_is_one_line(image: Path, tmp_path: Path) -> None:
    failing = ["--filter=error", "memory", "64M", "error-pwrite=ENOSPC", "error-pwrite-rate=100%"]
    with exported(tmp_path, *failing) as uri:
        said = command.fails("copy", image, "two", uri)
    assert "No space left" in said
    assert "partly written" in said


REFUSED = {
    "the image itself": ("disk.qcow2", "which is being copied"),
    "a directory": (
        "directory",
        "is a directory: give a file, a block device, a FIFO or an NBD URI",
    ),
    "a place that is not there": ("none/out.raw", "there is no directory"),
    "a server that is not there": ("nbd+unix:///?socket=none", "No such file or directory"),
}


@pytest.mark.parametrize(("target", "expected"), REFUSED.values(), ids=REFUSED.keys())
def test_a_target_that_will_not_do_is_one_line(
    image: Path, tmp_path: Path, target: str, expected: str
) -> None:
    (tmp_path / "disk.qcow2").symlink_to(image)
    (tmp_path / "directory").mkdir()
    target = target.replace("none", f"{tmp_path}/none") if ":" in target else tmp_path / target
    assert expected in command.fails("copy", "--force", image, "one", target)


def test_no_such_snapshot_is_one_line(image: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.raw"
    assert "it has 1 'one', 2 'two'" in command.fails("copy", image, "three", out)
    assert os.listdir(tmp_path) == []


def test_a_read_error_leaves_the_old_file(image: Path, tmp_path: Path) -> None:
    path = qemu.create(tmp_path / "disk.qcow2", SIZE)
    qemu.io(path, "write -P 1 1M 4M", "write -c -P 1 5M 64k")
    qemu.take(path, "one")
    out = tmp_path / "out.raw"
    out.write_bytes(b"old")
    qemu.patch(path, damage.stream(path, "one", 5 * MiB)[0], b"\xff" * 16)
    assert "stream" in command.fails("copy", "--force", path, "one", out)
    assert out.read_bytes() == b"old"
    assert sorted(os.listdir(tmp_path)) == ["disk.qcow2", "out.raw"]


@pytest.mark.parametrize("where", ["[::1/x", "localhost:1/x"])
def test_a_target_that_cannot_be_opened_is_named_without_its_password(
    image: Path, where: str
) -> None:
    line = command.fails("copy", image, "one", f"nbd://alice:secret@{where}")
    assert "nbd://" in line
    assert "secret" not in line
