"""Serpent, Twofish and CAST5 by libgcrypt, for the LUKS images that QEMU makes with them.

python3-cryptography has none of the first two.  libgcrypt has all three with every mode, a sector
in two calls, and its interface has been the same since 2013 (libgcrypt.so.20); there is no
binding for it in Debian or Fedora, so this is one, by ctypes, for what is needed here.  These
ciphers take some microseconds for a sector in any library: the calls do not matter beside them.
"""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Callable
from functools import lru_cache
from typing import Any, Final

from ..errors import ImageError
from ..util.pool import Pool
from .ciphers import BLOCK, SECTOR, IvGenerator, Plain

LIBRARY: Final = "libgcrypt.so.20"

# gcrypt.h: enum gcry_cipher_algos, by name and key bits; Twofish has no keys of 192 bits there.
_ALGORITHMS: Final = {
    ("cast5", 128): 3,
    ("twofish", 128): 303,
    ("twofish", 256): 10,
    ("serpent", 128): 304,
    ("serpent", 192): 305,
    ("serpent", 256): 306,
}
_MODES: Final = {"ecb": 1, "cbc": 3, "ctr": 6, "xts": 13}  # enum gcry_cipher_modes
_DISABLE_SECMEM: Final = 37  # enum gcry_ctl_cmds
_INITIALIZATION_FINISHED: Final = 38
_INITIALIZATION_FINISHED_P: Final = 39

NAMES: Final = frozenset(name for name, _ in _ALGORITHMS)


def available() -> bool:
    """Whether libgcrypt is installed."""
    try:
        ctypes.CDLL(LIBRARY)
    except OSError:
        return False
    return True


def wrong_with(name: str, mode: str, key_bits: int, essiv_bits: int | None) -> str | None:
    """What QEMU does not make of such a cipher, or libgcrypt does not have."""
    if name == "cast5" and (mode == "xts" or essiv_bits is not None):
        return "needs blocks of 16 bytes, and CAST5 has 8"
    for bits in (key_bits, key_bits if essiv_bits is None else essiv_bits):
        if (name, bits) not in _ALGORITHMS:
            return f"would have a key of {bits} bits, which libgcrypt does not know for {name}"
    return None


class GcryptSectors:
    """Decrypts sectors of 512 bytes (class SectorCipher)."""

    def __init__(
        self, name: str, mode: str, key: bytes, iv_bits: int, essiv_key: bytes | None
    ) -> None:
        """``iv_bits`` of a sector's number make its IV, encrypted with ``essiv_key`` if there is
        one.  Raises ImageError when the library refuses the key, OSError when it is not there."""
        bits = len(key) * 8 // (2 if mode == "xts" else 1)
        algorithm = _ALGORITHMS[name, bits]
        self._iv_bytes = 8 if name == "cast5" else BLOCK
        self._mode = mode
        self._contexts = Pool(lambda: _Context(algorithm, mode, key))
        self._contexts.give(_Context(algorithm, mode, key))  # now, when errors can be told
        self._ivs: IvGenerator = Plain(iv_bits)
        if essiv_key is not None:
            self._ivs = _Essiv(_ALGORITHMS[name, len(essiv_key) * 8], essiv_key)

    def decrypt(self, view: memoryview, sector: int) -> None:
        """Decrypt whole sectors in place, the first of which has the number ``sector``."""
        at = ctypes.addressof((ctypes.c_char * len(view)).from_buffer(view))
        context = self._contexts.take()
        if self._mode == "ecb":
            context.decrypt(at, len(view))
        else:
            count = len(view) // SECTOR
            ivs = bytes(self._ivs.ivs(sector, count))
            for n in range(count):
                context.start(ivs[n * BLOCK : n * BLOCK + self._iv_bytes])
                context.decrypt(at + n * SECTOR, SECTOR)
        self._contexts.give(context)


class _Essiv:
    """The sector number encrypted with a hash of the key, by the same cipher."""

    def __init__(self, algorithm: int, hashed_key: bytes) -> None:
        self._contexts = Pool(lambda: _Context(algorithm, "ecb", hashed_key))
        self._plain = Plain(64)

    def ivs(self, sector: int, count: int) -> bytes:
        blocks = bytearray(self._plain.ivs(sector, count))
        context = self._contexts.take()
        context.encrypt(
            ctypes.addressof((ctypes.c_char * len(blocks)).from_buffer(blocks)), len(blocks)
        )
        self._contexts.give(context)
        return bytes(blocks)


class _Context:
    """A gcry_cipher_hd_t, for one thread at a time."""

    def __init__(self, algorithm: int, mode: str, key: bytes) -> None:
        self._lib = lib = _library()
        handle = ctypes.c_void_p()
        _check(lib.gcry_cipher_open(ctypes.byref(handle), algorithm, _MODES[mode], 0))
        weakref.finalize(self, lib.gcry_cipher_close, handle)
        self._handle = handle
        _check(lib.gcry_cipher_setkey(handle, key, ctypes.c_size_t(len(key))))
        self._set: Callable[..., int] = (
            lib.gcry_cipher_setctr if mode == "ctr" else lib.gcry_cipher_setiv
        )

    def start(self, iv: bytes) -> None:
        """A sector begins."""
        _check(self._set(self._handle, iv, ctypes.c_size_t(len(iv))))

    def decrypt(self, address: int, length: int) -> None:
        self._in_place(self._lib.gcry_cipher_decrypt, address, length)

    def encrypt(self, address: int, length: int) -> None:
        self._in_place(self._lib.gcry_cipher_encrypt, address, length)

    def _in_place(self, function: Any, address: int, length: int) -> None:
        where, size = ctypes.c_void_p(address), ctypes.c_size_t(length)
        _check(function(self._handle, where, size, None, ctypes.c_size_t(0)))


@lru_cache(maxsize=1)
def _library() -> Any:
    lib = ctypes.CDLL(LIBRARY)
    lib.gcry_check_version.restype = ctypes.c_char_p
    lib.gcry_strerror.restype = ctypes.c_char_p
    lib.gcry_check_version(None)  # "must be called before any other function"
    if not lib.gcry_control(_INITIALIZATION_FINISHED_P):
        # Its own locked memory is 32 KiB for the whole process, and keys are in ours anyway.
        lib.gcry_control(_DISABLE_SECMEM, 0)
        lib.gcry_control(_INITIALIZATION_FINISHED, 0)
    return lib


def _check(error: int) -> None:
    if error:
        said = _library().gcry_strerror(error).decode("ascii", "replace")
        raise ImageError(f"libgcrypt refuses: {said.lower()}")
