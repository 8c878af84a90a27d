"""States of disks in a new qcow2 file, each written as what differs from one that is there already.

Where :mod:`.copier` moves the tables of one image, the states here come from anywhere: each is a
disk, and a plan of what of it differs from the state below.  All else stays what the state below
has, whole L2 tables where nothing in them differs.  Without a state below it is what the backing
file has that the new image names, or zeros.

A cluster of which something differs is written whole; with extended L2 entries over a backing
file, only the subclusters that differ.  Zeros take no space, whether the plan knows of them or
their bytes show it.  A state that is smaller than the one below ends with zeros in its last cluster
and has nothing behind it, so that a larger one above it does not see what was there before.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import chain, groupby
from typing import Final, NamedTuple

from ..errors import ImageError
from ..format import ondisk as q
from ..image.extents import ALLOCATED, HOLE_ZERO, Extent, merged
from ..util.interrupts import raise_if_interrupted
from ..util.progress import Advance
from .compressors import Compressor, compressor
from .mover import THREADS, Plan, Source
from .newimage import NewImage
from .shape import Shape

_BATCH: Final = 2 << 20  # bytes that are read at once, or a cluster
_PROBE: Final = 64  # bytes
_PARTS: Final = q.SUBCLUSTERS
_ALL: Final = (1 << _PARTS) - 1

#: The stream of the compressed cluster at an offset, with what is behind it in its last sector;
#: None where the cluster is not compressed.
Streams = Callable[[int], bytes | None]


class Tables(NamedTuple):
    """A state that was written."""

    l1: array[int]  # host offsets of its L2 tables in the new image, 0 where there is none
    size: int  # of the disk, bytes


class _Disk(NamedTuple):
    """Where a state's bytes come from."""

    source: Source
    size: int  # bytes
    base: int  # guest offset at which it begins: a VM state lies behind its disk
    streams: Streams | None

    @property
    def end(self) -> int:
        return self.base + self.size


