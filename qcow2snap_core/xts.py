"""AES-XTS by sectors of 512 bytes (IEEE 1619), fast on one sector and on a thousand.

XTS gives every block of 16 bytes a tweak: the first of sector n is E2(n), encrypted with the
second key, and each next one is the one before it times x in GF(2^128).  Between two xors with
the tweak, the block is plain AES with the first key.

*Many sectors:* the first tweaks of all sectors are one ECB call.  The others come by doubling,
for all sectors at once with numpy: the first tweak times x gives the second, both times x^2 the
next two, and so on, five steps to 32.  Then xor, one ECB call for the data, xor.

*Few sectors:* numpy's calls would cost more than the work.  OpenSSL's own XTS does a sector in
1.4 us, through ctypes with the GIL kept, where python3-cryptography needs 20 us to set one up.

Without numpy the sectors are done one by one; without an OpenSSL of the expected name
python3-cryptography does the few.
"""

from __future__ import annotations

import ctypes
from functools import lru_cache
from types import ModuleType
from typing import Any, Final

from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

from .ciphers import BLOCK, BLOCKS, SECTOR, Ecb, IvGenerator
from .errors import ImageError
from .pool import Pool

_MANY: Final = 16 << 10  # bytes from where on numpy is faster


class XtsSectors:
    """A key of twice AES's length: one half for the data, the other for the tweaks."""

    def __init__(self, key: bytes, generator: IvGenerator) -> None:
        half = len(key) // 2
        self._decrypt = Ecb(key[:half], encrypt=False)
        self._first_tweaks = Ecb(key[half:], encrypt=True)
        self._generator = generator
        self._few = _few_sectors(key)
        if self._few is None and _numpy() is None:
            raise ImageError("AES-192 in XTS mode needs numpy: install python3-numpy")

    def decrypt(self, view: memoryview, sector: int) -> None:
        """Decrypt whole sectors in place."""
        count = len(view) // SECTOR
        ivs = self._generator.ivs(sector, count)
        numpy = _numpy() if len(view) >= _MANY or self._few is None else None
        if numpy is not None:
            self._decrypt_many(numpy, view, self._first_tweaks(ivs), count)
        elif self._few is not None:
            self._few.decrypt(view, bytes(ivs))

    def _decrypt_many(self, numpy: Any, view: memoryview, first: memoryview, count: int) -> None:
        tweaks = numpy.empty((count, BLOCKS, 2), dtype="<u8")
        tweaks[:, 0] = numpy.frombuffer(first, dtype="<u8").reshape(count, 2)
        have = 1
        while have < BLOCKS:
            low, high = tweaks[:, :have, 0], tweaks[:, :have, 1]
            # What the shift carries out at the top comes back as x^128 = x^7 + x^2 + x + 1.
            carry = high >> (64 - have)
            carry ^= carry << 1 ^ carry << 2 ^ carry << 7
            tweaks[:, have : 2 * have, 0] = low << have ^ carry
            tweaks[:, have : 2 * have, 1] = high << have ^ low >> (64 - have)
            have *= 2
        flat = tweaks.reshape(-1)
        data = numpy.frombuffer(view, dtype="<u8")
        mixed = data ^ flat
        plain = numpy.frombuffer(self._decrypt(memoryview(mixed).cast("B")), dtype="<u8")
        numpy.bitwise_xor(plain, flat, out=data)


def _few_sectors(key: bytes) -> _OpenSsl | _Library | None:
    """What decrypts a few sectors; IEEE 1619, and so both libraries, know no AES-192."""
    if len(key) == 48:
        return None
    try:
        return _OpenSsl(key)
    except (OSError, AttributeError):
        return _Library(key)


class _OpenSsl:
    """OpenSSL's EVP interface, a sector at a time."""

    def __init__(self, key: bytes) -> None:
        # PyDLL keeps the GIL: handing it over costs more than a sector takes.
        lib = ctypes.PyDLL("libcrypto.so.3")
        cipher = {32: "EVP_aes_128_xts", 64: "EVP_aes_256_xts"}[len(key)]
        algorithm = getattr(lib, cipher)
        algorithm.restype = ctypes.c_void_p
        new = lib.EVP_CIPHER_CTX_new
        new.restype = ctypes.c_void_p
        self._init = lib.EVP_CipherInit_ex
        self._init.argtypes = [ctypes.c_void_p] * 3 + [ctypes.c_char_p] * 2 + [ctypes.c_int]
        self._update = lib.EVP_CipherUpdate
        self._update.argtypes = [ctypes.c_void_p] * 4 + [ctypes.c_int]

        def make() -> int:
            context: int | None = new()
            if not context or not self._init(context, algorithm(), None, key, bytes(BLOCK), 0):
                raise MemoryError
            return context

        self._contexts = Pool(make)

    def decrypt(self, view: memoryview, ivs: bytes) -> None:
        context = self._contexts.take()
        written = ctypes.c_int()
        at = ctypes.addressof(ctypes.c_char.from_buffer(view))
        for i in range(0, len(ivs), BLOCK):
            self._init(context, None, None, None, ivs[i : i + BLOCK], -1)
            self._update(context, at, ctypes.addressof(written), at, SECTOR)
            at += SECTOR
        self._contexts.give(context)


class _Library:
    """python3-cryptography's XTS, a sector at a time."""

    def __init__(self, key: bytes) -> None:
        self._algorithm = algorithms.AES(key)

    def decrypt(self, view: memoryview, ivs: bytes) -> None:
        for i in range(len(ivs) // BLOCK):
            mode = modes.XTS(ivs[i * BLOCK : (i + 1) * BLOCK])
            sector = view[i * SECTOR : (i + 1) * SECTOR]
            sector[:] = Cipher(self._algorithm, mode).decryptor().update(sector)


@lru_cache(maxsize=1)
def _numpy() -> ModuleType | None:
    try:
        import numpy
    except ImportError:
        return None
    return numpy
