"""AES by the native engine, a whole request in one call without the interpreter's lock."""

from __future__ import annotations

from .._native import loaded
from ..typed import TYPE_CHECKING

if TYPE_CHECKING:
    from .ciphers import SectorCipher


def make_cipher(
    mode: str, key: bytes, iv_bits: int, essiv_key: bytes | None = None
) -> SectorCipher | None:
    """AES by sectors in the mode ``xts``, ``cbc``, ``ctr`` or ``ecb``:
    ``iv_bits`` of the sector's number make its IV, encrypted with ``essiv_key`` if there is one.
    None without an engine, or where OpenSSL has no such cipher."""
    if loaded.ENGINE is None:
        return None
    name = f"AES-{len(key) * 8 // (2 if mode == 'xts' else 1)}-{mode.upper()}"
    bits = 0 if mode == "ecb" else iv_bits
    essiv = essiv_key and f"AES-{len(essiv_key) * 8}-ECB"
    try:
        cipher: SectorCipher = loaded.ENGINE.Cipher(name, key, bits, essiv, essiv_key)
    except (OSError, ValueError):
        return None
    return cipher
