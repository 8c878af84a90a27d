"""What the commands that run for long share: how they are ended, and how they warn."""

from __future__ import annotations

import signal
import sys
from types import FrameType


def terminate_as_interrupt() -> None:
    """Clean up after a service manager's SIGTERM as after Ctrl-C; Python would just end."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, interrupt)


def warn(message: str) -> None:
    """Say something that does not keep the command from doing its work."""
    print(f"qcow2snap: warning: {message}", file=sys.stderr)
