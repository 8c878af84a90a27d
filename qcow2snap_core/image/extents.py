"""Ranges of a disk: as users see them, and with all that the tables say of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from ..typed import Final, NamedTuple, TypeVar

# Extent types, with the numbers of NBD's base:allocation.
ALLOCATED: Final = 0
HOLE_ZERO: Final = 3


class Extent(NamedTuple):
    """A range of one type."""

    offset: int  #: in the disk, bytes
    length: int
    type: int  #: ALLOCATED or HOLE_ZERO


class MappedRange(NamedTuple):
    """A range of one type in one place; neighbours may be of the same."""

    offset: int  # in the disk, bytes
    length: int
    type: int  # ALLOCATED or HOLE_ZERO
    host: int | None  # host offset in the image file itself; None for zeros and other layers' data
    kind: int  # what :mod:`.mapping` calls it
    location: int  # as of a run there: equal ones of two snapshots hold the same data


class FileRange(NamedTuple):
    """A range of bytes in a file that is read like any other."""

    fd: int
    offset: int
    length: int


_R = TypeVar("_R", Extent, MappedRange)


def joined(ranges: Iterable[_R], continues: Callable[[_R, _R], bool]) -> Iterator[_R]:
    """The same, neighbours as one where ``continues(one, next)``; none of them is empty."""
    last: _R | None = None
    for following in ranges:
        if last is not None and continues(last, following):
            last = last._replace(length=last.length + following.length)
            continue
        if last is not None:
            yield last
        last = following
    if last is not None:
        yield last


def merged(extents: Iterable[Extent]) -> Iterator[Extent]:
    """The same ranges, neighbours of one type as one."""
    return joined(extents, lambda a, b: a[2] == b[2] and a[0] + a[1] == b[0])
