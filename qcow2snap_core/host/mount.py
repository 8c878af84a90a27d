"""A snapshot as a file: nbdkit serves it, nbdfuse shows it as ``disk`` in a directory.

nbdfuse starts nbdkit and is the parent that nbdkit exits with, so there is one process to stop.
It is in a process group of its own: Ctrl-C reaches only this program, which then ends it in
order.  Should this program be killed, the kernel ends it.

For the filesystem in the disk, nbdfuse's directory is a temporary one.  As soon as the program
that reads the filesystem (:mod:`.readers`) has opened the disk, that directory is detached
and removed: the disk lives on without a name, until it is closed, and nothing of it can be left.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from threading import Thread
from typing import IO, Final

from ..errors import StorageError, UsageError, escaped, shown
from ..format.snapshots import Snapshot
from ..image.image import Image
from ..util.interrupts import raise_if_interrupted, wait_for
from .nbdkit import keys, missing, nbdkit_to_run
from .readers import prepare, reader

FILE: Final = "disk"

_PR_SET_PDEATHSIG: Final = 1
_PATIENCE: Final = 10  # seconds

Ready = Callable[[str], None]  # called with what is there now


def mount(
    image: Image, snapshot: Snapshot, directory: str, partition: int | None, ready: Ready
) -> None:
    """Show the snapshot as ``directory/disk`` until it is unmounted or this is interrupted
    (:mod:`..util.interrupts`).

    Raises UsageError for a directory that will not do, StorageError with what nbdkit or nbdfuse
    says when they fail.
    """
    check_directory(directory)
    with _disk(image, snapshot, directory, partition, ["-r"], []) as server:
        if server.until_mounted(directory):
            ready(os.path.join(directory, FILE))
            server.wait()


def mount_filesystem(
    image: Image, snapshot: Snapshot, directory: str, partition: int | None, ready: Ready
) -> None:
    """Show the files of the filesystem in the snapshot, or in its partition, in ``directory``.

    Raises as :func:`mount`, UsageError also when there is no filesystem that can be read.
    """
    check_directory(directory)
    hidden = tempfile.mkdtemp(prefix="qcow2snap-")
    try:
        with _disk(image, snapshot, hidden, partition, [], ["--filter=cow"]) as server:
            if not server.until_mounted(hidden):
                return
            chosen = reader(os.path.join(hidden, FILE), os.path.abspath(directory))
            if chosen.before is not None:
                prepare(chosen.before)
            with _started(chosen.command, []) as reading:
                try:
                    if reading.until_mounted(directory, quiet=True):
                        _detach(hidden)
                        os.rmdir(hidden)
                        ready(directory)
                        reading.wait()
                finally:
                    reading.hush()
                    _detach(directory)
                    reading.give_time()
    finally:
        _detach(hidden)
        if os.path.isdir(hidden):
            os.rmdir(hidden)


def check_directory(directory: str) -> None:
    """Raises UsageError for one that cannot be mounted on."""
    if not os.path.isdir(directory):
        raise UsageError(f"there is no directory {shown(directory)} to mount on")
    if os.path.ismount(directory):
        raise UsageError(f"something is mounted on {shown(directory)} already")


def _detach(directory: str) -> None:
    """Unmount what we mounted there, if it still is, and even if it is in use: whoever has a file
    of it open keeps that."""
    with suppress(FileNotFoundError):
        line = ["fusermount3", "-u", "-z", directory]
        subprocess.run(line, stderr=subprocess.DEVNULL, check=False)


@contextmanager
def _disk(
    image: Image,
    snapshot: Snapshot,
    directory: str,
    partition: int | None,
    options: list[str],
    filters: list[str],
) -> Iterator[_Program]:
    """nbdfuse, with nbdkit behind it."""
    descriptors: list[int] = []
    try:
        if partition is not None:
            filters = [*filters, "--filter=partition"]
        server = nbdkit_to_run("--exit-with-parent", *filters)
        server += keys(image, snapshot, descriptors)
        server += [] if partition is None else [f"partition={partition}"]
        path = os.path.join(os.path.abspath(directory), FILE)
        with _started(["nbdfuse", *options, path, "[", *server, "]"], descriptors) as program:
            yield program
    finally:
        for descriptor in descriptors:
            os.close(descriptor)


@contextmanager
def _started(line: list[str], descriptors: list[int]) -> Iterator[_Program]:
    prctl = ctypes.CDLL(None).prctl
    try:
        process = subprocess.Popen(
            line,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            pass_fds=descriptors,
            process_group=0,
            preexec_fn=lambda: prctl(_PR_SET_PDEATHSIG, signal.SIGTERM),  # noqa: PLW1509
        )
    except FileNotFoundError:
        raise missing("nbdfuse", "libnbd-bin (Debian) or nbdfuse (Fedora)") from None
    assert process.stderr
    program = _Program(line[0], process, _Said(process.stderr))
    try:
        yield program
    finally:
        program.end()


class _Program:
    """One that shows something in a directory."""

    def __init__(self, path: str, process: subprocess.Popen[bytes], said: _Said) -> None:
        self._name = os.path.basename(path)
        self._process = process
        self._said = said

    def until_mounted(self, directory: str, quiet: bool = False) -> bool:
        """Wait for it; False if it was there and unmounted at once.  Raises StorageError.

        What the program says later goes to our own standard error, unless ``quiet``."""
        while not os.path.ismount(directory):
            raise_if_interrupted()
            status = self._process.poll()
            if status == 0:
                return False
            if status is not None:
                raise StorageError(self._said.first_line() or f"{self._name} ended at once")
            time.sleep(0.02)
        if quiet:
            self._said.hush()
        else:
            self._said.pass_on()
        return True

    def wait(self) -> None:
        """Until it is unmounted.  Raises StorageError."""
        status = wait_for(self._process)
        if status:
            raise StorageError(f"{self._name} ended with status {status}")

    def hush(self) -> None:
        """From now on it is of no interest what it says."""
        self._said.hush()

    def give_time(self) -> None:
        """To end by itself; guestmount has a virtual machine to shut down."""
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(_PATIENCE)

    def end(self) -> None:
        self._said.hush()
        self._process.terminate()  # it unmounts
        self._process.wait()
        self._said.join()


class _Said(Thread):
    """Reads the servers' standard error, so that one line of it can be ours."""

    def __init__(self, stream: IO[bytes]) -> None:
        super().__init__(daemon=True)
        self._stream = stream
        self._first = ""
        self._passing = self._hushed = False
        self.start()

    def run(self) -> None:
        for raw in self._stream:
            line = escaped(raw.rstrip(b"\n"))
            if not self._passing:
                self._first = self._first or line
            elif not self._hushed:
                with suppress(OSError):  # or they would wait for a reader for ever
                    print(line, file=sys.stderr, flush=True)

    def pass_on(self) -> None:
        """From now on write what they say to our own standard error."""
        self._passing = True

    def hush(self) -> None:
        """From now on drop what they say."""
        self._hushed = self._passing = True

    def first_line(self) -> str:
        """What they said before they ended."""
        self.join()
        return self._first
