"""What a service manager's SIGTERM does to a command: the same as Ctrl-C."""

from __future__ import annotations

import signal
from types import FrameType


def terminate_as_interrupt() -> None:
    """Clean up after SIGTERM too, which would end Python on the spot."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, interrupt)
