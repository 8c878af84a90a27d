"""A snapshot's disk as a Python file object, for programs that read raw disk images."""

from __future__ import annotations

import io
import os
from typing import TYPE_CHECKING, NoReturn

from ..storage.local import Buffer

if TYPE_CHECKING:
    from .disk import Disk


class RawDisk(io.RawIOBase):
    """Seekable and read-only; reads raise what :meth:`.Disk.pread_into` raises."""

    def __init__(self, disk: Disk) -> None:
        super().__init__()
        self._disk = disk
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def readinto(self, buffer: Buffer) -> int:
        """Fill the buffer from the present position; fewer bytes at the end of the disk."""
        self._ensure_open()
        view = memoryview(buffer).cast("B")
        n = max(0, min(len(view), self._disk.size - self._position))
        if n:
            self._disk.pread_into(view[:n], self._position)
        else:
            self._disk.confirm()  # nothing is read, but a deleted snapshot has no end either
        self._position += n
        return n

    def readall(self) -> bytes:
        self._ensure_open()
        rest = max(0, self._disk.size - self._position)
        return self.read(rest) or b""

    def write(self, buffer: object) -> NoReturn:
        raise io.UnsupportedOperation("a snapshot is read-only")

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Go to a position, which may lie past the end, and return it."""
        self._ensure_open()
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._disk.size}
        if whence not in start:
            raise ValueError(f"whence is {whence}, not SEEK_SET, SEEK_CUR or SEEK_END")
        if start[whence] + offset < 0:
            raise ValueError(f"cannot seek to {start[whence] + offset}, before the disk's start")
        self._position = start[whence] + offset
        return self._position

    def tell(self) -> int:
        self._ensure_open()
        return self._position

    def _ensure_open(self) -> None:
        if self.closed:
            raise ValueError("the file object is closed")
        self._disk.ensure_open()
