"""Decrypting sectors: AES in the modes and with the IV generators that QEMU's images use.

Every sector of 512 bytes is encrypted by itself, with its number as the seed of the IV.  The
ciphers of python3-cryptography do one message per call, and a call per sector costs 20 us; so
the modes here are put together from AES blocks, a whole request at a time.  XTS, which nearly
all images have, is in a file of its own.
"""

from __future__ import annotations

import sys
from array import array
from typing import Any, Final, Protocol

from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

from ..util.pool import Pool

SECTOR: Final = 512
BLOCK: Final = 16
BLOCKS: Final = SECTOR // BLOCK


class SectorCipher(Protocol):
    """Decrypts sectors; safe to use from several threads."""

    def decrypt(self, view: memoryview, sector: int) -> None:
        """Decrypt whole sectors in place, the first of which has the number ``sector``."""


class Ecb:
    """AES block by block, each use of a context by one thread alone."""

    def __init__(self, key: bytes, *, encrypt: bool) -> None:
        cipher = Cipher(algorithms.AES(key), modes.ECB())
        self._contexts: Pool[Any] = Pool(cipher.encryptor if encrypt else cipher.decryptor)

    def __call__(self, data: Any) -> memoryview:
        return self.into(data, bytearray(len(data) + BLOCK - 1))

    def into(self, data: Any, out: bytearray) -> memoryview:
        """The same, to the start of ``out``, which has room for a block less one byte more: the
        library asks for it."""
        context = self._contexts.take()
        context.update_into(data, out)
        self._contexts.give(context)
        return memoryview(out)[: len(data)]


class IvGenerator(Protocol):
    """The block that seeds each sector."""

    def ivs(self, sector: int, count: int) -> bytes | memoryview:
        """``count`` blocks of 16 bytes, for the sectors from ``sector`` on."""


class Plain:
    """The sector number, little-endian, in 32 bits or (plain64) in 64; zeros follow."""

    def __init__(self, bits: int) -> None:
        self._wrap = 1 << bits

    def ivs(self, sector: int, count: int) -> bytes:
        numbers = array("Q", bytes(BLOCK * count))
        first = sector % self._wrap
        if first + count <= self._wrap:
            numbers[::2] = array("Q", range(first, first + count))
        else:
            numbers[::2] = array("Q", [n % self._wrap for n in range(first, first + count)])
        if sys.byteorder == "big":
            numbers.byteswap()
        return numbers.tobytes()


class Essiv:
    """The sector number encrypted with a hash of the key."""

    def __init__(self, hashed_key: bytes) -> None:
        self._encrypt = Ecb(hashed_key, encrypt=True)
        self._plain = Plain(64)

    def ivs(self, sector: int, count: int) -> memoryview:
        return self._encrypt(self._plain.ivs(sector, count))


class EcbSectors:
    """ECB, which has no IV at all."""

    def __init__(self, key: bytes) -> None:
        self._decrypt = Ecb(key, encrypt=False)

    def decrypt(self, view: memoryview, sector: int) -> None:
        view[:] = self._decrypt(view)


class CbcSectors:
    """CBC, one chain per sector."""

    def __init__(self, key: bytes, generator: IvGenerator) -> None:
        self._decrypt = Ecb(key, encrypt=False)
        self._generator = generator

    def decrypt(self, view: memoryview, sector: int) -> None:
        # Each block's neighbour before it; in front of a sector's first one stands the IV.
        chained = bytearray(BLOCK)
        chained += view[:-BLOCK]
        count = len(view) // SECTOR
        ivs = memoryview(self._generator.ivs(sector, count))
        for i in range(count):
            chained[i * SECTOR : i * SECTOR + BLOCK] = ivs[i * BLOCK : (i + 1) * BLOCK]
        view[:] = xor(self._decrypt(view), chained)


class CtrSectors:
    """CTR: a big-endian counter of blocks that starts at the sector's IV."""

    def __init__(self, key: bytes, generator: IvGenerator) -> None:
        self._encrypt = Ecb(key, encrypt=True)
        self._generator = generator

    def decrypt(self, view: memoryview, sector: int) -> None:
        count = len(view) // SECTOR
        ivs = bytes(self._generator.ivs(sector, count))
        counters = bytearray()
        for i in range(count):
            first = int.from_bytes(ivs[i * BLOCK : (i + 1) * BLOCK], "big")
            for j in range(BLOCKS):
                counters += ((first + j) % (1 << 128)).to_bytes(BLOCK, "big")
        view[:] = xor(self._encrypt(counters), view)


def xor(a: Any, b: Any) -> bytes:
    """Two buffers of one length, bit by bit."""
    n = len(a)
    return (int.from_bytes(a, sys.byteorder) ^ int.from_bytes(b, sys.byteorder)).to_bytes(
        n, sys.byteorder
    )
