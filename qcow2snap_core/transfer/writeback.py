"""Bringing what is written to the disk while more is written, instead of all of it at the end.

Left alone, the kernel begins when a tenth of the memory is dirty, and the disk is idle till then;
what was written stays in the page cache, for which it gives up what others read there, and a
copy's pages are nearly never asked for again.  So, as nbdcopy does, each range is started on its
way at once; as soon as too much is under way the oldest is waited for, and its pages are let go of.
The writer is then as fast as the disk, the bar tells the truth, and fsync finds little left to do.

A failed write shows here and then perhaps nowhere else: the kernel tells each open file only once.
"""

from __future__ import annotations

import ctypes
import errno
import os
from collections import deque
from functools import lru_cache
from threading import Lock
from typing import Any, Final

# linux/fs.h
_WAIT_BEFORE: Final = 1
_WRITE: Final = 2
_WAIT_AFTER: Final = 4

_UNDER_WAY: Final = 32 << 20  # bytes

#: of a filesystem, or a kernel, that has no such thing
_CANNOT: Final = (errno.EINVAL, errno.ESPIPE, errno.ENOSYS, errno.EOPNOTSUPP)


class WriteBack:
    """Of one open file or block device; for several threads."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._lock = Lock()
        self._ranges: deque[tuple[int, int]] = deque()
        self._bytes = 0

    def wrote(self, offset: int, length: int) -> None:
        """Take note of a range that was written.  Raises OSError when the disk fails."""
        self._sync(offset, length, _WRITE)
        for range_ in self._too_many(offset, length):
            self._sync(*range_, _WAIT_BEFORE | _WRITE | _WAIT_AFTER)
            os.posix_fadvise(self._fd, *range_, os.POSIX_FADV_DONTNEED)

    def _too_many(self, offset: int, length: int) -> list[tuple[int, int]]:
        """The oldest ranges, when the new one is added."""
        found = []
        with self._lock:
            self._ranges.append((offset, length))
            self._bytes += length
            while self._bytes > _UNDER_WAY:
                found.append(self._ranges.popleft())
                self._bytes -= found[-1][1]
        return found

    def _sync(self, offset: int, length: int, flags: int) -> None:
        if _sync_file_range()(self._fd, offset, length, flags):
            number = ctypes.get_errno()
            if number not in _CANNOT:
                raise OSError(number, os.strerror(number))


@lru_cache(1)
def _sync_file_range() -> Any:
    found = ctypes.CDLL(None, use_errno=True).sync_file_range
    found.argtypes = [ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint]
    return found
