"""What a disk can be copied to: a raw file, a block device, or an NBD export (:mod:`.nbdtarget`).

Each can be written and zeroed at any offset by several threads at once.
"""

from __future__ import annotations

import ctypes
import errno
import os
import stat
from typing import Final, Protocol

from ..errors import StorageError, UsageError, reason, shown
from .writeback import WriteBack


class Target(Protocol):
    """Where bytes go to.  Its methods raise StorageError."""

    size: int  # bytes
    foreign: bool  # another program writes: :mod:`.mover` keeps zeros and data apart
    fd: int | None  # a file that the kernel can copy into, if it is one

    def write(self, view: memoryview, offset: int) -> None:
        """Write all of the view."""

    def zero(self, offset: int, length: int) -> None:
        """Make the range read as zeros, without taking space for it where that is possible."""

    def wrote(self, offset: int, length: int) -> None:
        """Hear that a range was written, by :meth:`write` or by the kernel: it may go on its way
        to the disk."""

    def flush(self) -> None:
        """Bring everything to the disk."""

    def close(self) -> None: ...


# linux/falloc.h
_KEEP_SIZE: Final = 1
_PUNCH_HOLE: Final = 2
_ZERO_RANGE: Final = 16

_CANNOT: Final = (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS, errno.ENODEV)
_ZEROS: Final = memoryview(bytes(1 << 20))


class RawTarget:
    """An open file or block device."""

    foreign = False
    fd: int | None

    def __init__(self, path: str, fd: int, *, empty: bool = False) -> None:
        """Owns the descriptor.  ``empty``: it is one hole already."""
        self._path = path
        self._fd = fd
        self.fd = fd if stat.S_ISREG(os.fstat(fd).st_mode) else None
        self._write_back = WriteBack(fd)
        self._empty = empty
        self.size = os.lseek(fd, 0, os.SEEK_END)

    def write(self, view: memoryview, offset: int) -> None:
        try:
            while view:
                n = os.pwrite(self._fd, view, offset)
                view, offset = view[n:], offset + n
        except OSError as e:
            raise failed(self._path, offset, reason(e)) from e

    def zero(self, offset: int, length: int) -> None:
        if self._empty:
            return
        # On a block device a hole is a discard that leaves zeros; where it cannot do that, the
        # second way has the kernel write them.
        for mode in (_PUNCH_HOLE | _KEEP_SIZE, _ZERO_RANGE | _KEEP_SIZE):
            try:
                _fallocate(self._fd, mode, offset, length)
                return
            except OSError as e:
                if e.errno not in _CANNOT:
                    raise failed(self._path, offset, reason(e)) from e
        write_zeros(self, offset, length)

    def wrote(self, offset: int, length: int) -> None:
        try:
            self._write_back.wrote(offset, length)
        except OSError as e:
            raise failed(self._path, offset, reason(e)) from e

    def flush(self) -> None:
        try:
            os.fsync(self._fd)
        except OSError as e:
            raise failed(self._path, 0, reason(e)) from e

    def close(self) -> None:
        os.close(self._fd)


def open_device(path: str) -> RawTarget:
    """A block device that nothing else has mounted or claimed.  Raises UsageError."""
    try:
        # O_EXCL on a device: the kernel refuses it while it is mounted.
        return RawTarget(path, os.open(path, os.O_RDWR | os.O_EXCL | os.O_CLOEXEC))
    except OSError as e:
        raise UsageError(f"cannot open {shown(path)}: {reason(e)}") from e


def write_zeros(target: Target, offset: int, length: int) -> None:
    """Where it has no other way to make zeros."""
    for at in range(offset, offset + length, len(_ZEROS)):
        target.write(_ZEROS[: offset + length - at], at)


def failed(name: str, offset: int, why: str, how: str = "writing to") -> StorageError:
    """The error of a target."""
    return StorageError(f"{how} {shown(name)} at offset {offset:#x} failed: {why}")


def _fallocate(fd: int, mode: int, offset: int, length: int) -> None:
    fallocate = ctypes.CDLL(None, use_errno=True).fallocate64
    fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]
    while fallocate(fd, mode, offset, length):
        number = ctypes.get_errno()
        if number != errno.EINTR:
            raise OSError(number, os.strerror(number))
