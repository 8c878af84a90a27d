"""A block device, read past the page cache, where what another program writes may stay stale."""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterator
from typing import Final

from ..util.pool import Pool
from .local import MAX_OFFSET, Buffer, Descriptor, ExpectedBytes, failed, from_here, inode

# O_DIRECT wants offset, length and memory aligned to the device's logical block size, which is
# 512 or 4096.
_ALIGN: Final = 4096
_BOUNCE: Final = 1 << 20


class BlockDevice:
    """A block device, read past the page cache."""

    plain_fd: int | None = None

    def __init__(self, path: str, fd: int) -> None:
        self.path = path
        self.absolute = from_here(path)
        # Of its name, for QEMU's sake: a volume's is /dev/group/name, its node /dev/dm-3.
        self.directory: str | None = os.path.dirname(self.absolute)
        self.trusted: str | None = None  # all the machine's devices lie in /dev
        self.inode = inode(os.fstat(fd))
        self.closed = False
        self._descriptor = Descriptor(fd)
        self._fd = fd
        # Anonymous memory is aligned, and nothing can shrink it.
        self._buffers = Pool(lambda: mmap.mmap(-1, _BOUNCE))

    def size(self) -> int:
        try:
            return os.lseek(self._fd, 0, os.SEEK_END)
        except OSError as e:
            raise failed(self.path, 0, 0, e) from e

    def read_into(self, buffer: Buffer, offset: int) -> int:
        view = memoryview(buffer)
        if offset > MAX_OFFSET - _BOUNCE - len(view):
            return 0
        bounce = self._buffers.take()
        try:
            got = 0
            while got < len(view):
                n = self._read_aligned(view[got:], offset + got, bounce)
                if not n:
                    break
                got += n
            return got
        except OSError as e:
            raise failed(self.path, offset, len(view), e) from e
        finally:
            self._buffers.give(bounce)

    def _read_aligned(self, view: memoryview, offset: int, bounce: mmap.mmap) -> int:
        """Fill the start of ``view``; 0 at the end of the device."""
        lead = offset % _ALIGN
        want = min(_BOUNCE, -(-(lead + len(view)) // _ALIGN) * _ALIGN)
        with memoryview(bounce) as aligned:
            got = os.preadv(self._fd, (aligned[:want],), offset - lead)
            n = max(0, min(got - lead, len(view)))
            view[:n] = aligned[lead : lead + n]
        return n

    def read(self, length: int, offset: int) -> bytes:
        data = bytearray(length)
        return bytes(memoryview(data)[: self.read_into(data, offset)])

    def holds(self, expected: ExpectedBytes) -> bool:
        return all(self.read(len(content), offset) == content for content, offset in expected)

    def holes(self, offset: int, length: int) -> Iterator[tuple[int, int, bool]]:
        yield offset, length, False

    def will_need(self, offset: int, length: int) -> None:
        """Nothing: what the kernel would fetch goes where this class does not look."""

    def close(self) -> None:
        self.closed = True
        self._descriptor.close()
