"""A snapshot as a disk: its size, its bytes and its extents, the layers below merged in.

A :class:`Disk` puts the parts together.  The mapping says what lies where, the clusters read it,
what is unallocated comes from the layer below, and the guard has the last word: it is asked
after the bytes have been read, and before anybody sees them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice
from time import thread_time_ns

from ..errors import Error, ImageError, StorageError, shown
from ..format import ondisk as q
from ..storage.local import Buffer, Storage, check_open
from ..typed import TYPE_CHECKING, Final, NamedTuple, Protocol, TypeVar
from .clusters import Clusters, fill_zeros
from .guard import Guard
from .mapping import COMPRESSED, DATA, UNALLOCATED, ZERO, Mapping, Work
from .native import LayerDescription, make_reader

if TYPE_CHECKING:
    from ..format.snapshots import Identity
    from .raw import RawDisk

# Extent types, with the numbers of NBD's base:allocation.
ALLOCATED: Final = 0
HOLE_ZERO: Final = 3


class Extent(NamedTuple):
    """A range of one type."""

    offset: int  #: in the disk, bytes
    length: int
    type: int  #: ALLOCATED or HOLE_ZERO


class FileRange(NamedTuple):
    """A range of bytes in a file that is read like any other."""

    fd: int
    offset: int
    length: int


class Piece(NamedTuple):
    """A range with where it is from; neighbours may be alike."""

    offset: int
    length: int
    type: int
    host: int | None  #: in the image file itself; None for zeros and for other layers' data


#: (offset, length, type, host, kind, entry): a piece, what :mod:`.mapping` calls it, and the host
#: offset or whole L2 entry that it is known by: equal ones of two snapshots hold the same data.
Cell = tuple[int, int, int, "int | None", int, int]


class Layer(Protocol):
    """What can lie below: a raw file, or another qcow2 file's active disk."""

    size: int

    @property
    def below(self) -> Layer | None:
        """The next one."""

    def description(self) -> LayerDescription | None:
        """What :mod:`.native` tells the engine of it; None where it cannot read that."""

    def fill(self, buffer: Buffer, offset: int, work: Work | None = None) -> None:
        """Fill the buffer; the range lies inside the layer.  Raises ImageError, StorageError."""

    def pieces(self, offset: int, length: int, work: Work | None = None) -> Iterator[Piece]:
        """The range, lazily, or as much of it as the work goes; merging is up to the caller."""

    def in_file(self, offset: int, length: int) -> FileRange | None:
        """Where the start of the range lies in a file as it is; None where it does not, or where
        nothing but a read can tell.  Raises ImageError, StorageError.

        The file may end before it does, and who has used it asks :meth:`Disk.check`.
        """


class RawLayer:
    """A raw backing file: its bytes are the disk's, its holes are zeros."""

    below = None

    def __init__(self, storage: Storage) -> None:
        self.size = storage.size()
        self._storage = storage

    def description(self) -> LayerDescription | None:
        fd = self._storage.plain_fd
        return None if fd is None else (fd, self.size)

    def in_file(self, offset: int, length: int) -> FileRange | None:
        fd = self._storage.plain_fd
        return None if fd is None else FileRange(fd, offset, length)

    def fill(self, buffer: Buffer, offset: int, work: Work | None = None) -> None:
        got = self._storage.read_into(buffer, offset)
        if got < len(buffer):
            raise self._shrunk()

    def pieces(self, offset: int, length: int, work: Work | None = None) -> Iterator[Piece]:
        if offset + length > self._storage.size():
            raise self._shrunk()  # or what is missing would pass for a hole
        for start, n, hole in self._storage.holes(offset, length):
            if hole and offset + length > self._storage.size():
                raise self._shrunk()
            yield Piece(start, n, HOLE_ZERO if hole else ALLOCATED, None)
            if work is not None:
                work.left -= 1
                if work.left < 0:
                    return

    def _shrunk(self) -> StorageError:
        storage = self._storage
        return StorageError(
            f"{shown(storage.path)} has only {storage.size()} bytes left of {self.size}"
        )


