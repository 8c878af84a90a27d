"""A range of a disk as a file of its own, for libraries that read filesystems.

Such a library may catch an exception of the file that it reads and go on with what it has: libtsk
took a failed read for "not a directory".  So a window remembers its first failure, fails from then
on, and whoever got an answer from a library asks :meth:`Window.check` before believing it.
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING

from ..errors import Error, ImageError, escaped

if TYPE_CHECKING:
    from ..storage.local import Buffer

#: What a library says of damage, at most this long.
_MOST_SAID = 200


class Window(io.RawIOBase):
    """``length`` bytes of ``raw`` from ``offset``; seekable and read-only.

    ``raw`` may be a disk's :meth:`.Disk.raw`, another window, or a library's volume.
    """

    def __init__(self, raw: io.RawIOBase, offset: int, length: int) -> None:
        super().__init__()
        self._raw = raw
        self._offset = offset
        self._position = 0
        self._failed: Exception | None = None
        self._block_size = 1
        self._blocks: Mapping[int, bytes] = {}
        self.length = length

    def overlay(self, block_size: int, blocks: Mapping[int, bytes]) -> None:
        """From now on these blocks, by their number, have this content: a journal's."""
        self._block_size, self._blocks = block_size, blocks

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self.length}[whence]
        if start + offset < 0:
            raise ValueError("a position before the start")
        self._position = start + offset
        return self._position

    def readinto(self, buffer: Buffer) -> int:
        """Raises what reading the disk raises, and again each time after that."""
        if self._failed is not None:
            raise self._failed
        view = memoryview(buffer).cast("B")
        n = max(0, min(len(view), self.length - self._position))
        try:
            done = self._fill(view[:n])
        except Exception as e:
            self._failed = e
            raise
        self._position += done
        return done

    def pread(self, offset: int, length: int) -> bytes:
        """Fewer bytes at the end of it."""
        self.seek(offset)
        return self.read(length) or b""

    def exactly(self, offset: int, length: int) -> bytes:
        """All of these bytes.  Raises ImageError when it ends before."""
        data = self.pread(offset, length)
        if len(data) != length:
            raise ImageError(
                f"the disk or partition ends inside the {length} bytes of metadata at {offset}"
            )
        return data

    def check(self) -> None:
        """Raises what has failed, whatever became of it since."""
        if isinstance(self._raw, Window):
            self._raw.check()
        if self._failed is not None:
            raise self._failed

    def _fill(self, view: memoryview) -> int:
        self._raw.seek(self._offset + self._position)
        done = 0
        while done < len(view):
            n = self._raw.readinto(view[done:])
            if not n:
                raise ImageError("the disk ends inside the partition")
            done += n
        if self._blocks:
            self._replace(view)
        return done

    def _replace(self, view: memoryview) -> None:
        size, end = self._block_size, self._position + len(view)
        for number in range(self._position // size, -(-end // size)):
            block = self._blocks.get(number)
            if block is not None:
                start = max(self._position, number * size)
                stop = min(end, (number + 1) * size)
                piece = block[start - number * size : stop - number * size]
                view[start - self._position : stop - self._position] = piece


@contextmanager
def judged(window: Window, what: str) -> Iterator[None]:
    """Around a library's work on a window.  Raises what reading it raised, and ImageError for all
    else that the library does not get done."""
    try:
        yield
    except Error:
        window.check()
        raise
    except Exception as e:
        # Python code that parses a damaged filesystem raises whatever there is.
        window.check()
        said = escaped(" ".join(str(e).split()) or type(e).__name__, _MOST_SAID)
        raise ImageError(f"{what} cannot be read: {said}") from e
    window.check()
