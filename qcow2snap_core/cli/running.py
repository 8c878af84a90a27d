"""How the commands that run for long warn."""

from __future__ import annotations

from .streams import say


def warn(message: str) -> None:
    """Say something that does not keep the command from doing its work."""
    say(f"warning: {message}")
