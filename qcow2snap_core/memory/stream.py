"""The bytes of a saved state, in order: what is read ahead, and how far one has come.

Whoever wants them one page at a time looks into the window itself, and says where it stopped.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from typing import Final

from ..errors import ImageError
from ..storage.local import Buffer

#: (start, end): all bytes in between, in pieces that are good until the next is asked for.
Pieces = Callable[[int, int], Generator[Buffer, None, None]]

_LONGEST_NAME: Final = 255  # its length is one byte
_FAR: Final = 64 << 20  # bytes that are not read only to get behind them


class Stream:
    """A saved state that is read on.  Close it."""

    def __init__(self, name: str, size: int, reach: int, pieces: Pieces) -> None:
        """``name`` is for error lines, ``size`` what is recorded of the state in bytes, and
        ``reach`` where it has to end at the latest: see :meth:`seek`."""
        self.name = name
        self.size = size
        #: what was read; what is before :attr:`at` has been used
        self.window = b""
        self.at = 0
        self._before = 0  # the window's own place
        self._reach = reach
        self._read = pieces
        self._pieces = pieces(0, size)

    def close(self) -> None:
        """Stop reading ahead."""
        self._pieces.close()

    @property
    def offset(self) -> int:
        """How far one has come, in bytes."""
        return self._before + self.at

    def seek(self, offset: int) -> None:
        """Go on from there.  Raises ImageError when that is outside the state.

        A state that wants this leaves room for pages that are zero, and its size, which counts what
        was written, says nothing of where it ends.
        """
        if not 0 <= offset <= self._reach:
            raise self.damaged(f"something at {offset:#x}, behind its end")
        self.size = self._reach
        self._pieces.close()
        self._pieces = self._read(offset, self._reach)
        self._before, self.window, self.at = offset, b"", 0

    def skip(self, count: int) -> None:
        """Leave out so many bytes.  Raises ImageError when there are fewer."""
        if count > _FAR:
            self.seek(self.offset + count)
        else:
            self.take(count)

    def ensure(self, count: int) -> None:
        """Have so many unused bytes in the window, or all that there still are."""
        have = len(self.window) - self.at
        if have >= count:
            return
        parts = [self.window[self.at :]]
        while have < count:
            piece = next(self._pieces, None)
            if piece is None:
                break
            parts.append(bytes(piece))
            have += len(parts[-1])
        self._before += self.at
        self.window, self.at = b"".join(parts), 0

    def take(self, count: int) -> bytes:
        """The next bytes.  Raises ImageError when there are fewer."""
        self.ensure(count)
        data = self.window[self.at : self.at + count]
        if len(data) < count:
            raise self.ends_early()
        self.at += count
        return data

    def number(self, size: int) -> int:
        """The next number of so many bytes."""
        return int.from_bytes(self.take(size), "big")

    def peek(self) -> int | None:
        """The next byte, which stays; None at the end."""
        self.ensure(1)
        return self.window[self.at] if self.at < len(self.window) else None

    def text(self, length: int | None = None) -> str:
        """A name, whose length is in the byte before it unless it is known.

        Raises ImageError also for one that QEMU would not give to anything.
        """
        length = self.number(1) if length is None else length
        if not 0 < length <= _LONGEST_NAME:
            raise self.damaged(f"a name of {length} bytes")
        name = self.take(length)
        if not name.isascii() or not name.decode("ascii").isprintable():
            raise self.damaged("a name that is none")
        return name.decode("ascii")

    def damaged(self, why: str) -> ImageError:
        """The error to raise for what has just been read."""
        return ImageError(f"{self.name} is damaged before offset {self.offset:#x}: {why}")

    def ends_early(self) -> ImageError:
        """The error to raise when more is wanted than there is."""
        return ImageError(f"{self.name} ends early, at offset {self.size:#x}")
