"""``qcow2snap mount --filesystem``: the files in a snapshot, read without privileges."""

from __future__ import annotations

import os
import shutil
import signal
from hashlib import sha256
from pathlib import Path

import pytest
from support import command, qemu
from support.qemu import MiB
from support.running import eventually, processes_with, started, until

from qcow2snap_core.errors import UsageError
from qcow2snap_core.host.readers import reader

SIZE = 8 * MiB


def needs(*tools: str) -> pytest.MarkDecorator:
    missing = [t for t in tools if shutil.which(t, path=f"{os.environ['PATH']}:/usr/sbin") is None]
    reason = "no FUSE here" if not os.access("/dev/fuse", os.W_OK) else f"no {missing} here"
    return pytest.mark.skipif(bool(missing) or reason == "no FUSE here", reason=reason)


ext = needs("fuse2fs", "mke2fs")


@pytest.fixture
def where(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory to mount on; temporary files go where the test can see what is left."""
    for name in ("mnt", "temporary"):
        (tmp_path / name).mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "temporary"))
    return tmp_path / "mnt"


def snapshot_of(raw: Path) -> Path:
    """An image whose snapshot ``one`` has this content, and whose active disk has nothing."""
    path = raw.with_suffix(".qcow2")
    qemu.run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", raw, path)
    qemu.take(path, "one")
    qemu.io(path, f"discard 0 {SIZE}")
    return path


def ext4(directory: Path) -> Path:
    """A raw ext4 filesystem as a crash leaves it: the last change is in its journal alone."""
    raw, files = directory / "ext4.raw", directory / "files"
    files.mkdir()
    (files / "name").write_text("old")
    (files / "secret").write_text("of root alone")
    (files / "secret").chmod(0o600)
    qemu.run("mke2fs", "-q", "-t", "ext4", "-d", files, raw, f"{SIZE >> 10}k")
    block = qemu.run("debugfs", "-R", "blocks /name", raw).split()[0]
    (directory / "block").write_bytes(b"new".ljust(1024, b"\0"))
    journal = f"jo\njw -b {block} {directory}/block\njc\n"
    qemu.run("debugfs", "-w", "-f", "/dev/stdin", raw, input=journal)
    return raw


@pytest.fixture(scope="module")
def disk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return snapshot_of(ext4(tmp_path_factory.mktemp("ext4")))


def digest(path: Path) -> str:
    return sha256(path.read_bytes()).hexdigest()


def assert_nothing_is_left(path: Path, where: Path) -> None:
    eventually(lambda: not processes_with(str(path)) and not processes_with(str(where)))
    assert str(where.parent) not in Path("/proc/mounts").read_text()
    assert os.listdir(where) == os.listdir(where.with_name("temporary")) == []


@ext
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_files_are_there_until_interrupted(disk: Path, where: Path, number: int) -> None:
    before = digest(disk)
    with started("mount", "--filesystem", disk, "one", where) as process:
        until((where / "name").exists, process)
        assert (where / "name").read_text() == "new"  # from the journal
        assert (where / "secret").read_text() == "of root alone"
        with pytest.raises(OSError, match="Read-only"):
            (where / "other").write_text("x")
        assert process.stdout
        assert process.stdout.readline() == f"{where} is there until Ctrl-C\n"
        process.send_signal(number)
        _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (128 + number, "")
    assert_nothing_is_left(disk, where)
    assert digest(disk) == before


@ext
def test_unmounting_ends_it(disk: Path, where: Path) -> None:
    with started("mount", "--filesystem", disk, "one", where) as process:
        until((where / "name").exists, process)
        qemu.run("fusermount3", "-u", where)
        assert process.wait(60) == 0
    assert_nothing_is_left(disk, where)


@ext
def test_after_a_kill_nothing_is_left(disk: Path, where: Path) -> None:
    with started("mount", "--filesystem", disk, "one", where) as process:
        assert process.stdout
        assert process.stdout.readline()
        process.kill()
        process.wait(60)
    assert_nothing_is_left(disk, where)


def partitioned(raw: Path, *more: tuple[int, int]) -> Path:
    """A disk with the content as its first partition; the first sectors and the numbers of sectors
    of others may follow."""
    entries = b"".join(
        bytes([0, 0, 0, 0, 0x83, 0, 0, 0])
        + first.to_bytes(4, "little")
        + count.to_bytes(4, "little")
        for first, count in [(2048, SIZE // 512), *more]
    )
    mbr = bytes(446) + entries.ljust(64, b"\0") + b"\x55\xaa"
    whole = raw.with_name("whole.raw")
    whole.write_bytes(mbr.ljust(MiB, b"\0") + raw.read_bytes())
    return whole


@ext
def test_the_only_partition_needs_no_number(tmp_path: Path, where: Path) -> None:
    path = snapshot_of(partitioned(ext4(tmp_path)))
    with started("mount", "--filesystem", path, "one", where) as process:
        until((where / "name").exists, process)
        assert (where / "name").read_text() == "new"


@ext
def test_a_partition(tmp_path: Path, where: Path) -> None:
    path = snapshot_of(partitioned(ext4(tmp_path), (64, 128)))
    said = command.fails("mount", "--filesystem", path, "one", where)
    assert "this disk has 2 partitions: name one, --partition 1 (Linux, " in said
    line = ["mount", "--filesystem", "--partition", 1, path, "one", where]
    with started(*line) as process:
        until((where / "name").exists, process)
        assert (where / "name").read_text() == "new"


@needs("ntfs-3g", "mkntfs", "ntfscp")
def test_ntfs(tmp_path: Path, where: Path) -> None:
    raw = tmp_path / "ntfs.raw"
    with open(raw, "wb") as f:
        f.truncate(SIZE)
    qemu.run("mkntfs", "-q", "-F", "-Q", raw)
    (tmp_path / "name").write_text("new")
    qemu.run("ntfscp", "-q", raw, tmp_path / "name", "name")
    path = snapshot_of(raw)
    with started("mount", "--filesystem", path, "one", where) as process:
        until((where / "name").exists, process)
        assert (where / "name").read_text() == "new"
        process.terminate()
        assert process.communicate(timeout=60)[1] == ""
    assert_nothing_is_left(path, where)


@ext
def test_a_damaged_filesystem_is_one_line(tmp_path: Path, where: Path) -> None:
    raw = ext4(tmp_path)
    qemu.patch(raw, 1024 + 4, b"\xff" * 20)  # the superblock's numbers of blocks
    path = snapshot_of(raw)
    assert command.fails("mount", "--filesystem", path, "one", where)
    assert_nothing_is_left(path, where)


STARTS = {
    "ext": (bytes(1080) + b"\x53\xef", "ext4 filesystem: install fuse2fs or guestmount"),
    "NTFS": (b"\xeb\x52\x90NTFS    ", "NTFS filesystem: install ntfs-3g or guestmount"),
    "FAT": (b"\xeb\x3c".ljust(510, b"\0") + b"\x55\xaa", "NTFS filesystem: install guestmount"),
    "MBR": (bytes(510) + b"\x55\xaa", "partitions: choose a partition with --partition"),
    "GPT": (bytes(512) + b"EFI PART", "partitions: choose a partition with --partition"),
    "zeros": (bytes(4096), "nothing but zeros"),
}


@pytest.mark.parametrize(("start", "expected"), STARTS.values(), ids=STARTS.keys())
def test_what_cannot_be_read_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, start: bytes, expected: str
) -> None:
    (tmp_path / "disk").write_bytes(start)
    monkeypatch.setenv("PATH", str(tmp_path))  # nothing is installed
    with pytest.raises(UsageError, match=expected):
        reader(str(tmp_path / "disk"), "/mnt")
