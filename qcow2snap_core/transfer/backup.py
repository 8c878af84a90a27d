"""Copying a snapshot, or what changed since an older one, to a file, a device or an NBD export.

A regular file is written under a temporary name.  For an update (``since``) that begins as a
copy of the old file, which costs nothing where the filesystem can share blocks (Btrfs, XFS).
Where it cannot, or there is no room for two, ``in_place`` writes into the old file; so must a
device and an NBD export be.  An update in place that was interrupted holds some old and some new
ranges: it is completed by repeating it, since it writes the same ranges again.

A file keeps a record of what it holds, and is asked for it before an update; a target without one
is compared, or trusted (:mod:`.bases`).
"""

from __future__ import annotations

import fcntl
import os
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Final

from ..errors import Error, UsageError, reason, shown
from ..image.disk import Disk
from ..image.extents import Extent
from ..image.image import Image
from ..image.layers import RawLayer
from ..storage.libnbd import is_uri, without_secrets
from ..storage.local import open_storage
from ..tables.diff import changes, unchanged
from ..util.progress import progress
from ..util.units import binary
from .bases import Base, check_base, keep, keep_beside, keep_in, no_record
from .destination import Kind, destination
from .engine import (
    THREADS,
    THREADS_REMOTE,
    Amount,
    Plan,
    RawSource,
    count,
    transfer,
    whole,
)
from .outputs import check_space, output
from .records import Record, held
from .targets import NbdTarget, RawTarget, Target, open_device
from .verify import Differs, Readable, compare

TARGETS: Final = Kind.FILE | Kind.DEVICE | Kind.EXPORT  # what a disk can be copied to

_FICLONE: Final = 0x40049409  # linux/fs.h: let the files share their blocks


@dataclass(frozen=True)
class Copied:
    """What a copy did."""

    amount: Amount
    seconds: float

    def __str__(self) -> str:
        data, zeros = binary(self.amount.data), binary(self.amount.zeros)
        return f"{data} of data and {zeros} of zeros in {self.seconds:.1f} s"


def copy(
    image: Image,
    new: Disk,
    target: str,
    since: Disk | None = None,
    in_place: bool = False,
    verify: bool = True,
    base: Base = Base.RECORDED,
) -> Copied:
    """Make ``target`` hold the disk ``new``; with ``since``, which it holds now, only what differs.

    With ``verify``, what was written to a device or an export is read back and compared.
    ``base`` is by what the target is known to hold ``since``; devices and exports have no record.
    Raises UsageError before anything is written when the target will not do, otherwise what
    :meth:`.Disk.pread_into` raises, StorageError when the target fails.
    """
    began = time.monotonic()
    to = destination(target, TARGETS, in_place=in_place)
    to.ensure_apart(image.files)
    plan: Plan = (lambda: whole(new)) if since is None else (lambda: changes(since, new))
    threads = THREADS_REMOTE if is_uri(image.path) else THREADS
    job = _Job(new, plan, count(plan), since, threads)
    verify_base = since is not None and base is Base.COMPARED
    if since is not None and base is Base.RECORDED and to.kind is not Kind.FILE:
        raise no_record(without_secrets(target), since)
    if to.kind is Kind.EXPORT:
        export = NbdTarget(target, lambda handle: handle.connect_uri(target), THREADS)
        job.into(export, without_secrets(target), export, verify, verify_base)
    elif to.kind is Kind.DEVICE:
        with _device(target) as (device, readable):
            job.into(device, target, readable, verify, verify_base)
    elif since is None:
        job.new_file(target)
    else:
        if _check_old(target, since, new, base):
            job.compare_base_of_file(target)
        (job.update_in_place if in_place else job.update)(target)
    return Copied(job.amount, time.monotonic() - began)


