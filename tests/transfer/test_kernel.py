"""What the kernel copies from file to file, and that it is believed no more than a read is."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from support import command, damage, qemu
from support.qemu import KiB, MiB

from qcow2snap_core.errors import SnapshotGone
from qcow2snap_core.image.opener import Options, open_image
from qcow2snap_core.transfer.kernel import KernelCopy

SIZE = 8 * MiB


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """Plain data, a compressed cluster, zeros, a hole, and data of a raw and of a qcow2 layer."""
    (tmp_path / "base.raw").write_bytes(b"\5" * SIZE)
    middle = qemu.create(tmp_path / "middle.qcow2", SIZE, backing=("base.raw", "raw"))
    qemu.io(middle, "write -P 4 5M 1M")
    path = qemu.create(tmp_path / "disk.qcow2", SIZE, backing=("middle.qcow2", "qcow2"))
    qemu.io(path, "write -P 1 0 1M", "write -c -P 2 1M 64k", "write -z 2M 1M")
    qemu.take(path, "s")
    return path


@pytest.fixture
def out(tmp_path: Path) -> Iterator[int]:
    fd = os.open(tmp_path / "out", os.O_RDWR | os.O_CREAT)
    yield fd
    os.close(fd)


@pytest.mark.parametrize(
    ("offset", "byte"), [(512, 1), (5 * MiB, 4), (6 * MiB, 5), (MiB, None), (2 * MiB, None)]
)
def test_only_what_a_file_holds_as_it_is(image: Path, out: int, offset: int, byte: int) -> None:
    with open_image(str(image), Options()) as opened:
        done = KernelCopy(opened.snapshot("s"), out).copy(offset, 64 * KiB)
    assert done == (64 * KiB if byte else 0)
    assert os.fstat(out).st_size == (offset + done if byte else 0)
    assert os.pread(out, SIZE, offset) == bytes([byte or 0]) * done


def test_it_ends_where_the_kind_changes(image: Path, out: int) -> None:
    with open_image(str(image), Options()) as opened:
        assert KernelCopy(opened.snapshot("s"), out).copy(MiB - 4 * KiB, MiB) == 4 * KiB


def test_a_snapshot_that_was_deleted_is_not_copied(image: Path, out: int) -> None:
    with open_image(str(image), Options()) as opened:
        disk = opened.snapshot("s")
        copy = KernelCopy(disk, out)
        assert copy.copy(0, 64 * KiB)
        qemu.delete(image, "s")
        qemu.io(image, "write -P 9 0 1M")
        with pytest.raises(SnapshotGone):
            copy.copy(64 * KiB, 64 * KiB)


@pytest.mark.parametrize("there", [0, 36 * KiB])
def test_what_lies_past_the_end_of_the_file_is_an_error(
    image: Path, out: int, tmp_path: Path, there: int
) -> None:
    """The kernel copies nothing there, or less, and a read has the last word."""
    end = -(-image.stat().st_size // (64 * KiB)) * 64 * KiB
    os.truncate(image, end + there)
    qemu.patch(image, damage.l2_entry(image, "s", 64 * KiB), end.to_bytes(8, "big"))
    with open_image(str(image), Options()) as opened:
        assert KernelCopy(opened.snapshot("s"), out).copy(64 * KiB, 64 * KiB) == there
    line = command.fails("copy", image, "s", tmp_path / "copied")
    assert "the end of the file" in line
    assert not (tmp_path / "copied").exists()


def test_another_filesystem_is_no_error(image: Path, tmp_path: Path) -> None:
    if os.stat("/dev/shm").st_dev == tmp_path.stat().st_dev:
        pytest.skip("/dev/shm is the same filesystem")
    out = Path("/dev/shm") / f"qcow2snap-test-{os.getpid()}"
    try:
        command.qcow2snap("copy", image, "s", out)
        assert out.read_bytes() == qemu.content(image)
    finally:
        out.unlink(missing_ok=True)


def test_a_bar_tells_when_it_waits_for_the_disk(image: Path, tmp_path: Path) -> None:
    pytest.importorskip("tqdm")
    ours, theirs = command.terminal()
    try:
        assert command.run("copy", image, "s", tmp_path / "copied", stderr=theirs).returncode == 0
        os.write(theirs, b"end")
        said = b""
        while not said.endswith(b"end"):
            said += os.read(ours, 4096)
    finally:
        os.close(ours)
        os.close(theirs)
    assert b"copying:" in said
    assert b"waiting for the disk:" in said
