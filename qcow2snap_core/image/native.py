"""The native engine, where it was built: what it is told of a disk.

All decisions stay in Python.  The engine is given what Python has worked out: descriptors, the
geometry of the tables, the dictionary with the slices of the tables, and the bytes that header and
snapshot table have while the snapshot exists.  It does the common case of a request in one call,
which releases the interpreter's lock once.  In any other case (a slice that is not loaded, a
compressed cluster that is not decoded yet, damage, a change of the snapshot table) it gives the
request back, and Python does all of it as if there were no engine.

With ``QCOW2SNAP_NATIVE=0`` in the environment it is not used; the tests run both.
"""

from __future__ import annotations

from .._native import loaded
from ..typed import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .guard import Guard
    from .layers import Layer

#: One layer as the engine's layer_init takes it: descriptor and size, and for a qcow2 file more.
LayerDescription = tuple[Any, ...]


def make_reader(guard: Guard, top: Layer) -> Any:
    """A reader of the layers from ``top`` down, which the guard keeps informed of the snapshot.
    None without an engine, or when one of the files is nothing for it."""
    fd = guard.plain_fd
    if loaded.ENGINE is None or fd is None:  # each layer of a chain is a disk too, and has no guard
        return None
    layers = []
    layer: Layer | None = top
    while layer is not None:
        layers.append(layer.description())
        layer = layer.below
    if None in layers:
        return None
    try:
        reader = loaded.ENGINE.Reader(fd, tuple(layers))
    except (ValueError, OverflowError):  # sizes of an image that makes no sense
        return None
    guard.tell(reader.expect)
    return reader
