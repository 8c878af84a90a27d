"""Standard output and FIFOs: bytes in order, zeros among them, and nothing to take back.

Pieces are read by several threads, ahead of what is written, since to decode or to decrypt takes
longer than to write; each was read, and the guard asked, before it goes out.  When one cannot be
read the stream ends there, and the exit status says that it is not whole.

A pipe is opened anew so as not to wait in it: whoever shares ours would feel the change, and a
wait for a reader who does nothing could not be interrupted.
"""

from __future__ import annotations

import errno
import fcntl
import os
import select
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Final

from ..errors import StorageError, UsageError, reason, shown
from ..util.interrupts import raise_if_interrupted
from ..util.progress import progress
from .job import Job
from .judge import STANDARD_OUTPUT, Place
from .mover import ordered

_WRITE: Final = os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC
_PIPE_SIZE: Final = 1 << 20  # what an unprivileged user may have
_PATIENCE: Final = 0.1  # seconds until Ctrl-C is heard


class ReaderGone(StorageError):
    """Whoever read standard output does not want more."""


class Stream:
    """Standard output, or a FIFO."""

    def __init__(self, place: Place) -> None:
        self.place = place

    def take(self, job: Job) -> None:
        with _opened(self.place) as fd, progress("copying", job.new.size) as bar:
            for view in ordered(job.new, job.plan, job.threads):
                _write(fd, view, self.place)
                bar(len(view))


@contextmanager
def _opened(place: Place) -> Iterator[int]:
    fd = _output() if place.path == STANDARD_OUTPUT else _fifo(place.path, place.name)
    try:
        if stat.S_ISFIFO(os.fstat(fd).st_mode):
            with suppress(OSError):  # then it takes a little longer
                fcntl.fcntl(fd, fcntl.F_SETPIPE_SZ, _PIPE_SIZE)
        yield fd
    finally:
        os.close(fd)


def _output() -> int:
    if stat.S_ISFIFO(os.fstat(1).st_mode):
        with suppress(OSError):  # somebody else's: then it has to be waited in
            return os.open("/proc/self/fd/1", _WRITE)
    return os.dup(1)


def _fifo(path: str, name: str) -> int:
    """Wait for a reader."""
    while True:
        try:
            return os.open(path, _WRITE)
        except OSError as e:
            if e.errno != errno.ENXIO:
                raise UsageError(f"cannot open {shown(name)}: {reason(e)}") from e
        raise_if_interrupted()
        time.sleep(_PATIENCE)


def _write(fd: int, view: memoryview, place: Place) -> None:
    """Write all of it.  Raises StorageError, ReaderGone for standard output."""
    try:
        while view:
            raise_if_interrupted()
            try:
                view = view[os.write(fd, view) :]
            except BlockingIOError:
                ready = select.poll()
                ready.register(fd, select.POLLOUT)
                ready.poll(_PATIENCE * 1000)
    except OSError as e:
        gone = e.errno == errno.EPIPE and place.path == STANDARD_OUTPUT
        kind = ReaderGone if gone else StorageError
        raise kind(f"writing to {shown(place.name)} failed: {reason(e)}") from e
