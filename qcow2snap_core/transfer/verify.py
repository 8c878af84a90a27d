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
from functools import partial
from typing import Final, NamedTuple, Protocol

from ..errors import StorageError, shown
from ..format.choosing import summary
from ..format.snapshot_table import Table
from ..format.snapshots import Snapshot
from ..image.disk import Disk
from ..image.extents import ALLOCATED, HOLE_ZERO, Extent, merged
from ..image.image import Image
from ..image.opener import Options, open_image
from ..storage.local import Buffer
from ..tables.check import check
from ..tables.diff import changes
from ..tables.findings import IN_PLACE, NOT_COUNTED, OVERLAP
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


def compare_state(
    state: State, found: Disk, differs: Sequence[Plan], what: str, advance: Advance
) -> None:
    """Compare a state with what was found, ``what`` in error lines.

    ``differs``: where either side says that it differs from another state that was compared before
    and that it was written over; everywhere else both are what that is.  Without any, everything.
    """
    check_size(state.size, found.size, what)
    if not differs:
        compare(state.source, state.plan, found, what, advance)
        return
    for plan in differs:
        compare(state.source, partial(_as_data, plan), found, what, lambda _: None)
    advance(state.size)


def _as_data(plan: Plan) -> Iterator[Extent]:
    """To be read whatever one side says of it: the other may see otherwise."""
    return (extent._replace(type=ALLOCATED) for extent in plan())


def check_sound(image: Image, name: str) -> None:
    """Raises StorageError when an image that was written, and is going to have that name, would not
    stand a write."""
    for finding in check(image):
        if finding.problem in (OVERLAP, NOT_COUNTED, IN_PLACE):
            raise StorageError(f"{shown(name)} was written wrong: {finding.message}")


def described(s: Snapshot) -> tuple[object, ...]:
    """All that an entry says but where its table is."""
    return (
        s.id,
        s.name,
        s.date_sec,
        s.date_nsec,
        s.vm_clock_nsec,
        s.vm_state_size,
        s.disk_size,
        s.icount,
    )


def check_described(expected: Sequence[Snapshot], found: Table, name: str) -> None:
    """Raises StorageError unless the snapshots of what is going to have that name are those, in
    all that their entries say."""
    for ours, theirs in zip(expected, found.snapshots, strict=False):
        if described(ours) != described(theirs):
            raise StorageError(f"snapshot {shown(ours.name)} of {shown(name)} was written wrong")
    if len(found.snapshots) != len(expected):
        raise StorageError(f"{shown(name)} was written wrong: {summary(found.snapshots)}")


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
