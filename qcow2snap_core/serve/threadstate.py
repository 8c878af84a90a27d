"""Keeping nbdkit's threads known to Python.

nbdkit brackets every callback with PyGILState_Ensure and PyGILState_Release.  Its threads are not
Python's, so each *request* makes a thread state and throws it away again; since Python 3.11 that
includes an mmap and a munmap.  One more Ensure keeps the state's count above zero for as long as
a connection lives, and a request then finds it: twice the requests per second.

The matching Release must be made by the thread that made the Ensure.  With requests serialized
per connection nbdkit opens, reads and closes on one thread.  A filter may close elsewhere: then
the state is left to that thread, some kilobytes until the process ends.  To delete another
thread's state aborts Python 3.13.

A thread is recognized by a mark in its Python state, since the system gives the identifier of a
thread that has ended to the next one.

Where requests of a connection are handled in parallel, the native engine keeps the state of each
thread, and this module is not used.
"""

from __future__ import annotations

import ctypes
import threading

from ..typed import Final

# PyDLL: called with the GIL held, as these functions expect.
_PYTHON: Final = ctypes.PyDLL(None)

# The state that Ensure returns: "the GIL was held already".  True of every Ensure that Python
# code can make.  Passing the other value (1) would drop the GIL in the middle of a callback.
_LOCKED: Final = 0


class _Thread(threading.local):
    """Its ``mark`` is another object in every thread state."""

    def __init__(self) -> None:
        self.mark = object()


_thread: Final = _Thread()


class KeptThreadState:
    """Holds the calling thread's Python state from now until :meth:`release`."""

    def __init__(self) -> None:
        _PYTHON.PyGILState_Ensure()
        self._mark: object | None = _thread.mark

    def release(self) -> None:
        """Let go of it, if this is still the same thread.  Harmless when called again."""
        if self._mark is _thread.mark:
            self._mark = None
            _PYTHON.PyGILState_Release(_LOCKED)
