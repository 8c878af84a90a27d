"""Ctrl-C, SIGTERM and SIGHUP: while a command starts, while it only reads, and in the middle of
work with threads, connections and servers.

Python turns Ctrl-C into an exception between any two instructions.  In the middle of an import, of
handing a lock over or of closing a connection, that is a traceback, a hang, or it is lost: tried
at hundreds of random moments, it was all three.  So it never does here, but for one prompt:

- until the command begins, the signals do what they do to any program (:func:`default`);
- a command that has nothing to clean up ends at once, with the usual status (:func:`ending`);
- one that has only notes them, and asks at the points where it can stop (:func:`deferred`,
  :func:`raise_if_interrupted`); a second one ends the program on the spot, but for one that comes
  within a second: timeout(1) signals its child and then its group, and means it once.

A signal that is ignored when the program starts, as nohup and a shell's background jobs have it,
stays ignored.
"""

from __future__ import annotations

import os
import select
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from ..errors import Error
from ..typed import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    import subprocess
    from types import FrameType

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_REPEATED: Final = 1.0  # seconds after a signal in which another one is the same
_noted = 0
_noted_at = 0.0


class Interrupted(KeyboardInterrupt):
    """A signal came."""

    def __init__(self, number: int) -> None:
        super().__init__()
        #: what a shell would say of a program that the signal ended
        self.status = 128 + number


def default() -> None:
    """The signals do what they do to any program: Ctrl-C ends it, without a traceback."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)


@contextmanager
def _handled(handler: Callable[[int, FrameType | None], Any]) -> Iterator[None]:
    before = {n: signal.getsignal(n) for n in _SIGNALS}
    # None: it is somebody else's, nbdkit's say.
    ours = [n for n in _SIGNALS if before[n] not in (signal.SIG_IGN, None)]
    for number in ours:
        signal.signal(number, handler)
    try:
        yield
    finally:
        for number in ours:
            signal.signal(number, before[number])


@contextmanager
def ending() -> Iterator[None]:
    """A signal ends the program: for commands that leave nothing behind.  Main thread."""

    def end(number: int, frame: FrameType | None) -> None:
        os._exit(128 + number)

    with _handled(end):
        yield


@contextmanager
def raising() -> Iterator[None]:
    """A signal raises Interrupted: for a prompt, which leaves the terminal without its echo."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise Interrupted(number)

    with _handled(interrupt):
        yield


@contextmanager
def deferred() -> Iterator[None]:
    """Note signals instead of raising; Interrupted comes from :func:`raise_if_interrupted` alone.

    For the main thread, once at a time.  An error that a signal brought about, since Ctrl-C
    reaches the servers too, counts as the interrupt.
    """
    global _noted
    _noted = 0
    with _handled(_note):
        try:
            yield
        except Error:
            raise_if_interrupted()
            raise


def interrupted() -> bool:
    """Whether a signal has come: for what an error would keep from being cleaned up."""
    return bool(_noted)


def raise_if_interrupted() -> None:
    """Raises Interrupted when a signal has come."""
    if _noted:
        raise Interrupted(_noted)


def wait_for(process: subprocess.Popen[bytes]) -> int:
    """The status of a process that ends; for Interrupted it does not have to."""
    if process.poll() is not None:
        raise_if_interrupted()
        return process.wait()
    ended = os.pidfd_open(process.pid)
    try:
        with waking() as woken:
            raise_if_interrupted()
            while ended not in select.select((ended, woken), (), ())[0]:
                raise_if_interrupted()
                os.read(woken, 1)  # another signal, of no interest
        raise_if_interrupted()
        return process.wait()
    finally:
        os.close(ended)


@contextmanager
def waking() -> Iterator[int]:
    """A descriptor that is readable once a signal has come, for who waits for others as well."""
    woken, into = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    before = signal.set_wakeup_fd(into, warn_on_full_buffer=False)
    try:
        yield woken
    finally:
        signal.set_wakeup_fd(before)
        os.close(woken)
        os.close(into)


def _note(number: int, frame: FrameType | None) -> None:
    global _noted, _noted_at
    now = time.monotonic()
    if not _noted:
        _noted, _noted_at = number, now
    elif now > _noted_at + _REPEATED:
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)
