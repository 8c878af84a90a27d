"""Which of the guests' filesystems are open, so that there are never too many."""

from __future__ import annotations

import threading
from typing import Final

from .volume import Volume

#: Filesystems that are open at once: each has what it read in memory
_MOST_OPEN: Final = 32


class InUse:
    """Which volumes are open, the one that was asked last at the end."""

    def __init__(self) -> None:
        self._volumes: dict[Volume, None] = {}
        self._guard = threading.Lock()

    def note(self, volume: Volume) -> None:
        with self._guard:
            self._volumes.pop(volume, None)
            self._volumes[volume] = None

    def excess(self) -> list[Volume]:
        """Those that are to be closed; they are no longer counted."""
        with self._guard:
            found = list(self._volumes)[: max(0, len(self._volumes) - _MOST_OPEN)]
            for volume in found:
                del self._volumes[volume]
            return found
