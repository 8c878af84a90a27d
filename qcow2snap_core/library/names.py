"""What is public is from the package, in whatever module it is written."""

from __future__ import annotations

from ..typed import Any, TypeVar

_T = TypeVar("_T", bound=Any)


def public(thing: _T) -> _T:
    """Have tracebacks, pickles and ``help()`` say so."""
    thing.__module__ = "qcow2snap_core"
    return thing
