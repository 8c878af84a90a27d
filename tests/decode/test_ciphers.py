"""The modes and IV generators: known answers of NIST SP 800-38A (appendix F), and each mode over
many sectors against python3-cryptography, a sector at a time."""

from __future__ import annotations

import hashlib
import random
from concurrent.futures import ThreadPoolExecutor

import pytest
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

from qcow2snap_core.decode.ciphers import (
    SECTOR,
    CbcSectors,
    CtrSectors,
    EcbSectors,
    Essiv,
    IvGenerator,
    Plain,
    SectorCipher,
)

KEYS = {
    128: "2b7e151628aed2a6abf7158809cf4f3c",
    192: "8e73b0f7da0e6452c810f32b809079e562f8ead2522c6b7b",
    256: "603deb1015ca71be2b73aef0857d77811f352c073b6108d72d9810a30914dff4",
}
PLAIN = bytes.fromhex(
    "6bc1bee22e409f96e93d7e117393172aae2d8a571e03ac9c9eb76fac45af8e51"
    "30c81c46a35ce411e5fbc1191a0a52eff69f2445df4f9b17ad2b417be66c3710"
)
# SP 800-38A: F.1.1, F.1.5; F.2.1, F.2.3, F.2.5; F.5.1, F.5.5.
ANSWERS = [
    ("ecb", 128, "3ad77bb40d7a3660a89ecaf32466ef97f5d3d58503b9699de785895a96fdbaaf"),
    ("ecb", 256, "f3eed1bdb5d2a03c064b5a7e3db181f8591ccb10d410ed26dc5ba74a31362870"),
    ("cbc", 128, "7649abac8119b246cee98e9b12e9197d5086cb9b507219ee95db113a917678b2"),
    ("cbc", 192, "4f021db243bc633d7178183a9fa071e8b4d9ada9ad7dedf4e5e738763f69145a"),
    ("cbc", 256, "f58c4c04d6e5f1ba779eabfb5f7bfbd69cfc4e967edb808d679f777bc6702c7d"),
    ("ctr", 128, "874d6191b620e3261bef6864990db6ce9806f66b7970fdff8617187bb9fffdff"),
    ("ctr", 256, "601ec313775789a5b7a7f504bbf3d228f443e3ca4d62b59aca84e990cacaf5c5"),
]
IVS = {
    "ecb": b"",
    "cbc": bytes(range(16)),
    "ctr": bytes(range(0xF0, 0x100)),
}


class Given:
    """An IV generator that gives every sector the block of a test vector."""

    def __init__(self, block: bytes) -> None:
        self._block = block

    def ivs(self, sector: int, count: int) -> bytes:
        return self._block * count


def make(mode: str, key: bytes, generator: IvGenerator) -> SectorCipher:
    if mode == "ecb":
        return EcbSectors(key)
    return {"cbc": CbcSectors, "ctr": CtrSectors}[mode](key, generator)


@pytest.mark.parametrize(("mode", "bits", "encrypted"), ANSWERS)
def test_known_answers(mode: str, bits: int, encrypted: str) -> None:
    data = bytearray(bytes.fromhex(encrypted).ljust(SECTOR, b"\0"))
    make(mode, bytes.fromhex(KEYS[bits]), Given(IVS[mode])).decrypt(memoryview(data), 0)
    assert data[:32] == PLAIN[:32]


def test_the_ctr_counter_carries_through_all_its_bytes() -> None:
    key, iv = bytes(16), b"\xff" * 15 + b"\xfe"
    data = bytearray(SECTOR)
    CtrSectors(key, Given(iv)).decrypt(memoryview(data), 0)
    assert data == Cipher(algorithms.AES(key), modes.CTR(iv)).encryptor().update(bytes(SECTOR))


@pytest.mark.parametrize(
    ("generator", "sector", "first"),
    [
        (Plain(64), 5, b"\5" + bytes(15)),
        (Plain(64), 2**32 + 7, b"\7\0\0\0\1" + bytes(11)),
        (Plain(32), 2**32 + 7, b"\7" + bytes(15)),
        (Plain(32), 2**32 - 1, b"\xff" * 4 + bytes(12)),
    ],
)
def test_plain_is_the_sector_number(generator: Plain, sector: int, first: bytes) -> None:
    ivs = bytes(generator.ivs(sector, 3))
    assert ivs[:16] == first
    assert ivs == b"".join(bytes(generator.ivs(sector + i, 1)) for i in range(3))


def test_essiv_is_the_encrypted_sector_number() -> None:
    salt = hashlib.sha256(b"key").digest()
    expected = b""
    for sector in (2**33, 2**33 + 1):
        block = sector.to_bytes(16, "little")
        expected += Cipher(algorithms.AES(salt), modes.ECB()).encryptor().update(block)
    assert bytes(Essiv(salt).ivs(2**33, 2)) == expected


@pytest.mark.parametrize("bits", KEYS)
@pytest.mark.parametrize("mode", ["ecb", "cbc", "ctr"])
@pytest.mark.parametrize("count", [1, 2, 131])
def test_many_sectors_are_decrypted_as_one_by_one(mode: str, bits: int, count: int) -> None:
    rng = random.Random(count)
    key = bytes.fromhex(KEYS[bits])
    plain = rng.randbytes(count * SECTOR)
    sector = 2**32 - 2  # the 32-bit number wraps in the middle
    encrypted = b""
    for i in range(count):
        iv = ((sector + i) % 2**32).to_bytes(16, "little")
        library = {"ecb": modes.ECB, "cbc": modes.CBC, "ctr": modes.CTR}[mode]
        cipher = Cipher(algorithms.AES(key), library() if mode == "ecb" else library(iv))
        encrypted += cipher.encryptor().update(plain[i * SECTOR : (i + 1) * SECTOR])
    data = bytearray(encrypted)
    make(mode, key, Plain(32)).decrypt(memoryview(data), sector)
    assert data == plain


def test_one_cipher_serves_several_threads() -> None:
    cipher = CbcSectors(bytes(16), Essiv(bytes(32)))

    def decrypt(sector: int) -> bytes:
        data = bytearray(64 * SECTOR)
        cipher.decrypt(memoryview(data), sector)
        return bytes(data)

    with ThreadPoolExecutor(8) as pool:
        many = list(pool.map(decrypt, [n % 5 for n in range(200)]))
    assert many == [decrypt(n % 5) for n in range(200)]