class StateWriter:
    """Writes them, from one thread."""

    def __init__(
        self, new: NewImage, shape: Shape, advance: Advance, *, compress: bool = False
    ) -> None:
        """``compress`` the clusters that do not come as streams.  ``advance`` hears of the bytes of
        data in each plan."""
        self._new = new
        self._shape = shape
        self._size = shape.cluster_size
        self._step = shape.entry_words
        self._advance = advance
        self._zeros = bytes(self._size)
        self._buffer = memoryview(bytearray(max(_BATCH, self._size)))
        self._over_backing = bool(shape.backing_file)
        self._compressor: Compressor = compressor(shape.compression)
        self._pool = ThreadPoolExecutor(THREADS) if compress else None

    def close(self) -> None:
        if self._pool:
            self._pool.shutdown(cancel_futures=True)

    def state(
        self,
        source: Source,
        size: int,
        plan: Plan,
        below: Tables | None = None,
        streams: Streams | None = None,
    ) -> Tables:
        """Write a disk of that size, of which the plan's ranges differ from the state below.

        Raises what reading the source raises, StorageError when the file cannot be written.
        """
        extents: Iterable[Extent] = plan()
        if below is not None and below.size > size > 0:
            last = (size - 1) // self._size * self._size
            extents = chain(extents, [Extent(last, size - last, ALLOCATED)])
        l1 = self._l1(size, array("Q") if below is None else below.l1)
        self._apply(l1, _Disk(source, size, 0, streams), extents)
        return Tables(l1, size)

    def vm_state(self, state: Tables, source: Source, size: int, plan: Plan) -> array[int]:
        """The state's L1 table with a VM state behind its disk (QEMU: qcow2_vm_state_offset)."""
        span = self._shape.bytes_per_l1_entry
        base = -(-state.size // span) * span
        l1 = self._l1(base + size, state.l1[: base // span])
        self._apply(l1, _Disk(source, size, base, None), plan())
        return l1

    # --- Tables ---

    def _l1(self, end: int, known: array[int]) -> array[int]:
        count = max(1, -(-end // self._shape.bytes_per_l1_entry))
        if count * q.L1_ENTRY_SIZE > q.MAX_L1_BYTES:
            raise ImageError(f"{end} bytes are too many for a disk with clusters of {self._size}")
        l1 = known[:count]
        l1.frombytes(bytes((count - len(l1)) * q.L1_ENTRY_SIZE))
        return l1

    def _apply(self, l1: array[int], disk: _Disk, extents: Iterable[Extent]) -> None:
        span = self._shape.bytes_per_l1_entry
        cut = _cut(merged(extents), disk.base, span)
        for index, pieces in groupby(cut, lambda piece: piece.offset // span):
            raise_if_interrupted()
            first, changed = index * span, list(pieces)
            if changed == [Extent(first, span, HOLE_ZERO)] and not self._over_backing:
                l1[index] = 0
                continue
            words = self._words(l1[index], disk.end - first)
            self._write(words, first, self._zero_and_choose(words, first, changed, disk.end), disk)
            l1[index] = self._new.l2_table(words) if any(words) else 0

    def _words(self, table: int, inside: int) -> array[int]:
        """The words of an L2 table, without what is behind the disk's end."""
        count = self._shape.l2_entries * self._step
        if not table:
            return array("Q", bytes(q.L2_ENTRY_SIZE * count))
        words = self._new.read_l2(table)
        kept = min(count, -(-inside // self._size) * self._step)
        words[kept:] = array("Q", bytes(q.L2_ENTRY_SIZE * (count - kept)))
        return words

    def _zero_and_choose(
        self, words: array[int], first: int, pieces: Iterable[Extent], end: int
    ) -> dict[int, int]:
        """Make zeros of the clusters that a range of zeros covers; returns the others of which
        something differs, by number, and which of their parts."""
        chosen: dict[int, int] = {}
        for offset, length, kind in pieces:
            stop = offset + length
            covers = stop if stop < end else -(-stop // self._size) * self._size
            start, until = -(-offset // self._size) * self._size, covers // self._size * self._size
            if kind != HOLE_ZERO or start >= until:
                self._choose(chosen, first, offset, stop)
                continue
            self._zero(words, (start - first) // self._size, (until - first) // self._size)
            self._choose(chosen, first, offset, start)
            self._choose(chosen, first, until, stop)
        return chosen

    def _choose(self, chosen: dict[int, int], first: int, offset: int, stop: int) -> None:
        while offset < stop:
            within = offset % self._size
            n = min(self._size - within, stop - offset)
            until = -(-(within + n) * _PARTS // self._size)
            parts = (1 << until) - (1 << within * _PARTS // self._size)
            number = (offset - first) // self._size
            chosen[number] = chosen.get(number, 0) | parts
            offset += n

    def _zero(self, words: array[int], first: int, stop: int) -> None:
        entry = [0, 0] if self._shape.extended_l2 else [0]
        if self._over_backing:
            entry[-1] = _ALL << _PARTS if self._shape.extended_l2 else q.OFLAG_ZERO
        words[first * self._step : stop * self._step] = array("Q", entry * (stop - first))

    # --- Clusters ---

    def _write(self, words: array[int], first: int, chosen: dict[int, int], disk: _Disk) -> None:
        """Write the chosen clusters of the table at that guest offset."""
        together: list[int] = []
        most = max(1, _BATCH // self._size)
        for number in sorted(chosen):
            stream = self._stream(first + number * self._size, disk)
            if stream:
                self._put(words, number, self._new.compressed(stream))
                continue
            if together and (number != together[-1] + 1 or len(together) == most):
                self._copy(words, first, together, chosen, disk)
                together = []
            together.append(number)
        self._copy(words, first, together, chosen, disk)

    def _stream(self, guest: int, disk: _Disk) -> bytes | None:
        """Not of the disk's last cluster: behind the end there might be something else in it."""
        if disk.streams is None or guest + self._size > disk.end:
            return None
        stream = disk.streams(guest - disk.base)
        if stream is None:
            return None
        try:
            length = self._compressor.length(stream, self._size)
        except ImageError:
            return None  # a read of the cluster will say what is wrong, and where
        if not 0 < length < self._size:
            return None
        self._advance(self._size)
        return stream[:length]

    def _copy(
        self,
        words: array[int],
        first: int,
        numbers: list[int],
        chosen: dict[int, int],
        disk: _Disk,
    ) -> None:
        """Write clusters that lie one after the other, read in one go."""
        if not numbers:
            return
        size = self._size
        at = first + numbers[0] * size - disk.base
        data = self._buffer[: len(numbers) * size]
        inside = min(len(data), disk.size - at)
        disk.source.pread_into(data[:inside], at)
        data[inside:] = bytes(len(data) - inside)
        pieces = [data[i : i + size] for i in range(0, len(data), size)]
        streams: Iterator[bytes] = iter([self._zeros] * len(pieces))  # nothing is saved
        if self._pool:
            streams = self._pool.map(self._compressor.compress, pieces)
        begun = stop = wanted = 0  # of the bytes that are to be written next, and their host offset
        for i, (piece, stream) in enumerate(zip(pieces, streams, strict=True)):
            host = self._place(words, numbers[i], piece, stream, chosen[numbers[i]])
            if not host or stop != i * size or host != wanted + stop - begun:
                self._new.write(data[begun:stop], wanted)
                begun, stop, wanted = i * size, i * size, host
            if host:
                stop += size
        self._new.write(data[begun:stop], wanted)
        self._advance(inside)

    def _place(
        self, words: array[int], number: int, piece: memoryview, stream: bytes, parts: int
    ) -> int:
        """Set the entry of a cluster; returns the host offset to which it is to be written, 0 where
        there is nothing to write."""
        slot = number * self._step
        is_zero = self._is_zero(piece)
        if not self._shape.extended_l2:
            if is_zero:
                self._zero(words, number, number + 1)
                return 0
        elif not self._over_backing or words[slot] or words[slot + 1]:
            parts = _ALL  # what is not written of a cluster could not be seen any more
        if len(stream) < self._size and not is_zero:
            self._put(words, number, self._new.compressed(stream))
            return 0
        bitmap = self._bitmap(piece, parts) if self._shape.extended_l2 else _ALL
        host = self._new.allocate(self._size) if bitmap & _ALL else 0
        self._put(words, number, host, bitmap)
        return host

    def _is_zero(self, piece: memoryview) -> bool:
        """Whether it has nothing but zeros, of which most data does not even begin with many."""
        probe = piece[:_PROBE]
        zeros = self._zeros[: len(piece)]
        return probe == zeros[:_PROBE] and bytes(piece) == zeros

    def _bitmap(self, piece: memoryview, parts: int) -> int:
        """The second word of an extended entry: the parts with data, and above them those of
        zeros that are not zeros anyway."""
        part = self._size // _PARTS
        data = 0
        for i in range(_PARTS):
            if parts >> i & 1 and not self._is_zero(piece[i * part : (i + 1) * part]):
                data |= 1 << i
        zeros = parts & ~data if self._over_backing else 0
        return data | zeros << _PARTS

    def _put(self, words: array[int], number: int, entry: int, bitmap: int = 0) -> None:
        words[number * self._step] = entry
        if self._shape.extended_l2:
            words[number * self._step + 1] = bitmap


def _cut(extents: Iterable[Extent], base: int, span: int) -> Iterator[Extent]:
    """The ranges at guest offsets, none of them behind two L1 entries."""
    for offset, length, kind in extents:
        at, end = base + offset, base + offset + length
        while at < end:
            n = min(end - at, span - at % span)
            yield Extent(at, n, kind)
            at += n
