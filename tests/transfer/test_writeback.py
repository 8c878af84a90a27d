"""What goes to the disk while more is written: all of it, and an error of the disk is not lost."""

from __future__ import annotations

import os
import random
import threading
from pathlib import Path

from support import command, qemu
from support.devices import attached, mounted
from support.qemu import KiB, MiB

from qcow2snap_core.transfer.writeback import WriteBack


def test_it_changes_nothing_that_was_written(tmp_path: Path) -> None:
    content = random.Random(1).randbytes(48 * MiB)
    fd = os.open(tmp_path / "out", os.O_RDWR | os.O_CREAT)
    write_back = WriteBack(fd)

    def work(first: int) -> None:
        for at in range(first * 512 * KiB, len(content), MiB):
            os.pwrite(fd, content[at : at + 512 * KiB], at)
            write_back.wrote(at, 512 * KiB)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    os.close(fd)
    assert (tmp_path / "out").read_bytes() == content


def test_a_disk_that_fails_is_one_line(tmp_path: Path) -> None:
    """A loop device whose file has no more room, which its page cache does not know."""
    path = qemu.create(tmp_path / "disk.qcow2", 64 * MiB)
    qemu.io(path, "write -P 1 0 64M")
    qemu.take(path, "s")
    with mounted(tmp_path / "mnt", "-t", "tmpfs", "-o", "size=2m", "tmpfs") as where:
        with open(where / "device", "wb") as f:
            f.truncate(80 * MiB)
        with attached(where / "device") as device:
            line = command.fails("copy", "--no-verify", path, "s", device)
    assert "input/output error" in line
    assert line.endswith("is partly written: repeat the copy")
