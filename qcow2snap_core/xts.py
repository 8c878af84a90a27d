"""AES-XTS by sectors of 512 bytes (IEEE 1619), fast on one sector and on a thousand.

XTS gives every block of 16 bytes a tweak: the first of sector n is E2(n), encrypted with the
second key, and each next one is the one before it times x in GF(2^128).  Between two xors with
the tweak, the block is plain AES with the first key.

*Many sectors:* the first tweaks of all sectors are one ECB call.  The others come by doubling,
for all sectors at once with numpy: the first tweak times x gives the second, both times x^2 the
next two, and so on, five steps to 32.  Then xor, one ECB call for the data, xor.  The arrays are
kept from call to call (memory that is new for each costs more page faults than the work takes),
their innermost axis is the sectors, which is contiguous; and what numpy is slow at is avoided:
constants that are Python integers, and shifts to the left, which are multiplications here.

*Few sectors:* numpy's calls would cost more than the work.  OpenSSL's own XTS does a sector in
1.4 us, through ctypes with the GIL kept, where python3-cryptography needs 20 us to set one up.

Without numpy the sectors are done one by one; without an OpenSSL of the expected name
python3-cryptography does the few.
"""

from __future__ import annotations

import ctypes
from functools import lru_cache
from threading import Lock
from types import ModuleType
from typing import Any, Final

from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

from .ciphers import BLOCK, BLOCKS, SECTOR, Ecb, IvGenerator
from .errors import ImageError
from .pool import Pool

_MANY: Final = 32 << 10  # bytes from where on numpy is faster
_AT_ONCE: Final = 256  # sectors; what their arrays take fits in a core's own cache


class XtsSectors:
    """A key of twice AES's length: one half for the data, the other for the tweaks."""

    def __init__(self, key: bytes, generator: IvGenerator) -> None:
        half = len(key) // 2
        self._decrypt = Ecb(key[:half], encrypt=False)
        self._first_tweaks = Ecb(key[half:], encrypt=True)
        self._generator = generator
        self._few = _few_sectors(key)
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
        arrays = self._arrays.take()
        arrays.decrypt(view, self._first_tweaks(ivs), self._decrypt)
        self._arrays.give(arrays)


class _Arrays:
    """The working memory for sectors that are decrypted at once, and how that is done."""

    # Each of numpy's short calls hands the interpreter over; threads that do so to each other all
    # the time lose more than a second core gains.
    _turn = Lock()

    def __init__(self, numpy: Any) -> None:
        self._np = numpy
        # By block in the sector, then by sector: the tweaks' halves, and what is carried between.
        self._low = numpy.empty((BLOCKS, _AT_ONCE), "<u8")
        self._high = numpy.empty_like(self._low)
        self._carry = numpy.empty((BLOCKS // 2, _AT_ONCE), "<u8")
        # As the data lie: by sector, then by block.
        self._tweaks = numpy.empty((_AT_ONCE, BLOCKS, 2), "<u8")
        self._mixed = numpy.empty(_AT_ONCE * SECTOR // 8, "<u8")
        self._plain = bytearray(_AT_ONCE * SECTOR + BLOCK - 1)

        def constant(n: int) -> Any:
            return numpy.array(n, "<u8")

        self._2_to_5 = constant(1 << 5)
        # (tweaks there are, what their product with 2^that shifts out, 2^that)
        self._doublings = [(n, constant(64 - n), constant(1 << n)) for n in (1, 2, 4, 8, 16)]

    def decrypt(self, view: memoryview, first: memoryview, ecb: Ecb) -> None:
        """Decrypt at most ``_AT_ONCE`` sectors in place; ``first`` has the first tweak of each."""
        np, count = self._np, len(view) // SECTOR
        with self._turn:
            self._multiply(first, count)
        tweaks = self._tweaks[:count]
        tweaks[:, :, 0] = self._low[:, :count].T
        tweaks[:, :, 1] = self._high[:, :count].T
        flat = tweaks.reshape(-1)
        data = np.frombuffer(view, "<u8")
        mixed = np.bitwise_xor(data, flat, out=self._mixed[: len(data)])
        plain = ecb.into(memoryview(mixed).cast("B"), self._plain)
        np.bitwise_xor(np.frombuffer(plain, "<u8"), flat, out=data)

    def _multiply(self, first: memoryview, count: int) -> None:
        """All tweaks of the sectors from the first of each."""
        np = self._np
        add, xor, multiply, right = np.add, np.bitwise_xor, np.multiply, np.right_shift
        start = np.frombuffer(first, "<u8").reshape(count, 2)
        self._low[0, :count], self._high[0, :count] = start[:, 0], start[:, 1]
        for have, back, times in self._doublings:
            low, high = self._low[:have, :count], self._high[:have, :count]
            new_low = self._low[have : 2 * have, :count]
            new_high = self._high[have : 2 * have, :count]
            carry = self._carry[:have, :count]
            multiply(low, times, out=new_low)
            multiply(high, times, out=new_high)
            right(low, back, out=carry)
            xor(new_high, carry, out=new_high)
            # What is shifted out at the top comes back as x^128 = x^7 + x^2 + x + 1.
            right(high, back, out=carry)
            xor(new_low, carry, out=new_low)
            add(carry, carry, out=carry)
            xor(new_low, carry, out=new_low)
            add(carry, carry, out=carry)
            xor(new_low, carry, out=new_low)
            multiply(carry, self._2_to_5, out=carry)
            xor(new_low, carry, out=new_low)


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
            done = self._init(context, None, None, None, ivs[i : i + BLOCK], -1)
            if not done or not self._update(context, at, ctypes.addressof(written), at, SECTOR):
                raise MemoryError  # or the sector would be returned as it is
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
