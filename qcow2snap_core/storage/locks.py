"""Whether another program writes to an image, as QEMU's locks say.

QEMU locks a byte of the file for each permission that it has (block/file-posix.c,
raw_handle_perm_lock); the one for writing says that the active disk may change at any moment, and
with it what had been read of it a moment before.  The kernel can be asked who would be in the way
of a lock without taking one, so a QEMU that starts meanwhile never finds us in its way.

No lock is no proof: other programs, other hosts and some filesystems have none.
"""

from __future__ import annotations

import fcntl
import os
import struct
from collections.abc import Iterable
from contextlib import suppress
from typing import Final

from ..errors import UsageError, shown
from .local import Storage, ensure_open, inode

_FIRST_PERMISSION: Final = 100  # RAW_LOCK_PERM_BASE
_WRITE: Final = 1  # the bit of BLK_PERM_WRITE
_FLOCK: Final = "hhqqi0q"  # struct flock: l_type, l_whence, l_start, l_len, l_pid


def ensure_not_written(
    files: Iterable[Storage], instead: str = ", or take a snapshot and read that"
) -> None:
    """Raises UsageError while another program has one of the files open for writing; ``instead`` is
    what can be done besides shutting it down."""
    for file in files:
        ensure_open(file)
        if is_written(file):
            raise UsageError(
                f"{shown(file.path)} is in use, a QEMU has it open for writing: shut the virtual "
                f"machine down{instead}"
            )


class LockGuard:
    """A guard for an active disk: what is read of it counts only while nobody writes."""

    identity = None

    def __init__(self, files: Iterable[Storage]) -> None:
        """Raises as :meth:`confirm`."""
        self._files = tuple(files)
        self.confirm()

    plain_fd = None

    def tell(self, expect: object) -> None:
        """Never called: a lock cannot be compared."""

    def confirm(self) -> None:
        ensure_not_written(self._files)


def of_byte(kind: int, byte: int) -> bytes:
    """What fcntl is told of a lock on one byte of a file; ``kind`` is F_RDLCK or F_WRLCK."""
    return struct.pack(_FLOCK, kind, os.SEEK_SET, byte, 1, 0)


def is_written(file: Storage) -> bool:
    """Whether another program has it open for writing; False also where it cannot be told."""
    with suppress(OSError):
        fd = os.open(file.path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            return inode(os.fstat(fd)) == file.inode and _is_locked(fd, _FIRST_PERMISSION + _WRITE)
        finally:
            os.close(fd)
    return False


def _is_locked(fd: int, byte: int) -> bool:
    """Whether somebody else has any lock there; this takes none."""
    answer = fcntl.fcntl(fd, fcntl.F_OFD_GETLK, of_byte(fcntl.F_WRLCK, byte))
    kind: int = struct.unpack(_FLOCK, answer)[0]
    return kind != fcntl.F_UNLCK
