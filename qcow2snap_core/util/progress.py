"""A bar on the terminal while long work is done; nothing at all on a pipe.

tqdm draws it: one Debian package without dependencies, where rich brings three more and takes
longer to import than most images take to list.  It is imported when there is something to draw,
and where it is not installed the work is done in silence.  In the library it always is: the
terminal is the program's.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from threading import Lock
from typing import Any

#: Called with the bytes done since the last call, by any thread.
Advance = Callable[[int], None]
#: How much there is to do; a function where it takes long to say, which only a bar is worth.
Total = int | Callable[[], int]

_silent: ContextVar[bool] = ContextVar("_silent", default=False)


@contextmanager
def silent() -> Iterator[None]:
    """No bar in this block, whatever stderr is."""
    token = _silent.set(True)
    try:
        yield
    finally:
        _silent.reset(token)


class Bar:
    """Long work as the user sees it; an :data:`Advance`."""

    def __init__(self, drawn: Any = None) -> None:
        """``drawn``: tqdm's bar, or None where nothing is drawn."""
        self._drawn = drawn
        self._lock = Lock()  # tqdm's own update is not made for several threads

    def __call__(self, done: int) -> None:
        if self._drawn is not None:
            with self._lock:
                self._drawn.update(done)

    def now(self, what: str) -> None:
        """Say what is done from now on, instead of what the bar began with."""
        if self._drawn is not None:
            with self._lock:
                self._drawn.set_description(what)


@contextmanager
def progress(what: str, total: Total, unit: str | None = None) -> Iterator[Bar]:
    """Show a bar of ``total`` bytes, or of what else ``unit`` says, until the block ends."""
    shown = not _silent.get() and sys.stderr.isatty()
    drawn = _drawn(what, total, unit) if shown else None
    try:
        yield Bar(drawn)
    finally:
        if drawn is not None:
            drawn.close()


def _drawn(what: str, total: Total, unit: str | None) -> Any:
    try:
        from tqdm import tqdm
    except ImportError:
        return None
    tqdm.monitor_interval = 0  # it would start a thread that outlives the bar
    return tqdm(
        desc=what,
        total=total() if callable(total) else total,
        unit="B" if unit is None else f" {unit}",
        unit_scale=unit is None,
        unit_divisor=1024,
        dynamic_ncols=True,
        leave=False,
        file=sys.stderr,
    )
