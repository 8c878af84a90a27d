"""Moving a disk's content, or some ranges of it, to a target: several threads, one range each.

A range list is gone through twice.  First it is only counted: so the tables are known to be
readable, and the space to be there, before anything is written.

Every request to a target stays in an aligned block of 2 MiB, or covers whole ones, and all of a
block is done by one thread, one request after the other.  2 MiB is the largest cluster, so no
cluster of the target has two of our requests at a time.  Where another program writes it
(``foreign``), zeros and data do not even meet: first all the zeros go, then a flush, then the data.

QEMU 7.2 at least needs that: with extended L2 entries it loses a request for zeros that runs
beside a copy-on-write of the same cluster (docs/upstream-qemu.md).  Phases alone would not do,
since QEMU may treat two of a kind differently: data that it finds to be zeros
(``--detect-zeroes``), and zeros whose ends are no subcluster's, which it writes as data.

Zeros first: they give back the space that the data may need.  And a server that makes more zeros
than it was asked for, since all around is zero as yet (QEMU does that with clusters), then does so
before the data comes, and not after.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import groupby, islice
from typing import Final, NamedTuple, Protocol

from ..image.disk import Disk
from ..image.extents import ALLOCATED, HOLE_ZERO, Extent, merged
from ..image.layers import RawLayer
from ..storage.local import Buffer
from ..util.interrupts import raise_if_interrupted
from ..util.pool import Pool
from ..util.progress import Bar
from ..util.workers import spread
from .kernel import KernelCopy
from .targets import Target

#: Gives the ranges to move, from the start each time it is called.
Plan = Callable[[], Iterable[Extent]]

#: What one thread does in one go.
Block = list[Extent]

THREADS: Final = min(8, max(2, os.cpu_count() or 1))
THREADS_REMOTE: Final = 8  # they wait for a server, not for a processor

#: The largest cluster: no compressed one is decoded for two pieces either.
PIECE: Final = 2 << 20
_ZERO_PIECE: Final = 1 << 30  # NBD lengths have 32 bits
_ZEROS: Final = memoryview(bytes(PIECE))


class Source(Protocol):
    """What a :class:`.Disk` is to this module."""

    def pread_into(self, buffer: Buffer, offset: int) -> None: ...


class RawSource:
    """A raw file as one."""

    def __init__(self, layer: RawLayer) -> None:
        self._layer = layer

    def pread_into(self, buffer: Buffer, offset: int) -> None:
        self._layer.fill(memoryview(buffer), offset)

    def plan(self) -> Iterator[Extent]:
        """All of it, as its holes say."""
        return self.extents(0, self._layer.size)

    def extents(self, offset: int, length: int) -> Iterator[Extent]:
        for found in self._layer.ranges(offset, length):
            yield Extent(*found[:3])


class Amount(NamedTuple):
    """How much a plan moves, in bytes."""

    data: int
    zeros: int


def count(plan: Plan) -> Amount:
    """Go through a plan without reading data.  Raises what the tables' damage raises."""
    data = zeros = 0
    for extent in plan():
        raise_if_interrupted()
        if extent.type == ALLOCATED:
            data += extent.length
        else:
            zeros += extent.length
    return Amount(data, zeros)


def whole(disk: Disk) -> Iterator[Extent]:
    """All of a disk."""
    return between(disk, 0, disk.size)


def between(disk: Disk, start: int, end: int) -> Iterator[Extent]:
    """A part of a disk; :meth:`.Disk.extents` stops after a bounded amount of work."""
    at = start
    while at < end:
        for extent in disk.extents(at, end - at):
            yield extent
            at = extent.offset + extent.length


def transfer(source: Source, plan: Plan, target: Target, bar: Bar, threads: int = THREADS) -> None:
    """Write the plan's ranges of the source to the target, and zeros where it says so.

    The bar hears of data alone, since zeros take no time worth showing.
    The first error of any thread ends it and is raised; so does Ctrl-C
    (:mod:`..util.interrupts`).
    """

    kernel: KernelCopy | None = None
    if isinstance(source, Disk) and target.fd is not None:
        kernel = KernelCopy(source, target.fd)

    def writer() -> Callable[[Block], None]:
        buffer = memoryview(bytearray(PIECE))

        def write(block: Block) -> None:
            for offset, length, kind in block:
                if kind == ALLOCATED:
                    done = 0 if kernel is None else kernel.copy(offset, length)
                    if done < length:
                        rest = buffer[: length - done]
                        source.pread_into(rest, offset + done)
                        target.write(rest, offset + done)
                    target.wrote(offset, length)
                    bar(length)
                else:
                    target.zero(offset, length)

        return write

    if target.foreign:
        for kind in (HOLE_ZERO, ALLOCATED):
            spread(by_block(_only(kind, plan())), writer, threads)
            target.flush()
        return
    spread(by_block(plan()), writer, threads)
    bar.now("waiting for the disk")
    target.flush()


def ordered(
    source: Source, plan: Plan, threads: int = THREADS
) -> Generator[memoryview, None, None]:
    """All bytes of a plan without gaps, in order, each piece until the next is asked for.

    As many pieces as there are threads are read ahead.  Raises what reading raises, where it is.
    """
    buffers: Pool[bytearray] = Pool(lambda: bytearray(PIECE))

    def read(extent: Extent) -> bytearray:
        buffer = buffers.take()
        source.pread_into(memoryview(buffer)[: extent.length], extent.offset)
        return buffer

    def pieces() -> Iterator[tuple[Extent, Future[bytearray] | None]]:
        for extent in cut(plan()):
            raise_if_interrupted()
            yield extent, pool.submit(read, extent) if extent.type == ALLOCATED else None

    with ThreadPoolExecutor(threads) as pool:
        under_way: deque[tuple[Extent, Future[bytearray] | None]] = deque()
        coming = pieces()
        while True:
            under_way.extend(islice(coming, threads - len(under_way)))
            if not under_way:
                return
            extent, reading = under_way.popleft()
            if reading is None:
                for at in range(0, extent.length, PIECE):
                    yield _ZEROS[: extent.length - at]
            else:
                buffer = reading.result()
                yield memoryview(buffer)[: extent.length]
                buffers.give(buffer)


def _only(kind: int, extents: Iterable[Extent]) -> Iterator[Extent]:
    for extent in extents:
        raise_if_interrupted()
        if extent.type == kind:
            yield extent


def cut(extents: Iterable[Extent]) -> Iterator[Extent]:
    """The ranges in pieces for one request each."""
    for offset, length, kind in merged(extents):
        at, end = offset, offset + length
        while at < end:
            largest = PIECE if kind == ALLOCATED or at % PIECE else _ZERO_PIECE
            stop = min(end, (at // largest + 1) * largest)
            if stop == end and end - at > PIECE:
                stop = end // PIECE * PIECE  # what is left begins a block
            yield Extent(at, stop - at, kind)
            at = stop


def by_block(extents: Iterable[Extent]) -> Iterator[Block]:
    """The pieces by the block in which they begin; none goes on into a block where others are."""
    for _, block in groupby(cut(extents), lambda piece: piece.offset // PIECE):
        yield list(block)
