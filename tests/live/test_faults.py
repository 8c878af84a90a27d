"""What happens to the file beside the server: locks, truncation, replacement."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path

import nbd
import pytest
from support import qemu
from support.guest import BLOCK, block
from support.live import CACHE_MODES, QmpError, running
from support.qemu import KiB, MiB
from support.server import serve

SIZE = 2 * MiB
CONTENT = b"".join(block(n, 1) for n in range(SIZE // BLOCK))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """An image of known content with one snapshot."""
    raw = tmp_path / "content.raw"
    raw.write_bytes(CONTENT)
    path = tmp_path / "disk.qcow2"
    qemu.run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", raw, path)
    qemu.take(path, "served")
    return path


def fails(handle: nbd.NBD, length: int, offset: int) -> bool:
    """Whether a read fails, with EIO."""
    try:
        handle.pread(length, offset)
    except nbd.Error as e:
        return e.errnum == errno.EIO
    return False


# --- Locks ---


@pytest.mark.parametrize("cache", CACHE_MODES)
@pytest.mark.parametrize("first", ["server", "qemu"])
def test_neither_keeps_the_other_from_starting(path: Path, cache: str, first: str) -> None:
    def work() -> None:
        """QEMU writes, takes, deletes; another QEMU is refused as ever."""
        with q.guest() as disk:
            disk.pwrite(b"!" * SIZE, 0)
        q.take("more")
        assert server.read("served") == CONTENT
        assert server.read("more") == b"!" * SIZE
        q.delete("more")
        with pytest.raises(AssertionError, match="lock"):
            qemu.io(path, "read 0 512")

    if first == "server":
        with serve(file=path) as server:
            assert server.read("served") == CONTENT
            with running(path, cache) as q:
                work()
            with running(path, cache) as q:
                work()
    else:
        with running(path, cache) as q:
            with serve(file=path) as server:
                work()
            with serve(file=path, snapshot="served") as server:
                assert server.read() == CONTENT


def test_no_lock_is_ever_taken(path: Path) -> None:
    with serve(file=path) as server, server.connect("served") as handle:
        handle.pread(BLOCK, 0)
        inode = str(path.stat().st_ino)
        held = [line for line in Path("/proc/locks").read_text().splitlines() if inode in line]
        assert held == []
        qemu.take(path, "offline")  # qemu-img wants the file for itself
        qemu.delete(path, "offline")


def test_qemu_deletes_what_is_being_read(path: Path) -> None:
    with serve(file=path) as server, running(path) as q, server.connect("served") as handle:
        assert handle.pread(SIZE, 0) == CONTENT
        q.delete("served")
        assert fails(handle, BLOCK, 0)
        with pytest.raises(QmpError):
            q.delete("served")
        with pytest.raises(nbd.Error), server.connect("served"):
            pass
        assert "snapshot 1 'served' of " in server.log
        assert " was deleted from " in server.log


# --- The file ---


@pytest.mark.parametrize("left", [SIZE // 2, 64 * KiB, 60, 0])
def test_a_file_truncated_under_the_server_is_an_error(path: Path, left: int) -> None:
    """EIO, and the server lives: what is mapped would have killed it (SIGBUS)."""
    whole = path.read_bytes()
    with serve(file=path) as server, server.connect("served") as handle:
        assert handle.pread(SIZE // 4, 0) == CONTENT[: SIZE // 4]
        os.truncate(path, left)
        assert fails(handle, SIZE, 0)
        assert fails(handle, BLOCK, SIZE - BLOCK)
        with open(path, "r+b") as f:
            f.write(whole)
        if not left:
            assert handle.pread(SIZE, 0) == CONTENT  # nothing was ever deleted


def test_a_file_replaced_by_rename_goes_on_being_served(path: Path) -> None:
    """By clients that are connected and by new ones: only a restart opens the new file."""
    other = path.with_name("other.qcow2")
    shutil.copyfile(path, other)
    with running(other) as q, q.guest() as disk:
        q.delete("served")
        disk.pwrite(b"!" * SIZE, 0)
        q.take("other")
    with serve(file=path) as server, server.connect("served") as handle:
        assert handle.pread(BLOCK, 0) == CONTENT[:BLOCK]
        os.replace(other, path)
        assert handle.pread(SIZE, 0) == CONTENT
        assert server.read("served") == CONTENT
        with pytest.raises(nbd.Error), server.connect("other"):
            pass
    with serve(file=path) as server:
        assert server.read("other") == b"!" * SIZE
