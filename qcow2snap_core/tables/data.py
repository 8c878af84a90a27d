"""Every cluster read, and decoded where it is compressed: the part of a check that reads data.

All tables that map the same range of the guest's disk are read together, and each cluster to which
they lead is read once, however many of them lead to it: QEMU never moves a cluster from one guest
offset to another.  Clusters are read as for a guest, so only the part that a guest can see counts.
What the check of the tables has reported already is not reported again.

That bytes can be read does not mean that they are right: qcow2 has no checksums.  A zstd frame may
have one, and a compressed stream has to end as it should.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from threading import Lock
from typing import Final, NamedTuple

from ..errors import Error, ImageError, StorageError
from ..format import ondisk as q
from ..image.disk import Disk
from ..image.image import Image
from ..image.mapping import COMPRESSED, DATA
from ..util.progress import progress
from ..util.workers import spread
from .findings import MOST, UNREADABLE, Findings, Owner, TooManyError, union
from .l2tables import Tables

_THREADS: Final = min(8, max(2, os.cpu_count() or 1))
_MOST_READ: Final = 2 << 20  # at once; the largest cluster
_ENTRIES: Final = 1 << 18  # of all tables for one guest range that are compared at a time


class _Piece(NamedTuple):
    """Clusters that lie together in the guest, and who has them in their tables."""

    guest: int  # guest offset, the VM state's behind the disk's
    length: int
    table: int  # host offset
    owners: Sequence[Owner]


class _Failed(NamedTuple):
    """A cluster that cannot be read."""

    guest: int
    message: str
    host: int | None
    entry: tuple[int, ...]  # of the tables that lead to it


class Data:
    """Reads what the L2 tables lead to; the image is open with its data."""

    def __init__(self, image: Image, tables: Tables, findings: Findings) -> None:
        self._image = image
        self._tables = tables
        self._findings = findings
        self._size = image.header.cluster_size
        self._words = 2 if image.header.extended_l2 else 1  # of an entry
        self._per_table = self._size // (q.L2_ENTRY_SIZE * self._words)  # entries
        self._failed: list[_Failed] = []
        self._lock = Lock()

    def check(self) -> None:
        """Report what cannot be read.  Raises TooManyError after the last one that is wanted."""
        with progress("reading", self._amount) as advance:

            def reader() -> Callable[[_Piece], None]:
                buffer = memoryview(bytearray(_MOST_READ))

                def read(piece: _Piece) -> None:
                    self._read(piece, buffer)
                    advance(piece.length)

                return read

            with suppress(TooManyError):
                spread(self._pieces(), reader, _THREADS)
        columns = dict(self._tables.by_index()) if self._failed else {}
        for failed in sorted(self._failed):
            index, number = divmod(failed.guest // self._size, self._per_table)
            owners = [
                owners
                for table, owners in columns[index]
                if self._entry(table, number, owners) == failed.entry
            ]
            self._findings.add(UNREADABLE, failed.message, union(*owners), failed.host)

    # --- What there is ---

    def _amount(self) -> int:
        """In bytes; all tables are gone through for it."""
        return sum(piece.length for piece in self._pieces())

    def _pieces(self) -> Iterator[_Piece]:
        """Everything that there is to read, each cluster once; tables that cannot be read have
        been reported."""
        for index, column in self._tables.by_index():
            wanted = [(t, owners) for t, owners in column if self._findings.concern(owners)]
            if not wanted:
                continue
            step = max(64, _ENTRIES // len(wanted))
            for first in range(0, self._per_table, step):
                met: set[tuple[int, ...]] = set()
                for table, owners in wanted:
                    with suppress(ImageError):
                        count = min(step, self._per_table - first)
                        guests = self._unmet(table, first, count, owners, met)
                        start = (index * self._per_table + first) * self._size
                        for guest, length in self._as_pieces(start, guests, owners):
                            yield _Piece(guest, length, table, owners)

    def _unmet(
        self, table: int, first: int, count: int, owners: Sequence[Owner], met: set[tuple[int, ...]]
    ) -> list[int]:
        """The numbers, from ``first`` on, of a table's clusters with data that were not met yet."""
        words = owners[0].disk.tables.l2_slice(table, first, count)
        found = []
        for number, entry in enumerate(zip(*[iter(words)] * self._words, strict=True)):
            if self._has_data(entry) and (number, *entry) not in met:
                met.add((number, *entry))
                found.append(number)
        return found

    def _has_data(self, entry: tuple[int, ...]) -> bool:
        if not entry[0]:
            return False
        if entry[0] & q.OFLAG_COMPRESSED:
            return True
        if self._words == 2:
            return bool(entry[1] & (1 << q.SUBCLUSTERS) - 1)
        return not entry[0] & q.OFLAG_ZERO

    def _as_pieces(
        self, start: int, numbers: Sequence[int], owners: Sequence[Owner]
    ) -> Iterator[tuple[int, int]]:
        """The clusters as pieces of neighbours, (guest offset, length); of the last cluster of a
        disk nobody sees more than the largest one has."""
        most = max(1, _MOST_READ // self._size)
        end = max(owner.disk.size for owner in owners)
        at = 0
        while at < len(numbers):
            n = 1
            while n < most and at + n < len(numbers) and numbers[at + n] == numbers[at] + n:
                n += 1
            guest, length = start + numbers[at] * self._size, n * self._size
            if guest < end < guest + length:
                n = min(n, -(-(end - guest) // self._size))  # a VM state may go on behind it
                length = end - guest
            yield guest, length
            at += n

    # --- One piece ---

    def _read(self, piece: _Piece, buffer: memoryview) -> None:
        disk = piece.owners[0].disk
        if _error(disk, buffer[: piece.length], piece.guest) is None:
            return
        for guest in range(piece.guest, piece.guest + piece.length, self._size):
            length = min(self._size, piece.guest + piece.length - guest)
            error = _error(disk, buffer[:length], guest)
            if error is not None and not self._reported(disk, guest, length):
                with self._lock:
                    entry = self._entry(
                        piece.table, guest // self._size % self._per_table, piece.owners
                    )
                    self._failed.append(_Failed(guest, str(error), self._host(disk, guest), entry))
                    if len(self._failed) >= MOST:
                        raise TooManyError

    def _reported(self, disk: Disk, guest: int, length: int) -> bool:
        """Whether the check of the tables has had something to say of a cluster."""
        look = disk.mapping.runs if self._image.header.has_data_file else disk.ranges
        try:
            for _ in look(guest, length):
                pass
        except ImageError:
            return True
        return False

    def _entry(self, table: int, number: int, owners: Sequence[Owner]) -> tuple[int, ...]:
        """An entry of an L2 table; none where the table cannot be read."""
        with suppress(ImageError):
            return tuple(owners[0].disk.tables.l2_slice(table, number, 1))
        return ()

    def _host(self, disk: Disk, guest: int) -> int | None:
        _, kind, location = disk.mapping.run(guest, 1)
        if kind == COMPRESSED:
            return self._image.stream(location)[0]
        return location if kind == DATA else None


def _error(disk: Disk, view: memoryview, guest: int) -> Error | None:
    """Why a range cannot be read, if it cannot."""
    try:
        disk.fill(view, guest)
    except (ImageError, StorageError) as e:
        return e
    return None
