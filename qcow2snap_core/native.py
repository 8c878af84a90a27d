"""The native engine, where it was built: what it is told of a disk.

All decisions stay in Python.  The engine is given what Python has worked out, descriptors, the
geometry of the tables, the dictionary in which the slices of the tables are kept and what the
file holds while the snapshot is there, and does the common case of a request in one call, which
lets go of the interpreter's lock once.  Whatever else it meets, a slice that is not loaded, a
compressed cluster that is not decoded yet, damage, a change of the snapshot table, it hands back,
and Python does the whole request as if there were no engine.

``QCOW2SNAP_NATIVE=0`` in the environment does without it; the tests run both.
"""

from __future__ import annotations

import os

from .typed import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from types import ModuleType

    from .ciphers import SectorCipher
    from .disk import Layer
    from .guard import Guard

#: One layer as the engine's layer_init takes it: descriptor and size, and for a qcow2 file more.
LayerDescription = tuple[Any, ...]


def _load() -> tuple[ModuleType | None, str]:
    """The engine or None, and what there is to say of its absence."""
    if os.environ.get("QCOW2SNAP_NATIVE") == "0":
        return None, ""
    try:
        from ._native import engine  # type: ignore[attr-defined]
    except ImportError as e:
        return None, f"no native engine, reads take more time: make native builds it ({e})"
    return engine, ""


ENGINE, MISSING = _load()


def make_reader(guard: Guard, top: Layer) -> Any:
    """A reader of the layers from ``top`` down, which the guard keeps informed of the snapshot.
    None without an engine, or when one of the files is nothing for it."""
    fd = guard.plain_fd
    if ENGINE is None or fd is None:  # each layer of a chain is a disk too, and has no guard
        return None
    layers = []
    layer: Layer | None = top
    while layer is not None:
        layers.append(layer.description())
        layer = layer.below
    if None in layers:
        return None
    try:
        reader = ENGINE.Reader(fd, tuple(layers))
    except (ValueError, OverflowError):  # sizes of an image that makes no sense
        return None
    guard.tell(reader.expect)
    return reader


def make_cipher(
    mode: str, key: bytes, iv_bits: int, essiv_key: bytes | None = None
) -> SectorCipher | None:
    """AES by sectors in the mode ``xts``, ``cbc``, ``ctr`` or ``ecb``:
    ``iv_bits`` of the sector's number make its IV, encrypted with ``essiv_key`` if there is one.
    None without an engine, or where OpenSSL has no such cipher."""
    if ENGINE is None:
        return None
    name = f"AES-{len(key) * 8 // (2 if mode == 'xts' else 1)}-{mode.upper()}"
    bits = 0 if mode == "ecb" else iv_bits
    essiv = essiv_key and f"AES-{len(essiv_key) * 8}-ECB"
    try:
        cipher: SectorCipher = ENGINE.Cipher(name, key, bits, essiv, essiv_key)
    except (OSError, ValueError):
        return None
    return cipher
