"""Ctrl-C and SIGTERM in the middle of work with threads, connections and servers.

Python turns Ctrl-C into an exception between any two instructions.  In the middle of handing a
lock over, or of closing a connection, that is a hang or is lost: tried at hundreds of random
moments, it was both.  So while the work goes on a signal is only noted, and the work asks at the
points where it can stop.  A second signal ends the program on the spot.
"""

from __future__ import annotations

import os
import select
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from .errors import Error

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_noted = False


@contextmanager
def deferred() -> Iterator[None]:
    """Note signals instead of raising; KeyboardInterrupt comes from :func:`check` alone.

    For the main thread, once at a time.  An error that a signal brought about, since Ctrl-C
    reaches the servers too, counts as the interrupt.
    """
    global _noted
    _noted = False
    before = {number: signal.signal(number, _note) for number in _SIGNALS}
    try:
        yield
    except Error:
        check()
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def check() -> None:
    """Raises KeyboardInterrupt when a signal has come."""
    if _noted:
        raise KeyboardInterrupt


def wait_for(process: subprocess.Popen[bytes]) -> int:
    """The status of a process that ends; for KeyboardInterrupt it does not have to."""
    if process.poll() is not None:
        check()
        return process.wait()
    ended = os.pidfd_open(process.pid)
    woken, waking = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    before = signal.set_wakeup_fd(waking, warn_on_full_buffer=False)
    try:
        check()
        while ended not in select.select((ended, woken), (), ())[0]:
            check()
            os.read(woken, 1)  # another signal, of no interest
        check()
        return process.wait()
    finally:
        signal.set_wakeup_fd(before)
        for fd in (ended, woken, waking):
            os.close(fd)


def _note(number: int, frame: FrameType | None) -> None:
    global _noted
    _noted = True
    signal.signal(number, signal.SIG_DFL)
