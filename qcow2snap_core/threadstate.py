"""Keeping nbdkit's threads known to Python.

nbdkit brackets every callback with PyGILState_Ensure and PyGILState_Release.  Its threads are not
Python's, so each *request* makes a thread state and throws it away again; since Python 3.11 that
includes an mmap and a munmap.  One more Ensure keeps the state's count above zero for as long as
a connection lives, and a request then finds it: twice the requests per second.

The matching Release must be made by the thread that made the Ensure.  With requests serialized
per connection nbdkit opens, reads and closes on one thread.  A filter may close elsewhere: then
the state is left to that thread, some kilobytes until the process ends.  To delete another
thread's state aborts Python 3.13.
"""

from __future__ import annotations

import ctypes
import threading
from typing import Final

# PyDLL: called with the GIL held, as these functions expect.
_PYTHON: Final = ctypes.PyDLL(None)

# The state that Ensure returns: "the GIL was held already".  True of every Ensure that Python
# code can make.  Passing the other value (1) would drop the GIL in the middle of a callback.
_LOCKED: Final = 0


class KeptThreadState:
    """Holds the calling thread's Python state from now until :meth:`release`."""

    def __init__(self) -> None:
        _PYTHON.PyGILState_Ensure()
        _held().add(self)

    def release(self) -> None:
        """Let go of it, if this is still the same thread.  Harmless when called again."""
        held = _held()
        if self in held:
            held.remove(self)
            _PYTHON.PyGILState_Release(_LOCKED)


# What the calling thread keeps.  It is part of the thread state itself, so that it cannot be
# mistaken for another's; a thread's identifier is given to the next one when it has ended.
_own = threading.local()


def _held() -> set[KeptThreadState]:
    held: set[KeptThreadState] = _own.__dict__.setdefault("held", set())
    return held
