"""What the commands that run for long share: how they are ended, and how they warn."""

from __future__ import annotations

import signal
import sys
import threading
from types import FrameType


def terminate_as_interrupt() -> None:
    """Clean up after a service manager's SIGTERM as after Ctrl-C; Python would just end."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, interrupt)
    sys.unraisablehook = _again


def _again(unraisable: sys.UnraisableHookArgs) -> None:
    """An interrupt that arrives inside a ``__del__`` is swallowed there: send it once more."""
    if issubclass(unraisable.exc_type, KeyboardInterrupt):
        threading.Timer(0.01, signal.raise_signal, (signal.SIGINT,)).start()
    else:
        sys.__unraisablehook__(unraisable)


def warn(message: str) -> None:
    """Say something that does not keep the command from doing its work."""
    print(f"qcow2snap: warning: {message}", file=sys.stderr)
