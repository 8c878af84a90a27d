"""Devices and NBD exports: they are there, keep their size, and are written in place.

What was written is read back from where it now is and compared.  An error that comes after the
first write says that the target is partly written; to repeat the copy makes it whole.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from ..errors import Error, UsageError, shown
from ..image.layers import RawLayer
from ..storage.libnbd import without_secrets
from ..storage.local import open_storage
from .job import Job
from .judge import Place
from .mover import THREADS, RawSource
from .nbdtarget import NbdTarget
from .targets import Target, open_device
from .updates import Base, no_record
from .verify import Readable


class Export:
    """An NBD export that can be written to."""

    def __init__(self, place: Place, base: Base = Base.RECORDED) -> None:
        self.place = place
        self._base = base

    def take(self, job: Job) -> None:
        name = without_secrets(self.place.name)
        check_knows(name, job, self._base)
        uri = self.place.name
        patience = job.image.options.remote_timeout
        export = NbdTarget(uri, lambda handle: handle.aio_connect_uri(uri), THREADS, patience)
        _write_over(export, export, name, job, self._base)


class Device:
    """A block device that nothing else uses."""

    def __init__(self, place: Place, base: Base = Base.RECORDED) -> None:
        self.place = place
        self._base = base

    def take(self, job: Job) -> None:
        name = self.place.name
        check_knows(name, job, self._base)
        # Read past the cache in which what was written may still be.
        storage = open_storage(name)
        try:
            _write_over(open_device(name), RawSource(RawLayer(storage)), name, job, self._base)
        finally:
            storage.close()


def check_knows(name: str, job: Job, base: Base) -> None:
    """Raises UsageError when it would have to know what it holds."""
    if job.since is not None and base is Base.RECORDED:
        raise no_record(name, job.since)


def _write_over(target: Target, found: Readable, name: str, job: Job, base: Base) -> None:
    """``found`` is what is in the target."""
    try:
        need = max(disk.size for disk in (job.new, job.since) if disk is not None)
        if target.size < need:
            raise UsageError(
                f"{shown(name)} is too small: it has {target.size} bytes, {need} are needed"
            )
        if job.since is not None and base is Base.COMPARED:
            job.compare_base(found, name)
        with partly_written(name):
            job.move(target)
            if job.verify:
                job.compare(found, name)
    finally:
        target.close()


@contextmanager
def partly_written(name: str) -> Iterator[None]:
    """Say so in an error that comes after the first write."""
    try:
        yield
    except Error as e:
        raise type(e)(f"{e}; {shown(name)} is partly written: repeat the copy") from e
