"""A snapshot as a disk: its size, its bytes and its extents, the layers below merged in.

A :class:`Disk` puts the parts together.  The mapping says what lies where, the clusters read it,
what is unallocated comes from the layer below, and the guard has the last word: it is asked
after the bytes have been read, and before anybody sees them.
"""

from __future__ import annotations

from collections.abc import Iterator
from time import thread_time_ns

from ..errors import Error, ImageError, StorageError
from ..format import ondisk as q
from ..storage.local import Buffer, ensure_open
from ..typed import TYPE_CHECKING, Final
from .clusters import Clusters, fill_zeros
from .extents import ALLOCATED, HOLE_ZERO, Extent, FileRange, MappedRange, merged
from .guard import Guard, confirmed
from .mapping import COMPRESSED, DATA, UNALLOCATED, ZERO, Budget, Mapping
from .native import LayerDescription, make_reader
from .tablereader import TableReader

if TYPE_CHECKING:
    from ..format.snapshots import Identity
    from .fileobject import RawDisk
    from .layers import Layer

# A client that asks to have data prefetched need not get all of it.
_MOST_PREFETCHED: Final = 32 << 20
_MOST_PREFETCHED_LOOKUPS: Final = 1 << 15


class Disk:
    """A snapshot's disk or saved VM state, or a backing file's active disk.  Read-only."""

    def __init__(
        self,
        name: str,
        size: int,
        mapping: Mapping,
        clusters: Clusters,
        guard: Guard,
        below: Layer | None = None,
        base: int = 0,
    ) -> None:
        """``name`` is for error lines; ``base`` the guest offset where this disk begins."""
        self.name = name
        self.size = size
        self.cluster_size = mapping.cluster_size
        self._mapping = mapping
        self._clusters = clusters
        self._guard = guard
        self._below = below
        self.base = base
        #: reads the common case natively, or None
        self.reader = make_reader(guard, self)

    # --- What users call ---

    def pread(self, length: int, offset: int) -> bytes:
        """``length`` bytes from ``offset``; raises as :meth:`pread_into`."""
        data = bytearray(length)
        self.pread_into(data, offset)
        return bytes(data)

    def pread_into(self, buffer: Buffer, offset: int) -> None:
        """Fill a writable, contiguous buffer from ``offset``, all of its bytes.

        Raises ValueError outside the disk; ImageError or StorageError when the content cannot be
        had, SnapshotGone when the snapshot was deleted.  The buffer then holds nothing of use.
        """
        if self.reader is not None and self.reader.read(buffer, offset):
            return
        view = memoryview(buffer)
        if view.nbytes != len(buffer):  # larger items, or several dimensions
            buffer = view.cast("B")
        if offset < 0 or offset + len(buffer) > self.size:
            raise ValueError(f"{len(buffer)} bytes at {offset} are outside the disk of {self.size}")
        try:
            self.fill(buffer, offset)
        except (ImageError, StorageError):
            self._guard.confirm()  # if it is gone, that is the reason for anything
            raise
        self._guard.confirm()

    @property
    def mapping(self) -> Mapping:
        """What lies where; whoever asks it asks :meth:`confirm` before believing the answer."""
        return self._mapping

    @property
    def tables(self) -> TableReader:
        """Its tables, which are to be confirmed as well."""
        return self._mapping.tables

    @property
    def identity(self) -> Identity | None:
        """What makes the snapshot this one; None for an active disk."""
        return self._guard.identity

    def confirm(self) -> None:
        """Raises SnapshotGone when the snapshot was deleted."""
        self._guard.confirm()

    def ensure_open(self) -> None:
        """Raises ValueError when the image was closed."""
        ensure_open(self.tables.storage)

    def extents(self, offset: int, length: int) -> Iterator[Extent]:
        """The range as ALLOCATED and HOLE_ZERO extents, coalesced, from the tables alone.

        It ends early after a bounded amount of work, never before its first extent.
        Raises as :meth:`pread_into`, for a range that needs a damaged table.
        """
        if offset < 0 or length < 0 or offset + length > self.size:
            raise ValueError(f"{length} bytes at {offset} are outside the disk of {self.size}")
        ranges = self.ranges(offset, length, Budget(q.MAX_EXTENT_LOOKUPS))
        yield from merged(Extent(m[0], m[1], m[2]) for m in confirmed(ranges, self))

    @property
    def reach(self) -> int:
        """How many of its bytes, from the first on, its L1 table covers; the others are lost."""
        reach = self._mapping.reach
        return self.size if reach is None else max(0, min(self.size, reach - self.base))

    @property
    def below(self) -> Layer | None:
        """The layer that has what is unallocated here."""
        return self._below

    def own(self) -> Iterator[Extent]:
        """What this layer says itself, in order; what it leaves to the one below is left out.
        Raises as :meth:`pread_into`."""
        for guest, n, kind, _ in confirmed(self._runs(0, self.size), self) if self.size else ():
            if kind != UNALLOCATED:
                yield Extent(guest - self.base, n, HOLE_ZERO if kind == ZERO else ALLOCATED)

    def compressed(self, offset: int) -> bytes | None:
        """The stream of the cluster at the offset, with what is behind it in its last sector; None
        where it is not compressed in this layer.  To be confirmed, as tables are."""
        _, kind, location = self._mapping.run(self.base + offset, self.cluster_size)
        if kind != COMPRESSED:
            return None
        where, length = self._clusters.stream(location)
        return self.tables.storage.read(length, where)

    def spared(self, offset: int, length: int) -> int:
        """How many bytes of a range are not stored in this layer since it is compressed."""
        return sum(
            max(0, n - self._clusters.stream(location)[1])
            for _, n, kind, location in self._mapping.runs(self.base + offset, length)
            if kind == COMPRESSED
        )

    def prefetch(self, offset: int, length: int) -> None:
        """Start to fetch what a read of the range will want; errors are left to that read, as some
        of nbdkit's filters end the server when a prefetch fails (docs/upstream-nbdkit.md)."""
        try:
            length = min(length, _MOST_PREFETCHED)
            budget = Budget(_MOST_PREFETCHED_LOOKUPS)
            for guest, n, kind, location in self._mapping.runs(self.base + offset, length, budget):
                if kind == DATA:
                    self._clusters.will_need(location, n)
                elif kind == COMPRESSED:
                    began = thread_time_ns()
                    self._clusters.load(location, self._mapping.token, guest & -self.cluster_size)
                    budget.spend_since(began)
        except (Error, MemoryError):
            return

    def raw(self) -> RawDisk:
        """The disk as a seekable, read-only file object."""
        from .fileobject import RawDisk

        return RawDisk(self)

    # --- What a layer does (class Layer) ---

    def description(self) -> LayerDescription | None:
        data = self._clusters.description()
        if data is None:
            return None
        fd, *clusters = data
        return fd, self.size, *self._mapping.description(), self.base, *clusters

    def fill(self, buffer: Buffer, offset: int, budget: Budget | None = None) -> None:
        length = len(buffer)
        guest = self.base + offset
        if budget is not None:
            budget.remaining -= 1
        try:
            n, kind, location = self._mapping.run(guest, length, budget)
            if n == length:
                self._fill_run(buffer, guest, kind, location, budget)
                return
        except (ImageError, StorageError) as e:
            raise self._located(e, guest) from e
        view = memoryview(buffer).cast("B")
        budget = budget or Budget(q.MAX_LOOKUPS)
        start = guest
        for guest, n, kind, location in self._runs(offset, length, budget):
            try:
                wanted = view[guest - start : guest - start + n]
                self._fill_run(wanted, guest, kind, location, budget)
            except (ImageError, StorageError) as e:
                raise self._located(e, guest) from e
        if guest + n < start + length:
            raise ImageError(
                f"{self.name}: a read at guest offset {offset:#x} takes more than "
                f"{q.MAX_LOOKUPS} look-ups: ask for less at a time"
            )

    def inside(self, host: int, length: int) -> int:
        """How many bytes of a run of data the file has, from host offset ``host`` on."""
        return self._clusters.inside(host, length)

    def in_file(self, offset: int, length: int) -> FileRange | None:
        n, kind, location = self._mapping.run(self.base + offset, length)
        if kind == UNALLOCATED and self._below is not None:
            inside = min(n, self._below.size - offset)
            return self._below.in_file(offset, inside) if inside > 0 else None
        fd = self._clusters.plain_fd
        return FileRange(fd, location, n) if kind == DATA and fd is not None else None

    def ranges(
        self, offset: int, length: int, budget: Budget | None = None
    ) -> Iterator[MappedRange]:
        if not length:
            return
        for guest, n, kind, location in self._runs(offset, length, budget):
            start = guest - self.base
            if kind in (DATA, COMPRESSED):
                try:
                    host = self._clusters.locate(kind == COMPRESSED, location, n)
                except ImageError as e:
                    raise self._located(e, guest) from e
                yield MappedRange(start, n, ALLOCATED, host, kind, location)
            elif kind == ZERO or self._below is None:
                yield MappedRange(start, n, HOLE_ZERO, None, kind, 0)
            else:
                inside = max(0, min(n, self._below.size - start))
                if inside:
                    for mapped in self._below.ranges(start, inside, budget):
                        if budget is not None:
                            # Each layer above that it goes through costs as much.
                            budget.remaining -= 1
                        yield MappedRange(*mapped[:3], None, kind, 0)
                    if budget is not None and budget.remaining < 0:
                        return
                if inside < n:
                    yield MappedRange(start + inside, n - inside, HOLE_ZERO, None, kind, 0)

    # --- Inside ---

    def _fill_run(
        self, buffer: Buffer, guest: int, kind: int, location: int, budget: Budget | None
    ) -> None:
        """Fill a buffer from one run of the mapping."""
        if kind == DATA:
            self._clusters.read(buffer, location, guest)
        elif kind == COMPRESSED:
            began = 0 if budget is None else thread_time_ns()
            within = guest & (self.cluster_size - 1)
            view = memoryview(buffer).cast("B")
            token = self._mapping.token
            self._clusters.read_compressed(view, location, token, guest - within, within)
            if budget is not None:
                budget.spend_since(began)
        elif kind == UNALLOCATED and self._below is not None:
            offset = guest - self.base
            inside = max(0, min(len(buffer), self._below.size - offset))
            if inside < len(buffer):
                buffer = memoryview(buffer).cast("B")
                fill_zeros(buffer[inside:])
                buffer = buffer[:inside]
            if inside:
                self._below.fill(buffer, offset, budget)
        else:
            fill_zeros(memoryview(buffer).cast("B"))

    def _runs(
        self, offset: int, length: int, budget: Budget | None = None
    ) -> Iterator[tuple[int, int, int, int]]:
        """The mapping's runs, with its errors located."""
        guest = self.base + offset
        try:
            for run in self._mapping.runs(guest, length, budget):
                yield run
                guest = run[0] + run[1]
        except (ImageError, StorageError) as e:
            raise self._located(e, guest) from e

    def _located(self, e: Error, guest: int) -> Error:
        """The same error, saying whose and which guest offset could not be read; of the layers
        below only the last one is named."""
        located = type(e)(f"{self.name}: guest offset {guest - self.base:#x}: {e._located or e}")
        located._located = e._located or str(located)
        return located
