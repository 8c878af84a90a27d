"""Moving a disk's content, or some ranges of it, to a target: several threads, one range each.

A range list is gone through twice.  First it is only counted: so the tables are known to be
readable, and the space to be there, before anything is written.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from threading import Lock
from typing import Final, NamedTuple, Protocol

from .disk import ALLOCATED, Disk, Extent, RawLayer, merged
from .interrupts import check
from .progress import Advance
from .storage import Buffer
from .targets import Target

#: Gives the ranges to move, from the start each time it is called.
Plan = Callable[[], Iterable[Extent]]

THREADS: Final = min(8, max(2, os.cpu_count() or 1))
THREADS_REMOTE: Final = 8  # they wait for a server, not for a processor

# The largest cluster: no compressed one is then decoded for two pieces.
_PIECE: Final = 2 << 20
_ZERO_PIECE: Final = 1 << 30  # NBD lengths have 32 bits

_PATIENCE: Final = 0.1  # seconds until Ctrl-C is heard


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
        for offset, length, kind, _ in self._layer.pieces(0, self._layer.size):
            yield Extent(offset, length, kind)


class Amount(NamedTuple):
    """How much a plan moves, in bytes."""

    data: int
    zeros: int


def count(plan: Plan) -> Amount:
    """Go through a plan without reading data.  Raises what the tables' damage raises."""
    data = zeros = 0
    for extent in plan():
        check()
        if extent.type == ALLOCATED:
            data += extent.length
        else:
            zeros += extent.length
    return Amount(data, zeros)


def whole(disk: Disk) -> Iterator[Extent]:
    """All of a disk; :meth:`.Disk.extents` stops after a bounded amount of work."""
    at = 0
    while at < disk.size:
        for extent in disk.extents(at, disk.size - at):
            yield extent
            at = extent.offset + extent.length


def transfer(
    source: Source, plan: Plan, target: Target, advance: Advance, threads: int = THREADS
) -> None:
    """Write the plan's ranges of the source to the target, and zeros where it says so.

    ``advance`` hears of data alone, since zeros take no time worth showing.
    The first error of any thread ends it and is raised; so does Ctrl-C
    (:mod:`.interrupts`).
    """
    pieces = _Pieces(plan())

    def work() -> None:
        buffer = memoryview(bytearray(_PIECE))
        for piece in pieces:
            if piece.type == ALLOCATED:
                view = buffer[: piece.length]
                source.pread_into(view, piece.offset)
                target.write(view, piece.offset)
                advance(piece.length)
            else:
                target.zero(piece.offset, piece.length)

    with ThreadPoolExecutor(threads) as pool:
        try:
            futures = [pool.submit(work) for _ in range(threads)]
            running = True
            while running:
                check()
                done, pending = wait(futures, _PATIENCE, return_when=FIRST_EXCEPTION)
                running = bool(pending) and not any(f.exception() for f in done)
        finally:
            pieces.stop()  # leaving the block waits for what each is doing now
    for future in done:
        future.result()
    target.flush()


class _Pieces:
    """The ranges cut to size, handed out to many threads."""

    def __init__(self, extents: Iterable[Extent]) -> None:
        self._pieces = _cut(extents)
        self._lock = Lock()
        self._stopped = False

    def stop(self) -> None:
        self._stopped = True

    def __iter__(self) -> Iterator[Extent]:
        return self

    def __next__(self) -> Extent:
        with self._lock:
            if self._stopped:
                raise StopIteration
            return next(self._pieces)


def _cut(extents: Iterable[Extent]) -> Iterator[Extent]:
    for offset, length, kind in merged(extents):
        step = _PIECE if kind == ALLOCATED else _ZERO_PIECE
        at, end = offset, offset + length
        while at < end:
            stop = min(end, (at // step + 1) * step)
            yield Extent(at, stop - at, kind)
            at = stop
