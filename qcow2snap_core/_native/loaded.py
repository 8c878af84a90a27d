"""The native engine, if it was built and is wanted: see :mod:`qcow2snap_core.image.native`."""

from __future__ import annotations

import os
import sys

from ..typed import TYPE_CHECKING

if TYPE_CHECKING:
    from types import ModuleType


def _load() -> tuple[ModuleType | None, str]:
    """The engine or None, and what there is to say of its absence."""
    if os.environ.get("QCOW2SNAP_NATIVE") == "0":
        return None, ""
    if "t" in sys.abiflags:  # 3.13 would load it all the same, with objects of another layout
        why = "it needs Python's lock, and this Python is free-threaded"
        return None, f"no native engine, reads take more time: {why}"
    try:
        from . import engine  # type: ignore[attr-defined]
    except ImportError as e:
        return None, f"no native engine, reads take more time: make native builds it ({e})"
    return engine, ""


ENGINE, MISSING = _load()
