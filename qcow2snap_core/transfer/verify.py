"""Is what was written what was asked for?  Every byte is read back and compared.

Other programs write most of what the commands here make, and disks and memory err as well, so an
output gets its name only when it has been read again.  Expected is what the source says now, read a
second time; found is what is in the output: images by our own reader, exports and devices by
themselves.  Where the tables of both say zeros nothing is read, so that a sparse disk of a terabyte
does not take hours; where only one says so, the other has to hold zeros.

:func:`images` is for qcow2 files with all that is in them, :func:`compare` for the ranges that were
written to anything else.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Final, NamedTuple, Protocol

from ..errors import StorageError, shown
from ..format.choosing import summary
from ..image.disk import Disk
from ..image.extents import ALLOCATED, HOLE_ZERO, Extent, merged
from ..image.image import Image
from ..image.opener import Options, open_image
from ..storage.local import Buffer
from ..tables.diff import changes
from ..util.interrupts import raise_if_interrupted
from ..util.progress import Advance, progress
from ..util.workers import spread
from .mover import PIECE, THREADS, Plan, Source, cut

_ZEROS: Final = bytes(PIECE)


class Readable(Protocol):
    """What was written, as something to read: a :class:`.Disk`, or a target."""

    def pread_into(self, buffer: Buffer, offset: int) -> None: ...

    def extents(self, offset: int, length: int) -> Iterator[Extent]:
        """The range as far as can be told at once, from its start; never less than one extent."""


class Differs(StorageError):
    """What was written is not what was asked for."""

    offset = 0  #: in the disk, the first one where that was seen


class State(NamedTuple):
    """What a snapshot, or an active disk, was asked to be."""

    name: str
    size: int  # bytes
    source: Source
    plan: Plan  # all of it


class Written(NamedTuple):
    """A qcow2 file that was written, and what was asked for."""

    path: str  # where it is now
    name: str  # what it is going to be called
    snapshots: Sequence[State]
    active: State


class _Pair(NamedTuple):
    """A range in which neither side changes its type."""

    offset: int
    length: int
    zeros: bool  # expected, by the tables
    found_zeros: bool


def images(written: Sequence[Written], options: Options) -> None:
    """Compare every snapshot and the active disk of qcow2 files that were written.

    ``options`` opens them.  Raises Differs, and what reading either side raises.
    """
    total = sum(state.size for each in written for state in _states(each))
    with progress("comparing", total) as advance:
        for each in written:
            with open_image(each.path, options) as image:
                _image(image, each, advance)


def reading(image: Image, below: bool = False) -> Options:
    """To open what was written of an image: it is not encrypted, and names what the image names.
    ``below``: it lies on the image's own backing file, which may be."""
    directories = [file.directory for file in image.files if file.directory is not None]
    options = image.options
    return options._replace(
        allow_dirs=(*options.allow_dirs, *directories),
        passphrases={n: p for n, p in options.passphrases.items() if n and below},
    )


def _states(written: Written) -> list[State]:
    """Those that are read whole."""
    known = written.active in written.snapshots[-1:]
    return [*written.snapshots, *([] if known else [written.active])]


def _image(image: Image, written: Written, advance: Advance) -> None:
    there = image.snapshots
    expected = [state.name for state in written.snapshots]
    if [snapshot.name for snapshot in there] != expected:
        raise StorageError(f"{shown(written.name)} was written wrong: {summary(there)}")
    newest: Disk | None = None
    for state, snapshot in zip(written.snapshots, there, strict=True):
        newest = image.disk(snapshot)
        what = f"snapshot {shown(state.name)} of {shown(written.name)}"
        _whole(state, newest, what, advance)
    active, state = image.active_disk(), written.active
    if newest is not None and state in written.snapshots[-1:]:
        # QEMU took that snapshot last, so the tables are the same but for a copy of the first.
        disk = newest
        check_size(disk.size, active.size, shown(written.name))
        compare(active, lambda: changes(disk, active), disk, shown(written.name), advance)
    else:
        _whole(state, active, shown(written.name), advance)


def _whole(state: State, found: Disk, what: str, advance: Advance) -> None:
    check_size(state.size, found.size, what)
    compare(state.source, state.plan, found, what, advance)


def compare(
    source: Source,
    plan: Plan,
    found: Readable,
    what: str,
    advance: Advance,
    threads: int = THREADS,
) -> None:
    """Compare the plan's ranges of the source with what was found at the same offsets.

    ``what`` is the output in error lines; ``advance`` hears of all bytes, of those too that need
    not be read.  Raises Differs with an offset where they do, and what reading raises.
    """

    def comparer() -> Callable[[_Pair], None]:
        buffers = bytearray(PIECE), bytearray(PIECE)

        def content(
            side: Source | Readable, zeros: bool, buffer: bytearray, pair: _Pair
        ) -> bytes | bytearray:
            if not zeros:
                side.pread_into(memoryview(buffer)[: pair.length], pair.offset)
            whole = _ZEROS if zeros else buffer
            return whole if pair.length == PIECE else whole[: pair.length]

        def do(pair: _Pair) -> None:
            expected = content(source, pair.zeros, buffers[0], pair)
            there = content(found, pair.found_zeros, buffers[1], pair)
            if expected != there:
                offset = pair.offset + _first_difference(expected, there)
                differs = Differs(
                    f"{what} differs from its source at guest offset {offset:#x}: it was written "
                    f"wrong, or changed meanwhile"
                )
                differs.offset = offset
                raise differs
            advance(pair.length)

        return do

    spread(_to_read(plan, found, advance), comparer, threads)


def check_size(expected: int, found: int, what: str) -> None:
    """Raises StorageError unless the two sizes are the same."""
    if expected != found:
        raise StorageError(f"{what} was written wrong: it has {found} bytes instead of {expected}")


def _to_read(plan: Plan, found: Readable, advance: Advance) -> Iterator[_Pair]:
    """What the tables leave to be read, in pieces."""
    for offset, length, kind in merged(plan()):
        for there in _covering(found, offset, length):
            raise_if_interrupted()
            if kind == there.type == HOLE_ZERO:
                advance(there.length)
                continue
            for at, n, _ in cut([there._replace(type=ALLOCATED)]):
                yield _Pair(at, n, kind == HOLE_ZERO, there.type == HOLE_ZERO)


def _covering(found: Readable, offset: int, length: int) -> Iterator[Extent]:
    end = offset + length
    while offset < end:
        for extent in found.extents(offset, end - offset):
            yield extent
            offset = extent.offset + extent.length


def _first_difference(a: bytes | bytearray, b: bytes | bytearray) -> int:
    """The first index at which they differ, and they do."""
    low, high = 0, len(a)
    while high - low > 1:
        middle = (low + high) // 2
        if a[low:middle] != b[low:middle]:
            high = middle
        else:
            low = middle
    return low
