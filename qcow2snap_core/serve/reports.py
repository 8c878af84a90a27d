"""What nbdkit's log says about an exception: one line, where the exception is ours.

When a callback has raised, nbdkit imports the module traceback and prints what its function
format_exception returns.  So that function is the only place where the text can be changed.
"""

from __future__ import annotations

import ctypes
import sys
import traceback
from types import TracebackType
from typing import Any, Final

from ..errors import Error, ImageError

_format_exception: Final = traceback.format_exception
_NO_MEMORY: Final = ("out of memory",)


def in_one_line() -> None:
    """Have :class:`.Error`, written for users, printed as one line from now on, in this process.

    Any other exception is a bug and keeps its traceback.
    """
    error = sys.exc_info()[1]
    if isinstance(error, MemoryError):
        # nbdkit prints this text where there is no memory for the call of format_exception either.
        error.args = _NO_MEMORY
    traceback.format_exception = _one_line  # type: ignore[assignment]


def kept_from_client(error: Exception) -> Error:
    """Log ``error`` now; returns the one to raise instead, whose line a client may read."""
    whole = "".join(_one_line(type(error), error, error.__traceback__))
    ctypes.CDLL(None).nbdkit_error(b"%s", whole.encode(errors="surrogateescape"))
    return ImageError("this cannot be served: the server's log says why")


def _one_line(
    kind: type[BaseException] | BaseException | None,
    value: BaseException | None = None,
    trace: TracebackType | None = None,
    *args: Any,
    **kwargs: Any,
) -> list[str]:
    error = kind if value is None else value
    assert isinstance(error, BaseException)
    if isinstance(error, Error):
        lines = [str(error)]
    elif isinstance(error, MemoryError):
        lines = [*_NO_MEMORY]
    else:
        lines = _format_exception(kind, value, trace, *args, **kwargs)  # type: ignore[arg-type]
    _forget(error, trace)
    return lines


def _forget(error: BaseException, trace: TracebackType | None) -> None:
    """nbdkit 1.32 never frees an exception, nor what its frames hold: whole snapshot tables, for a
    client that asks for exports which there are not."""
    error.args = ()
    error.__context__ = error.__cause__ = error.__traceback__ = None
    if trace is not None:
        traceback.clear_frames(trace)
        trace.tb_next = None
