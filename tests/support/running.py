"""A ``qcow2snap`` that is still running, and ways to end it."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable

from support.server import ROOT


def start(*arguments: object) -> subprocess.Popen[str]:
    """Start it, as the leader of a process group of its own; whoever calls ends it."""
    return subprocess.Popen(
        [sys.executable, "-m", "qcow2snap_core", *map(str, arguments)],
        cwd=ROOT,
        text=True,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        process_group=0,
    )


def until(condition: Callable[[], object], process: subprocess.Popen[str]) -> None:
    """Wait for it, as long as the process lives."""
    deadline = time.monotonic() + 60
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.005)
