"""A disk that cannot be read whole, as one that can: with zeros, and a list of what was lost.

What its tables have lost is known at once (:mod:`..tables.lost`).  A range of data that cannot be
read is cut into quarters until they can be, or are single sectors; a compressed cluster can only be
lost as a whole.  All pieces of a size are tried before any smaller ones, so nothing is given up
that was not tried.  A disk may take seconds for each error, so a range gets some time, and smaller
pieces are begun only if that will do: of each piece that has failed at least one will fail again.

A deleted snapshot is no damage: other bytes would be where its own were.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from threading import Lock
from typing import Final, NamedTuple

from ..errors import ImageError, SnapshotGone, StorageError, UsageError
from ..format import ondisk as q
from ..image.disk import Disk
from ..image.extents import ALLOCATED, HOLE_ZERO, Extent
from ..storage.local import Buffer
from ..tables.lost import LOST, Range, ensure_there, ranges
from ..util.interrupts import raise_if_interrupted

_PATIENCE: Final = 30.0  # seconds for what is read at once, 2 MiB at the most
_CUT: Final = 4  # pieces that become of one
# Tables can be made to lose every other cluster of exabytes.
_MOST: Final = 1_000_000  # losses
_MOST_REASONS: Final = 10_000  # that are kept with them


class Loss(NamedTuple):
    """A range that could not be read."""

    offset: int  # in the disk, bytes
    length: int
    why: str


class Salvage:
    """A source that can be read whole; may be used by several threads."""

    def __init__(self, disk: Disk) -> None:
        self._disk = disk
        self._by_tables: list[Loss] = []  # as the plan found them the last time
        self._by_reads: list[Loss] = []
        self._lock = Lock()

    def plan(self) -> Iterator[Extent]:
        """All of the disk; what its tables have lost counts as zeros.  Raises as
        :func:`.ranges`, and UsageError when there are too many losses."""
        self._by_tables = []
        for found in ranges(self._disk, 0, self._disk.size):
            if found.type == LOST:
                self._lose(found, self._by_tables)
            kind = ALLOCATED if found.type == ALLOCATED else HOLE_ZERO
            yield Extent(found.offset, found.length, kind)

    def pread_into(self, buffer: Buffer, offset: int) -> None:
        """Raises as :meth:`plan`."""
        view = memoryview(buffer).cast("B")
        try:
            self._disk.pread_into(view, offset)
        except SnapshotGone:
            raise
        except (ImageError, StorageError) as e:
            self._read_in_parts(view, offset, str(e))

    def losses(self) -> list[Loss]:
        """All that was lost so far, in order; neighbours are one, with the reason of the first."""
        found: list[Loss] = []
        for loss in sorted([*self._by_tables, *self._by_reads]):
            last = found[-1] if found else None
            if last is None or loss.offset > last.offset + last.length:
                found.append(loss)
            else:
                end = max(last.offset + last.length, loss.offset + loss.length)
                found[-1] = last._replace(length=end - last.offset)
        return found

    # --- Inside ---

    def _read_in_parts(self, view: memoryview, start: int, error: str) -> None:
        """Fill a buffer from a range that could not be read in one go, for which ``error`` is."""
        end = time.monotonic() + _PATIENCE
        view[:] = bytes(len(view))
        parts: list[Range] = []
        for found in ranges(self._disk, start, len(view)):
            if found.type == LOST:
                self._lose(found, self._by_reads)
            elif found.type == ALLOCATED:
                parts.append(found)
        if len(parts) == 1 and parts[0].length == len(view):
            failed, spent = [parts[0]._replace(why=error)], 0.0  # that was it
        else:
            failed, spent = self._try(parts, view, start)
        while failed:
            too_late = time.monotonic() + spent > end
            parts = []
            for part in failed:
                if part.whole or part.length <= q.SECTOR or too_late:
                    self._lose(part, self._by_reads)
                else:
                    parts += _cut(part)
            failed, spent = self._try(parts, view, start)
        self._disk.confirm()

    def _try(
        self, parts: Iterable[Range], view: memoryview, start: int
    ) -> tuple[list[Range], float]:
        """Read parts of a range, each of which is in one kind of cluster; those that cannot be read
        stay zeros.  Returns them with the reasons, and how many seconds they took."""
        failed: list[Range] = []
        spent = 0.0
        for part in parts:
            raise_if_interrupted()
            wanted = view[part.offset - start :][: part.length]
            began = time.monotonic()
            try:
                self._disk.fill(wanted, part.offset)
            except (ImageError, StorageError) as e:
                wanted[:] = bytes(len(wanted))
                failed.append(part._replace(why=str(e)))
                spent += time.monotonic() - began
        if failed:
            ensure_there(self._disk)
        return failed, spent

    def _lose(self, part: Range, noted: list[Loss]) -> None:
        with self._lock:
            last = noted[-1] if noted else None
            if last is not None and last.offset + last.length == part.offset:
                # A bad table is lost cluster by cluster, of which there may be millions.
                noted[-1] = last._replace(length=last.length + part.length)
                return
            if len(noted) >= _MOST:
                raise UsageError(
                    f"more than {_MOST:,} ranges of it cannot be read: no map of it is made"
                )
            why = part.why if len(noted) < _MOST_REASONS else ""
            noted.append(Loss(part.offset, part.length, why))


def _cut(part: Range) -> Iterator[Range]:
    """Pieces of a part that is longer than a sector, in whole sectors but for the last one."""
    sectors = -(-part.length // q.SECTOR)
    step = -(-sectors // _CUT) * q.SECTOR
    for at in range(0, part.length, step):
        yield part._replace(offset=part.offset + at, length=min(step, part.length - at))
