"""Raw files: a new one, an old copy that is brought up to date, and the same in place.

A file is written under a temporary name.  An update begins as a copy of the old file, which costs
nothing where the filesystem can share blocks (Btrfs, XFS).  Where it cannot, or there is no room
for two, the old file is written into instead.  An update in place that was interrupted holds some
old and some new ranges: it is completed by repeating it, since it writes the same ranges again.

A file keeps a record of what it holds, and is asked for it before an update; one without is
compared, or trusted (:mod:`.updates`).
"""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Final

from ..errors import UsageError, reason, shown
from ..image.layers import RawLayer
from ..storage.local import open_storage
from ..util.progress import progress
from ..util.units import binary
from .devices import partly_written
from .job import Job
from .judge import Place
from .mover import RawSource, count, transfer
from .outputs import output
from .records import Record, held
from .room import check_space
from .targets import RawTarget
from .updates import Base, check_base, keep, keep_beside, keep_in

_FICLONE: Final = 0x40049409  # linux/fs.h: let the files share their blocks


class NewFile:
    """A file that is new, or replaces another."""

    def __init__(self, place: Place) -> None:
        self.place = place

    def take(self, job: Job) -> None:
        path = self.place.name
        record = job.record()
        with output(path, most=job.permissions, replace=self.place.replace) as part:
            check_space(os.path.dirname(part), job.amount.data, f"copying to {shown(path)}")
            with opened(part) as fd:
                instead = "give a name that ends in .qcow2, such a file does not need that"
                give_size(path, fd, job.new.size, instead)
                job.move(RawTarget(path, fd, empty=True))
                kept = record is not None and keep(fd, record)
        keep_beside(path, None if kept else record)


class UpdatedFile:
    """A copy of the old snapshot, whose place an updated copy of it takes."""

    def __init__(self, place: Place, base: Base) -> None:
        self.place = place
        self._base = base

    def take(self, job: Job) -> None:
        path = self.place.name
        _make_sure(path, job, self._base)
        record = job.record()
        with output(path, replace=True) as part, opened(part) as fd:
            _clone(path, fd, job.amount.data)
            give_size(path, fd, job.new.size)
            job.move(RawTarget(path, fd))
            kept = record is not None and keep(fd, record)
        keep_beside(path, None if kept else record)


class FileInPlace:
    """A copy of the old snapshot, which is written into."""

    def __init__(self, place: Place, base: Base) -> None:
        self.place = place
        self._base = base

    def take(self, job: Job) -> None:
        path = self.place.name
        _make_sure(path, job, self._base)
        assert job.since is not None
        record = Record(held(job.new))
        under_way = record._replace(since=held(job.since), between=True)
        with opened(path) as fd:
            keep_in(path, fd, under_way)
            with partly_written(path):
                if os.fstat(fd).st_size < job.new.size:
                    os.ftruncate(fd, job.new.size)
                job.move(RawTarget(path, fd))
                os.ftruncate(fd, job.new.size)
            keep_in(path, fd, record)


def _make_sure(path: str, job: Job, base: Base) -> None:
    """Raises UsageError when the file does not hold the old snapshot."""
    old = job.since
    assert old is not None
    if not os.path.exists(path):
        raise UsageError(f"there is no {shown(path)}: it must hold the snapshot of --since")
    if base is Base.RECORDED:
        to_compare = check_base(path, old, job.new)
    else:
        to_compare = base is Base.COMPARED
        size = os.stat(path).st_size
        grown = to_compare and size == job.new.size  # by an update that was interrupted
        if size != old.size and not grown:
            raise UsageError(
                f"{shown(path)} has {size} bytes and {old.name} has {old.size}: "
                f"it is no copy of that"
            )
    if to_compare:
        storage = open_storage(path)
        try:
            job.compare_base(RawSource(RawLayer(storage)), path)
        finally:
            storage.close()


def _clone(path: str, fd: int, more: int) -> None:
    """Make the empty file a copy of the old one, to which ``more`` bytes will be written."""
    old = open_storage(path)
    try:
        with suppress(OSError), open(path, "rb") as f:
            fcntl.ioctl(fd, _FICLONE, f.fileno())
            return
        source = RawSource(RawLayer(old))
        amount = count(source.plan)
        directory = os.path.dirname(os.path.realpath(path))
        check_space(directory, amount.data + more, f"a copy of {shown(path)}")
        os.ftruncate(fd, old.size())
        with progress("duplicating", amount.data) as bar:
            transfer(source, source.plan, RawTarget(path, fd, empty=True), bar)
    finally:
        old.close()


def give_size(path: str, fd: int, size: int, instead: str = "") -> None:
    """Make the file that long, in bytes; ``instead`` is what can be done where none can be.  Raises
    UsageError."""
    try:
        os.ftruncate(fd, size)
    except OSError as e:
        why = f"{reason(e)}; {instead}" if instead and e.errno == errno.EFBIG else reason(e)
        raise UsageError(f"cannot make {shown(path)} {binary(size)} long: {why}") from e


@contextmanager
def opened(path: str) -> Iterator[int]:
    """The file, open for reading and writing until the block ends.  Raises UsageError."""
    try:
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except OSError as e:
        raise UsageError(f"cannot open {shown(path)}: {reason(e)}") from e
    try:
        yield fd
    finally:
        os.close(fd)
