"""A file of a guest, read at any offset.

A library is asked only for what the file has stored: of the rest it may give something else than
the zeros that a driver would (:mod:`.dissected`).
"""

from __future__ import annotations

from bisect import bisect_right

from ..errors import ImageError, shown
from .tree import Filesystem, Node


class Content:
    """Of a file that stays as it is while this is used."""

    def __init__(self, fs: Filesystem, node: Node) -> None:
        """Raises Unreadable for what is not to be had, and whatever reading raises."""
        self._fs = fs
        self._node = node
        self._ranges = fs.ranges(node)
        self._starts = [start for start, _ in self._ranges]

    def pread(self, offset: int, length: int) -> bytearray:
        """Fewer bytes at the end of it.  Raises whatever reading raises, and ImageError for a file
        that has less than it claims."""
        end = min(offset + length, self._node.size)
        data = bytearray(max(0, end - offset))
        number = max(0, bisect_right(self._starts, offset) - 1)
        while number < len(self._ranges):
            start, count = self._ranges[number]
            at, stop = max(start, offset), min(start + count, end)
            if start >= end:
                break
            while at < stop:
                piece = self._fs.pread(self._node, at, stop - at)[: stop - at]
                if not piece:
                    name, size = shown(self._node.name), self._node.size
                    raise ImageError(f"{name} ends early, at {at} of {size}")
                data[at - offset : at - offset + len(piece)] = piece
                at += len(piece)
            number += 1
        return data
