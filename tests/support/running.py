"""A ``qcow2snap`` that is still running, and ways to end it."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from support.server import ROOT


@contextmanager
def started(*arguments: object) -> Iterator[subprocess.Popen[str]]:
    """It runs, as the leader of a process group of its own, until the block ends."""
    process = subprocess.Popen(
        [sys.executable, "-m", "qcow2snap_core", *map(str, arguments)],
        cwd=ROOT,
        text=True,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        process_group=0,
    )
    with process:
        try:
            yield process
        finally:
            process.terminate()


def until(condition: Callable[[], object], process: subprocess.Popen[str]) -> None:
    """Wait for it, as long as the process lives."""

    def there() -> object:
        assert process.poll() is None, process.communicate()
        return condition()

    eventually(there)


def eventually(condition: Callable[[], object]) -> None:
    """Wait for it, for a minute at the most."""
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def processes_with(word: str) -> list[str]:
    """The command lines of all processes that mention it."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = entry.read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:  # it has ended
            continue
        if word in line:
            found.append(line)
    return found


def listens(path: Path) -> bool:
    """Whether somebody would answer on the Unix socket; that it is there comes a moment before."""
    with socket.socket(socket.AF_UNIX) as s:
        return s.connect_ex(str(path)) == 0
