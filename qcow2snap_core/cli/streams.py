"""Standard input, output and error, which may be closed, or full.

A descriptor from 0 to 2 that is closed when the program starts goes to the next file that is
opened, and what is printed would be written into that.  So they are taken first (as stdopen of
GNU's programs does): standard output by something that cannot be written to, so that a listing
that nobody gets is an error as it is for ``ls``; for a command that was asked to do something, and
only reports it, by /dev/null.
"""

from __future__ import annotations

import io
import os
import sys
from contextlib import suppress

from ..errors import escaped, reason

#: What standard output may be called where a file's name is expected.
OUTPUT_NAMES = ("-", "/dev/stdout", "/dev/fd/1", "/proc/self/fd/1")


def take(*, reports_only: bool) -> None:
    """Make sure that all three are open.  ``reports_only``: what is printed may be lost."""
    for fd in range(3):
        with suppress(OSError):
            os.fstat(fd)
            continue
        lost = fd == 2 or (fd == 1 and reports_only)
        # The lowest free number, which is this one.
        opened = os.open(os.devnull, os.O_WRONLY if lost or fd == 0 else os.O_RDONLY)
        os.set_inheritable(opened, True)
    # What Python has not made of them since they were closed.
    if not isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115
    if sys.stderr is None:
        sys.stderr = open(2, "w", closefd=False)  # noqa: SIM115
    terminal = sys.stdout.isatty()
    encoding = sys.stdout.encoding
    # A name that the terminal cannot show is shown with escapes.
    sys.stdout = _Output(sys.stdout.detach(), encoding, "backslashreplace", line_buffering=terminal)


def say(message: str) -> None:
    """One line on standard error, if it takes it."""
    with suppress(OSError):
        print(f"qcow2snap: {message}", file=sys.stderr, flush=True)


class OutputLost(OSError):
    """Standard output does not take what is printed."""


class _Output(io.TextIOWrapper):
    """Standard output, whose errors can be told from all others."""

    def write(self, text: str) -> int:
        try:
            return super().write(text)
        except OSError as e:
            raise OutputLost(e.errno, e.strerror) from e

    def flush(self) -> None:
        try:
            super().flush()
        except OSError as e:
            raise OutputLost(e.errno, e.strerror) from e


def give_up_output() -> None:
    """Drop what is left of it: Python would complain once more at its exit."""
    _give_up(1)


def settle_errors() -> None:
    """Drop what standard error does not take: since 3.13 Python would exit with 120 for it."""
    try:
        sys.stderr.flush()
    except OSError:
        _give_up(2)


def _give_up(fd: int) -> None:
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, fd)
    os.close(null)


def failed(e: OSError) -> str:
    """What to say of an error of the system that nobody has put into words before."""
    return f"{escaped(os.fsdecode(e.filename))}: {reason(e)}" if e.filename else reason(e)


def warn(message: str) -> None:
    """Say something that does not keep a command from doing its work."""
    say(f"warning: {message}")
