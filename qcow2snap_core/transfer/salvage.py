"""A disk that cannot be read whole, as one that can: with zeros, and a list of what was lost.

What its tables have lost is known at once (:mod:`..tables.lost`).  A range of data that cannot be
read is cut into halves until they can be, or are single sectors; a compressed cluster can only be
lost as a whole.  All pieces of a size are tried before any smaller ones, so nothing is given up
that was not tried: a disk that takes seconds for each error gets some for a range, and what has
failed by then is lost in larger pieces.

A deleted snapshot is no damage: other bytes would be where its own were.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from threading import Lock
from typing import Final, NamedTuple

from ..errors import ImageError, SnapshotGone, StorageError
from ..format import ondisk as q
from ..image.disk import Disk
from ..image.extents import ALLOCATED, HOLE_ZERO, Extent
from ..storage.local import Buffer
from ..tables.lost import LOST, Range, ensure_there, ranges
from ..util.interrupts import raise_if_interrupted

#: Ranges that are noted, in half a GiB of memory.  Of an image of a few MiB that is made for it,
#: every second cluster of many TiB can be lost.
_MOST: Final = 1_000_000
_PATIENCE: Final = 10.0  # seconds for what is read at once, 2 MiB at the most


class Loss(NamedTuple):
    """A range that could not be read."""

    offset: int  # in the disk, bytes
    length: int
    why: str


class Salvage:
    """A source that can be read whole; may be used by several threads."""

    def __init__(self, disk: Disk) -> None:
        self._disk = disk
        self._planned: list[Loss] = []  # by the tables, in the last pass through them
        self._noted: list[Loss] = []  # by reads
        self._lock = Lock()

    def plan(self) -> Iterator[Extent]:
        """All of the disk; what its tables have lost counts as zeros.

        Raises as :func:`.ranges`, and ImageError where too many ranges are lost.
        """
        self._planned = []  # they are gone through to count, and again to copy
        for found in ranges(self._disk, 0, self._disk.size):
            if found.type == LOST:
                self._note(self._planned, [_loss(found)])
            kind = ALLOCATED if found.type == ALLOCATED else HOLE_ZERO
            yield Extent(found.offset, found.length, kind)

    def pread_into(self, buffer: Buffer, offset: int) -> None:
        """Raises as :meth:`plan`."""
        view = memoryview(buffer).cast("B")
        try:
            self._disk.pread_into(view, offset)
        except SnapshotGone:
            raise
        except (ImageError, StorageError):
            self._read_in_parts(view, offset)

    def losses(self) -> list[Loss]:
        """All that was lost so far, in order; neighbours are one, with the reason of the first."""
        return _merged(self._planned + self._noted)

    # --- Inside ---

    def _read_in_parts(self, view: memoryview, start: int) -> None:
        patience = time.monotonic() + _PATIENCE
        view[:] = bytes(len(view))
        parts: list[Range] = []
        lost: list[Loss] = []
        for found in ranges(self._disk, start, len(view)):
            if found.type == LOST:
                lost.append(_loss(found))
            elif found.type == ALLOCATED:
                parts.append(found)
        while parts:
            ensure_there(self._disk)
            smaller: list[Range] = []
            for part in parts:
                raise_if_interrupted()
                at = part.offset - start
                why = self._try(view[at : at + part.length], part.offset)
                if why is None:
                    continue
                if part.whole or part.length <= q.SECTOR or time.monotonic() > patience:
                    lost.append(Loss(part.offset, part.length, why))
                else:
                    smaller += _halves(part)
            parts = smaller
        self._disk.confirm()
        self._note(self._noted, _merged(lost))

    def _try(self, view: memoryview, offset: int) -> str | None:
        """Read what is all in one kind of cluster; why it cannot be read, as zeros then."""
        try:
            self._disk.fill(view, offset)
        except (ImageError, StorageError) as e:
            view[:] = bytes(len(view))
            return str(e)
        return None

    def _note(self, noted: list[Loss], losses: list[Loss]) -> None:
        with self._lock:
            for loss in losses:
                last = noted[-1] if noted else None
                if last is not None and last.offset + last.length == loss.offset:
                    # A bad table is lost cluster by cluster, of which there may be millions.
                    noted[-1] = last._replace(length=last.length + loss.length)
                else:
                    noted.append(loss)
            if len(self._planned) + len(self._noted) > _MOST:
                raise ImageError(
                    f"{self._disk.name}: more than {_MOST} ranges cannot be read, too many to be "
                    f"mapped: qcow2snap check says what is damaged"
                )


def _loss(part: Range) -> Loss:
    return Loss(part.offset, part.length, part.why)


def _merged(losses: list[Loss]) -> list[Loss]:
    """In order; neighbours are one, with the reason of the first."""
    found: list[Loss] = []
    for loss in sorted(losses):
        last = found[-1] if found else None
        if last is None or loss.offset > last.offset + last.length:
            found.append(loss)
        else:
            end = max(last.offset + last.length, loss.offset + loss.length)
            found[-1] = last._replace(length=end - last.offset)
    return found


def _halves(part: Range) -> tuple[Range, Range]:
    """It is longer than a sector."""
    middle = (part.offset + part.length // 2) // q.SECTOR * q.SECTOR
    middle = max(middle, (part.offset // q.SECTOR + 1) * q.SECTOR)
    first = part._replace(length=middle - part.offset)
    return first, part._replace(offset=middle, length=part.length - first.length)
