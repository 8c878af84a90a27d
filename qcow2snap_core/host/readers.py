"""Programs that read a filesystem in a raw disk without privileges, and show it in a directory.

What a guest wrote is untrusted input.  These programs parse it as an ordinary user's process, not
in the host's kernel; a bug of theirs gives an attacker that user, who should therefore not be
root.  Which program it is follows from the first bytes; guestmount, which reads nearly everything
inside a small virtual machine, is taken where the other is not installed.

A snapshot of a running machine holds a filesystem that was not unmounted, whose last changes are
still in its journal.  So the disk that these programs get can be written, into a temporary file of
nbdkit's (the cow filter), and the journal is replayed there first.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from typing import Final, NamedTuple

from ..errors import StorageError, UsageError, escaped

_EXT_MAGIC: Final = slice(1024 + 56, 1024 + 58), b"\x53\xef"
_NTFS_NAME: Final = slice(3, 11), b"NTFS    "
_MBR_MAGIC: Final = slice(510, 512), b"\x55\xaa"
_GPT_MAGIC: Final = slice(512, 520), b"EFI PART"
_START: Final = 2048  # bytes, in which all of these are

# Neither programs nor devices of the guest are to mean anything here; every file is readable,
# since it is the disk's owner who looks at it.
_OPTIONS: Final = "ro,nosuid,nodev"


class Reader(NamedTuple):
    """A command that shows a filesystem until it is unmounted, and one to be run before it."""

    command: list[str]
    before: list[str] | None = None


def reader(disk: str, directory: str) -> Reader:
    """How to show the filesystem that begins where the raw ``disk`` does in ``directory``.

    Raises UsageError when there is no filesystem, or nothing installed that reads it.
    """
    with open(disk, "rb") as f:
        start = f.read(_START)
    if _has(start, _EXT_MAGIC):
        what, tool, package = "an ext2, ext3 or ext4 filesystem", "fuse2fs", "fuse2fs"
        command = ["-f", "-o", f"{_OPTIONS},fakeroot", disk, directory]
        before = ["e2fsck", "-y", "-E", "journal_only", disk]
    elif _has(start, _NTFS_NAME):
        what, tool, package = "an NTFS filesystem", "ntfs-3g", "ntfs-3g"
        command = ["-o", f"{_OPTIONS},no_detach", disk, directory]
        before = None
    else:
        what, tool, package = _unknown(start), "", ""
    found = _which(tool)
    if found is not None:
        return Reader([found, *command], before)
    found = _which("guestmount")
    if found is not None and not _is_table(start):
        options = ["--no-fork", "--ro", "--format=raw", "-o", "nosuid", "-o", "nodev"]
        return Reader([found, *options, "-a", disk, "-m", "/dev/sda", directory])
    if _is_table(start):
        raise UsageError(f"it holds {what}: choose a partition with --partition")
    install = f"{package} or guestmount" if package else "guestmount"
    raise UsageError(f"it holds {what}: install {install} to read it")


def prepare(command: list[str]) -> None:
    """Replay the journal.  Raises StorageError with what the program says when it cannot."""
    found = _which(command[0])
    if found is None:
        raise UsageError(f"{command[0]} is missing: install e2fsprogs")
    done = subprocess.run(
        [found, *command[1:]],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        check=False,
    )
    if done.returncode > 1:  # 1: something was corrected
        lines = [x for x in done.stderr.splitlines() if x and not x.startswith(b"e2fsck 1")]
        said = escaped(lines[0]) if lines else f"status {done.returncode}"
        raise StorageError(f"the filesystem's journal cannot be replayed: {said}")


def _has(start: bytes, magic: tuple[slice, bytes]) -> bool:
    return start[magic[0]] == magic[1]


def _is_table(start: bytes) -> bool:
    """Whether a table of partitions may be there; FAT has the same two bytes at the end of its
    first sector, but begins with a jump."""
    mbr = _has(start, _MBR_MAGIC) and start[0] not in (0xEB, 0xE9)
    return _has(start, _GPT_MAGIC) or mbr


def _unknown(start: bytes) -> str:
    if _is_table(start):
        return "partitions"
    return "nothing but zeros" if not any(start) else "no ext2, ext3, ext4 or NTFS filesystem"


def _which(tool: str) -> str | None:
    """Also where an ordinary user's shell does not look."""
    path = os.pathsep.join((os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"))
    return shutil.which(tool, path=path) if tool else None