# A client that asks to have data prefetched need not get all of it.
_MOST_PREFETCHED: Final = 32 << 20
_MOST_PREFETCHED_LOOKUPS: Final = 1 << 15
_BATCH: Final = 4096  # the first one; each is twice as large as the one before


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
        self._base = base
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
            self._guard.check()  # if it is gone, that is the reason for anything
            raise
        self._guard.check()

    @property
    def mapping(self) -> Mapping:
        """Its tables; whoever reads them asks :meth:`check` before believing what they said."""
        return self._mapping

    @property
    def identity(self) -> Identity | None:
        """What makes the snapshot this one; None for an active disk."""
        return self._guard.identity

    def check(self) -> None:
        """Raises SnapshotGone when the snapshot was deleted."""
        self._guard.check()

    def check_open(self) -> None:
        """Raises ValueError when the image was closed."""
        check_open(self._mapping.storage)

    def extents(self, offset: int, length: int) -> Iterator[Extent]:
        """The range as ALLOCATED and HOLE_ZERO extents, coalesced, from the tables alone.

        It ends early after a bounded amount of work, never before its first extent.
        Raises as :meth:`pread_into`, for a range that needs a damaged table.
        """
        if offset < 0 or length < 0 or offset + length > self.size:
            raise ValueError(f"{length} bytes at {offset} are outside the disk of {self.size}")
        cells = self.cells(offset, length, Work(q.MAX_EXTENT_LOOKUPS))
        yield from merged(Extent(*cell[:3]) for cell in checked(cells, self))

    @property
    def reach(self) -> int:
        """How many of its bytes, from the first on, its L1 table covers; the others are lost."""
        reach = self._mapping.reach
        return self.size if reach is None else max(0, min(self.size, reach - self._base))

    @property
    def below(self) -> Layer | None:
        """The layer that has what is unallocated here."""
        return self._below

    def own(self) -> Iterator[Extent]:
        """What this layer says itself, in order; what it leaves to the one below is left out.
        Raises as :meth:`pread_into`."""
        for kind, _, guest, n in checked(self._runs(0, self.size), self) if self.size else ():
            if kind != UNALLOCATED:
                yield Extent(guest - self._base, n, HOLE_ZERO if kind == ZERO else ALLOCATED)

    def prefetch(self, offset: int, length: int) -> None:
        """Start to fetch what a read of the range will want; errors are left to that read."""
        try:
            length = min(length, _MOST_PREFETCHED)
            work = Work(_MOST_PREFETCHED_LOOKUPS)
            for kind, host, guest, n in self._mapping.runs(self._base + offset, length, work):
                if kind == DATA:
                    self._clusters.will_need(host, n)
                elif kind == COMPRESSED:
                    began = thread_time_ns()
                    self._clusters.load(host, self._mapping.token, guest & -self.cluster_size)
                    work.took(began)
        except Error:
            return

    def raw(self) -> RawDisk:
        """The disk as a seekable, read-only file object."""
        from .raw import RawDisk

        return RawDisk(self)

    # --- What a layer does (class Layer) ---

    def description(self) -> LayerDescription | None:
        data = self._clusters.description()
        if data is None:
            return None
        fd, *clusters = data
        return fd, self.size, *self._mapping.description(), self._base, *clusters

    def fill(self, buffer: Buffer, offset: int, work: Work | None = None) -> None:
        length = len(buffer)
        guest = self._base + offset
        if work is not None:
            work.left -= 1
        try:
            kind, host, n = self._mapping.run(guest, length, work)
            if n == length:
                self._fill_run(buffer, kind, host, guest, work)
                return
        except (ImageError, StorageError) as e:
            raise self._located(e, guest) from e
        view = memoryview(buffer).cast("B")
        work = work or Work(q.MAX_LOOKUPS)
        start = guest
        for kind, host, guest, n in self._runs(offset, length, work):
            try:
                self._fill_run(view[guest - start : guest - start + n], kind, host, guest, work)
            except (ImageError, StorageError) as e:
                raise self._located(e, guest) from e
        if guest + n < start + length:
            raise ImageError(
                f"{self.name}: a read at guest offset {offset:#x} takes more than "
                f"{q.MAX_LOOKUPS} look-ups: ask for less at a time"
            )

    def in_file(self, offset: int, length: int) -> FileRange | None:
        kind, host, n = self._mapping.run(self._base + offset, length)
        if kind == UNALLOCATED and self._below is not None:
            inside = min(n, self._below.size - offset)
            return self._below.in_file(offset, inside) if inside > 0 else None
        fd = self._clusters.plain_fd
        return FileRange(fd, host, n) if kind == DATA and fd is not None else None

    def pieces(self, offset: int, length: int, work: Work | None = None) -> Iterator[Piece]:
        for cell in self.cells(offset, length, work):
            yield Piece(*cell[:4])

    def cells(self, offset: int, length: int, work: Work | None = None) -> Iterator[Cell]:
        """The pieces of a range with all that the tables say of them."""
        if not length:
            return
        for kind, entry, guest, n in self._runs(offset, length, work):
            start = guest - self._base
            if kind in (DATA, COMPRESSED):
                try:
                    host = self._clusters.locate(kind == COMPRESSED, entry, n)
                except ImageError as e:
                    raise self._located(e, guest) from e
                yield start, n, ALLOCATED, host, kind, entry
            elif kind == ZERO or self._below is None:
                yield start, n, HOLE_ZERO, None, kind, 0
            else:
                inside = max(0, min(n, self._below.size - start))
                if inside:
                    for piece in self._below.pieces(start, inside, work):
                        if work is not None:
                            work.left -= 1  # each layer above that it goes through costs as much
                        yield piece.offset, piece.length, piece.type, None, kind, 0
                    if work is not None and work.left < 0:
                        return
                if inside < n:
                    yield start + inside, n - inside, HOLE_ZERO, None, kind, 0

    # --- Inside ---

    def _fill_run(
        self, buffer: Buffer, kind: int, entry: int, guest: int, work: Work | None
    ) -> None:
        """Fill a buffer from one run of the mapping."""
        if kind == DATA:
            self._clusters.read(buffer, entry, guest)
        elif kind == COMPRESSED:
            began = 0 if work is None else thread_time_ns()
            within = guest & (self.cluster_size - 1)
            view = memoryview(buffer).cast("B")
            token = self._mapping.token
            self._clusters.read_compressed(view, entry, token, guest - within, within)
            if work is not None:
                work.took(began)
        elif kind == UNALLOCATED and self._below is not None:
            offset = guest - self._base
            inside = max(0, min(len(buffer), self._below.size - offset))
            if inside < len(buffer):
                buffer = memoryview(buffer).cast("B")
                fill_zeros(buffer[inside:])
                buffer = buffer[:inside]
            if inside:
                self._below.fill(buffer, offset, work)
        else:
            fill_zeros(memoryview(buffer).cast("B"))

    def _runs(
        self, offset: int, length: int, work: Work | None = None
    ) -> Iterator[tuple[int, int, int, int]]:
        """The mapping's runs, with its errors located."""
        guest = self._base + offset
        try:
            for run in self._mapping.runs(guest, length, work):
                yield run
                guest = run[2] + run[3]
        except (ImageError, StorageError) as e:
            raise self._located(e, guest) from e

    def _located(self, e: Error, guest: int) -> Error:
        """The same error, saying whose and which guest offset could not be read; of the layers
        below only the last one is named."""
        found = type(e)(f"{self.name}: guest offset {guest - self._base:#x}: {e.located or e}")
        found.located = e.located or str(found)
        return found


def merged(extents: Iterable[Extent]) -> Iterator[Extent]:
    """The same ranges, neighbours of one type as one."""
    last: Extent | None = None
    for extent in extents:
        if last is not None and (last.offset + last.length, last.type) == extent[::2]:
            last = Extent(last.offset, last.length + extent.length, last.type)
            continue
        if last is not None:
            yield last
        last = extent
    if last is not None:
        yield last


_T = TypeVar("_T")


def checked(found: Iterator[_T], *disks: Disk) -> Iterator[_T]:
    """The same items, none of them handed out before all disks were asked if they still exist.

    Those before a damaged table are handed out first, then its error is raised.
    """
    size = _BATCH
    files = {disk.mapping.storage for disk in disks}
    while True:
        damage: Error | None = None
        batch: list[_T] = []
        try:
            batch.extend(islice(found, size))
        except (ImageError, StorageError) as e:
            damage = e
        for disk in disks:
            disk.check()  # if one is gone, that is the reason for anything
        for item in batch:
            for file in files:
                if file.closed:
                    check_open(file)
            yield item
        if damage is not None:
            raise damage
        if len(batch) < size:
            return
        size *= 2  # for a hostile image a check may cost a tenth of a second