class _Job:
    """What is to be moved, and the ways to move it."""

    def __init__(
        self, new: Disk, plan: Plan, amount: Amount, since: Disk | None, threads: int
    ) -> None:
        self._new = new
        self._plan = plan
        self._since = since
        self._threads = threads
        self.amount = amount

    def into(
        self, target: Target, name: str, found: Readable, verify: bool, verify_base: bool
    ) -> None:
        """Write into something that is there and keeps its size, and compare what is found."""
        try:
            need = self._new.size if self._since is None else max(self._new.size, self._since.size)
            if target.size < need:
                raise UsageError(
                    f"{shown(name)} is too small: it has {target.size} bytes, {need} are needed"
                )
            if verify_base:
                self._compare_base(found, name)
            with _partly_written(name):
                self._move(target)
                if verify:
                    self._compare(found, name)
        finally:
            target.close()

    def new_file(self, path: str) -> None:
        record = Record(held(self._new))
        with output(path) as part:
            check_space(os.path.dirname(part), self.amount.data, f"copying to {shown(path)}")
            with _opened(part, os.O_RDWR) as fd:
                _keep_mode(path, fd)
                os.ftruncate(fd, self._new.size)
                self._move(RawTarget(path, fd, empty=True))
                kept = keep(fd, record)
        keep_beside(path, None if kept else record)

    def update(self, path: str) -> None:
        record = Record(held(self._new))
        with output(path) as part, _opened(part, os.O_RDWR) as fd:
            _keep_mode(path, fd)
            self._clone(path, fd)
            os.ftruncate(fd, self._new.size)
            self._move(RawTarget(path, fd))
            kept = keep(fd, record)
        keep_beside(path, None if kept else record)

    def update_in_place(self, path: str) -> None:
        assert self._since is not None
        record = Record(held(self._new))
        under_way = record._replace(since=held(self._since), between=True)
        with _opened(path, os.O_RDWR) as fd:
            keep_in(path, fd, under_way)
            with _partly_written(path):
                if os.fstat(fd).st_size < self._new.size:
                    os.ftruncate(fd, self._new.size)
                self._move(RawTarget(path, fd))
                os.ftruncate(fd, self._new.size)
            keep_in(path, fd, record)

    def _move(self, target: Target) -> None:
        with progress("copying", self.amount.data) as advance:
            transfer(self._new, self._plan, target, advance, self._threads)

    def _compare(self, found: Readable, name: str) -> None:
        with progress("comparing", self.amount.data + self.amount.zeros) as advance:
            compare(self._new, self._plan, found, shown(name), advance, self._threads)

    def compare_base_of_file(self, path: str) -> None:
        """Raises UsageError unless a regular file has what the update will not write."""
        storage = open_storage(path)
        try:
            self._compare_base(RawSource(RawLayer(storage)), path)
        finally:
            storage.close()

    def _compare_base(self, found: Readable, name: str) -> None:
        old, new = self._since, self._new
        assert old is not None

        def plan() -> Iterator[Extent]:
            return unchanged(old, new)

        amount = count(plan)
        try:
            with progress("comparing", amount.data + amount.zeros) as advance:
                compare(new, plan, found, shown(name), advance, self._threads)
        except Differs as e:
            raise UsageError(
                f"{shown(name)} does not hold {old.name}: it differs at guest offset "
                f"{e.offset:#x}, nothing was written"
            ) from e

    def _clone(self, path: str, fd: int) -> None:
        """Make the empty file a copy of the old one."""
        old = open_storage(path)
        try:
            with suppress(OSError), open(path, "rb") as f:
                fcntl.ioctl(fd, _FICLONE, f.fileno())
                return
            source = RawSource(RawLayer(old))
            amount = count(source.plan)
            needed = amount.data + self.amount.data
            check_space(os.path.dirname(os.path.realpath(path)), needed, f"a copy of {shown(path)}")
            os.ftruncate(fd, old.size())
            with progress("duplicating", amount.data) as advance:
                transfer(source, source.plan, RawTarget(path, fd, empty=True), advance)
        finally:
            old.close()


@contextmanager
def _device(path: str) -> Iterator[tuple[Target, Readable]]:
    """A device to write to, and the same to read from, past the cache in which what was written
    may still be."""
    storage = open_storage(path)
    try:
        yield open_device(path), RawSource(RawLayer(storage))
    finally:
        storage.close()


@contextmanager
def _opened(path: str, flags: int) -> Iterator[int]:
    try:
        fd = os.open(path, flags | os.O_CLOEXEC, 0o666)
    except OSError as e:
        raise UsageError(f"cannot open {shown(path)}: {reason(e)}") from e
    try:
        yield fd
    finally:
        os.close(fd)


@contextmanager
def _partly_written(name: str) -> Iterator[None]:
    """Say so in an error that comes after the first write."""
    try:
        yield
    except Error as e:
        raise type(e)(f"{e}; {shown(name)} is partly written: repeat the copy") from e


def _keep_mode(path: str, fd: int) -> None:
    """A file that replaces another keeps its permissions."""
    with suppress(FileNotFoundError):
        os.fchmod(fd, stat.S_IMODE(os.stat(path).st_mode))


def _check_old(target: str, since: Disk, new: Disk, base: Base) -> bool:
    """Raises UsageError when the target does not hold the old snapshot.

    Returns whether that has to be made sure by a comparison.
    """
    if not os.path.exists(target):
        raise UsageError(f"there is no {shown(target)}: it must hold the snapshot of --since")
    if base is Base.RECORDED:
        return check_base(target, since, new)
    size = os.stat(target).st_size
    grown = base is Base.COMPARED and size == new.size  # by an update that was interrupted
    if size != since.size and not grown:
        raise UsageError(
            f"{shown(target)} has {size} bytes and {since.name} has {since.size}: "
            f"it is no copy of that"
        )
    return base is Base.COMPARED
