"""AES-XTS by its three ways, numpy, OpenSSL and python3-cryptography: known answers of
IEEE 1619-2007 (annex B), and all ways alike at every length."""

from __future__ import annotations

import random
from typing import Any

import pytest
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

from qcow2snap_core.decode import xts
from qcow2snap_core.decode.ciphers import SECTOR, Essiv, Plain
from qcow2snap_core.errors import ImageError

# IEEE 1619-2007, vectors 4 and 10: both keys, data unit number, start and end of the cipher text
# of 512 bytes.  The plain text is 00 01 02 ... ff, twice.
K128 = "2718281828459045235360287471352631415926535897932384626433832795"
K256 = (
    "2718281828459045235360287471352662497757247093699959574966967627"
    "3141592653589793238462643383279502884197169399375105820974944592"
)
COUNTING = bytes(range(256)) * 2
VECTORS = [
    (K128, 0, "27a7479befa1d476489f308cd4cfa6e2", "a282df920147beabe421ee5319d0568"),
    (K256, 0xFF, "1c3b3a102f770386e4836c99e370cf9b", "c4f36ffda9fcea70b9c6e693e148c151"),
]
WAYS = ["numpy", "openssl", "library"]


def decrypt(way: str, key: bytes, data: bytes, sector: int, generator: Any = None) -> bytes:
    """By one way, whatever the length."""
    generator = generator or Plain(64)
    view = memoryview(bytearray(data))
    ivs = bytes(generator.ivs(sector, len(data) // SECTOR))
    if way == "numpy":
        pytest.importorskip("numpy")
        sectors = xts.XtsSectors(key, generator)
        sectors._few = None
        sectors.decrypt(view, sector)
    else:
        {"openssl": xts.OpenSsl, "library": xts.Library}[way](key).decrypt(view, ivs)
    return bytes(view)


def encrypt(key: bytes, data: bytes, ivs: bytes) -> bytes:
    """By python3-cryptography."""
    return b"".join(
        Cipher(algorithms.AES(key), modes.XTS(ivs[i * 16 : i * 16 + 16]))
        .encryptor()
        .update(data[i * SECTOR : (i + 1) * SECTOR])
        for i in range(len(data) // SECTOR)
    )


@pytest.mark.parametrize(("key", "sector", "first", "last"), VECTORS)
def test_the_oracle_gives_the_standards_answers(
    key: str, sector: int, first: str, last: str
) -> None:
    encrypted = encrypt(bytes.fromhex(key), COUNTING, sector.to_bytes(16, "little")).hex()
    assert encrypted.startswith(first)
    assert encrypted.endswith(last)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("key", "sector"), [v[:2] for v in VECTORS])
def test_known_answers(way: str, key: str, sector: int) -> None:
    encrypted = encrypt(bytes.fromhex(key), COUNTING, sector.to_bytes(16, "little"))
    assert decrypt(way, bytes.fromhex(key), encrypted, sector) == COUNTING


@pytest.mark.parametrize("bits", [128, 256])
@pytest.mark.parametrize("count", [1, 2, 31, 32, 33, 511, 512, 513, 2049])
def test_all_ways_are_alike(bits: int, count: int) -> None:
    rng = random.Random(count)
    key = rng.randbytes(bits // 4)
    plain, sector = rng.randbytes(count * SECTOR), 2**32 - 5
    encrypted = encrypt(key, plain, Plain(64).ivs(sector, count))
    for way in WAYS:
        assert decrypt(way, key, encrypted, sector) == plain, way


@pytest.mark.parametrize("count", [1, 40])
def test_essiv_seeds_the_tweaks(count: int) -> None:
    generator, key = Essiv(bytes(range(32))), bytes(range(64))
    encrypted = encrypt(key, bytes(count * SECTOR), bytes(generator.ivs(9, count)))
    data = bytearray(encrypted)
    xts.XtsSectors(key, generator).decrypt(memoryview(data), 9)
    assert data == bytes(count * SECTOR)


@pytest.mark.parametrize("missing", ["numpy", "OpenSSL"])
@pytest.mark.parametrize("count", [1, 40])
def test_without_one_way_the_others_do(
    monkeypatch: pytest.MonkeyPatch, missing: str, count: int
) -> None:
    if missing == "numpy":
        monkeypatch.setattr(xts, "_numpy", lambda: None)
    else:
        monkeypatch.setattr(xts, "_few_sectors", xts.Library)
    key = bytes(range(32))
    data = bytearray(encrypt(key, bytes(count * SECTOR), Plain(64).ivs(3, count)))
    xts.XtsSectors(key, Plain(64)).decrypt(memoryview(data), 3)
    assert data == bytes(count * SECTOR)


def double(tweak: bytes) -> bytes:
    """Times x, as IEEE 1619-2007 has it in 5.2, byte by byte."""
    out, carry = bytearray(), 0
    for byte in tweak:
        out.append((byte << 1 | carry) & 0xFF)
        carry = byte >> 7
    out[0] ^= 0x87 * carry
    return bytes(out)


@pytest.mark.parametrize("count", [1, 5])
def test_aes_192_which_the_standard_and_the_libraries_lack(count: int) -> None:
    key, sector = bytes(range(100, 148)), 77
    ecb = Cipher(algorithms.AES(key[:24]), modes.ECB()).decryptor().update
    seed = Cipher(algorithms.AES(key[24:]), modes.ECB()).encryptor().update
    encrypted, expected = random.Random(1).randbytes(count * SECTOR), b""
    for at in range(0, len(encrypted), 16):
        if at % SECTOR == 0:
            tweak = seed((sector + at // SECTOR).to_bytes(16, "little"))
        mixed = bytes(a ^ b for a, b in zip(encrypted[at : at + 16], tweak, strict=True))
        expected += bytes(a ^ b for a, b in zip(ecb(mixed), tweak, strict=True))
        tweak = double(tweak)
    data = bytearray(encrypted)
    xts.XtsSectors(key, Plain(64)).decrypt(memoryview(data), sector)
    assert data == expected


def test_aes_192_without_numpy_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(xts, "_numpy", lambda: None)
    with pytest.raises(ImageError, match="install python3-numpy"):
        xts.XtsSectors(bytes(48), Plain(64))
