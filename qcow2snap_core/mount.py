"""A snapshot as a file: nbdkit serves it, nbdfuse shows it as ``disk`` in a directory.

nbdfuse starts nbdkit and is the parent that nbdkit exits with, so there is one process to stop.
It is in a process group of its own: Ctrl-C reaches only this program, which then ends it in
order.  Should this program be killed, the kernel ends it.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Thread
from typing import IO, Final

from .errors import StorageError, UsageError, escaped, shown
from .image import Image
from .nbdkit import keys, missing, nbdkit
from .snapshots import Snapshot

FILE: Final = "disk"

_PR_SET_PDEATHSIG: Final = 1


def mount(
    image: Image,
    snapshot: Snapshot,
    directory: str,
    partition: int | None,
    ready: Callable[[str], None],
) -> None:
    """Show the snapshot as ``directory/disk`` until it is unmounted or this is interrupted.

    ``ready`` is called with the path once the file is there.  Raises UsageError for a directory
    that will not do, StorageError with what nbdkit or nbdfuse says when they fail.
    """
    if not os.path.isdir(directory):
        raise UsageError(f"there is no directory {shown(directory)} to mount on")
    if os.path.ismount(directory):
        raise UsageError(f"something is mounted on {shown(directory)} already")
    descriptors: list[int] = []
    try:
        filters = [] if partition is None else ["--filter=partition"]
        server = [*nbdkit("--exit-with-parent", *filters), *keys(image, snapshot, descriptors)]
        server += [] if partition is None else [f"partition={partition}"]
        path = os.path.join(directory, FILE)
        line = ["nbdfuse", "-r", os.path.abspath(path), "[", *server, "]"]
        with _started(line, descriptors) as (process, said):
            while not os.path.ismount(directory):
                status = process.poll()
                if status == 0:
                    return  # it was there already, and unmounted at once
                if status is not None:
                    raise StorageError(said.first_line() or "nbdfuse ended at once")
                time.sleep(0.02)
            said.pass_on()
            ready(path)
            if process.wait():
                raise StorageError(f"nbdfuse ended with status {process.returncode}")
    finally:
        for descriptor in descriptors:
            os.close(descriptor)


@contextmanager
def _started(
    line: list[str], descriptors: list[int]
) -> Iterator[tuple[subprocess.Popen[bytes], _Said]]:
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
    said = _Said(process.stderr)
    try:
        yield process, said
    finally:
        said.hush()
        process.terminate()  # it unmounts
        process.wait()
        said.join()


class _Said(Thread):
    """Reads the servers' standard error, so that one line of it can be ours."""

    def __init__(self, stream: IO[bytes]) -> None:
        super().__init__(daemon=True)
        self._stream = stream
        self._lines: list[str] = []
        self._passing = self._hushed = False
        self.start()

    def run(self) -> None:
        for raw in self._stream:
            line = escaped(raw.rstrip(b"\n"))
            if not self._passing:
                self._lines.append(line)
            elif not self._hushed:
                print(line, file=sys.stderr, flush=True)

    def pass_on(self) -> None:
        """From now on write what they say to our own standard error."""
        self._passing = True

    def hush(self) -> None:
        """What they say while they end is of no interest."""
        self._passing = self._hushed = True

    def first_line(self) -> str:
        """What they said before they ended."""
        self.join()
        return self._lines[0] if self._lines else ""
