"""AES by the native engine, a whole request in one call without the interpreter's lock."""

from __future__ import annotations

from .._native import loaded
from ..typed import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .ciphers import SectorCipher


class NativeCipher:
    """A :class:`.ciphers.SectorCipher`; ``handle`` is the engine's own."""

    def __init__(self, handle: Any) -> None:
        self.handle = handle

    def decrypt(self, view: memoryview, sector: int) -> None:
        loaded.ENGINE.decrypt(self.handle, view, sector)  # type: ignore[union-attr]


def make_cipher(
    mode: str, key: bytes, iv_bits: int, essiv_key: bytes | None = None
) -> SectorCipher | None:
    """AES by sectors in the mode ``xts``, ``cbc``, ``ctr`` or ``ecb``:
    ``iv_bits`` of the sector's number make its IV, encrypted with ``essiv_key`` if there is one.
    None without an engine, or where OpenSSL has no such cipher."""
    if loaded.ENGINE is None:
        return None
    name = f"AES-{len(key) * 8 // (2 if mode == 'xts' else 1)}-{mode.upper()}"
    mask = 0 if mode == "ecb" else (1 << iv_bits) - 1
    try:
        essiv = None
        if essiv_key is not None:
            of_iv = f"AES-{len(essiv_key) * 8}-ECB"
            essiv = loaded.ENGINE.cipher(of_iv, essiv_key, True, 0, None)
        return NativeCipher(loaded.ENGINE.cipher(name, key, False, mask, essiv))
    except (OSError, ValueError):
        return None
