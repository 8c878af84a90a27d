"""AES-XTS by sectors of 512 bytes (IEEE 1619), fast on one sector and on a thousand.

XTS gives every block of 16 bytes a tweak: the first of sector n is E2(n), encrypted with the
second key, and each next one is the one before it times x in GF(2^128).  Between two xors with
the tweak, the block is plain AES with the first key.

*Many sectors:* the first tweaks of all sectors are one ECB call.  The tweak of block j is the first
one shifted left by j, and what that shifts out at the top comes back multiplied by x^128 =
x^7 + x^2 + x + 1.  Shifts and multiplication are linear, so what comes back is looked up, a row
of 32 for each of the four bytes that reach the top in 31 steps.  Then xor, one ECB call for the
data, xor.  All of that in few calls of numpy, since each lets other threads at the interpreter; in
arrays that are kept, since new memory costs more page faults than the work takes; and with
multiplications, which numpy does faster than shifts to the left.

*Few sectors:* numpy's calls would cost more than the work.  OpenSSL's own XTS does a sector in
1.4 us, through ctypes with the GIL kept, where python3-cryptography needs 20 us to set one up.

Without numpy the sectors are done one by one; without an OpenSSL of the expected name
python3-cryptography does the few.
"""

from __future__ import annotations

import ctypes
from functools import lru_cache
from threading import BoundedSemaphore
from types import ModuleType
from typing import Any, Final

from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

from ..errors import ImageError
from ..util.pool import Pool
from .ciphers import BLOCK, BLOCKS, SECTOR, Ecb, IvGenerator

_MANY: Final = 16 << 10  # bytes from where on numpy is faster
_AT_ONCE: Final = 512  # sectors: a request of nbdcopy; their arrays take a megabyte
_MOST_ARRAYS: Final = 4  # that is not multiplied by the number of clients


class XtsSectors:
    """A key of twice AES's length: one half for the data, the other for the tweaks."""

    def __init__(self, key: bytes, generator: IvGenerator) -> None:
        half = len(key) // 2
        self._decrypt = Ecb(key[:half], encrypt=False)
        self._first_tweaks = Ecb(key[half:], encrypt=True)
        self._generator = generator
        self._few = _few_sectors(key)
        self._turns = BoundedSemaphore(_MOST_ARRAYS)
        self._arrays: Pool[_Arrays] = Pool(lambda: _Arrays(_numpy()))
        if self._few is None and _numpy() is None:
            raise ImageError("AES-192 in XTS mode needs numpy: install python3-numpy")

    def decrypt(self, view: memoryview, sector: int) -> None:
        """Decrypt whole sectors in place."""
        many = (len(view) >= _MANY or self._few is None) and _numpy() is not None
        step = (_AT_ONCE if many else len(view)) * SECTOR
        for at in range(0, len(view), step):
            piece = view[at : at + step]
            ivs = self._generator.ivs(sector + at // SECTOR, len(piece) // SECTOR)
            if many:
                self._decrypt_many(piece, ivs)
            elif self._few is not None:
                self._few.decrypt(piece, bytes(ivs))

    def _decrypt_many(self, view: memoryview, ivs: bytes | memoryview) -> None:
        with self._turns:
            arrays = self._arrays.take()
            arrays.decrypt(view, self._first_tweaks(ivs), self._decrypt)
            self._arrays.give(arrays)


class _Arrays:
    """The working memory for sectors that are decrypted at once, and how that is done.

    The arrays are by sector, then by block in the sector.
    """

    def __init__(self, numpy: Any) -> None:
        self._np = numpy
        self._half = numpy.empty((_AT_ONCE, BLOCKS), "<u8")  # of each tweak, of 128 bits
        self._part = numpy.empty_like(self._half)
        self._tweaks = numpy.empty((_AT_ONCE, BLOCKS, 2), "<u8")
        self._mixed = numpy.empty(_AT_ONCE * SECTOR // 8, "<u8")
        self._plain = bytearray(_AT_ONCE * SECTOR + BLOCK - 1)
        self._times = numpy.array([1 << j for j in range(BLOCKS)], "<u8")
        self._back = numpy.array([64 - j for j in range(BLOCKS)], "<u8")
        self._returning = numpy.array(_returning(), "<u8")

    def decrypt(self, view: memoryview, first: memoryview, ecb: Ecb) -> None:
        """Decrypt at most ``_AT_ONCE`` sectors in place; ``first`` has the first tweak of each."""
        np = self._np
        tweaks = self._tweaks[: len(view) // SECTOR]
        self._multiply(np.frombuffer(first, "<u8").reshape(-1, 2), tweaks)
        flat = tweaks.reshape(-1)
        data = np.frombuffer(view, "<u8")
        mixed = np.bitwise_xor(data, flat, out=self._mixed[: len(data)])
        plain = ecb.into(memoryview(mixed).cast("B"), self._plain)
        np.bitwise_xor(np.frombuffer(plain, "<u8"), flat, out=data)

    def _multiply(self, first: Any, tweaks: Any) -> None:
        """All tweaks of the sectors from the first of each."""
        np, xor = self._np, self._np.bitwise_xor
        low, high = first[:, :1], first[:, 1:]
        half, part = self._half[: len(first)], self._part[: len(first)]
        np.multiply(high, self._times, out=half)
        np.right_shift(low, self._back, out=part)
        xor(half, part, out=tweaks[:, :, 1])
        np.multiply(low, self._times, out=half)
        top = (high >> (64 - BLOCKS + 1)).astype("<u4").view("u1").reshape(-1, 4)
        for byte, rows in enumerate(self._returning):
            np.take(rows, top[:, byte], axis=0, out=part, mode="clip")
            xor(half, part, out=half)
        tweaks[:, :, 0] = half


@lru_cache(maxsize=1)
def _returning() -> list[list[list[int]]]:
    """By byte of the 31 bits at the top, by its value, by block: what of it has been shifted out
    by then, times x^128."""

    def multiplied(out: int) -> int:
        return out ^ out << 1 ^ out << 2 ^ out << 7

    return [
        [
            [multiplied(value << 8 * byte >> (BLOCKS - 1 - block)) for block in range(BLOCKS)]
            for value in range(256)
        ]
        for byte in range(4)
    ]


def _few_sectors(key: bytes) -> OpenSsl | Library | None:
    """What decrypts a few sectors; IEEE 1619, and so both libraries, know no AES-192."""
    if len(key) == 48:
        return None
    try:
        return OpenSsl(key)
    except (OSError, AttributeError):
        return Library(key)


class OpenSsl:
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
            done = self._init(context, None, None, None, ivs[i : i + BLOCK], -1)
            if not done or not self._update(context, at, ctypes.addressof(written), at, SECTOR):
                raise MemoryError  # or the sector would be returned as it is
            at += SECTOR
        self._contexts.give(context)


class Library:
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
