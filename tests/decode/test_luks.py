"""LUKS headers: known answers for the parts, keys that QEMU made, and damage field by field."""

from __future__ import annotations

import hashlib
import struct

import pytest
from support import qemu, secret

from qcow2snap_core.decode import luks
from qcow2snap_core.errors import ImageError, UsageError

PASSPHRASE = "sesame"
STRIPES = 4000


@pytest.fixture(scope="module")
def area(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The LUKS header with its key slots of an image that QEMU made."""
    path = tmp_path_factory.mktemp("luks") / "disk.qcow2"
    secret.create(path, 1 << 20, (PASSPHRASE,), **{"encrypt.format": "luks"})
    start = qemu.peek(path, 0, 4096)
    at = start.index(bytes.fromhex("0537be77")) + 8
    offset, length = struct.unpack(">QQ", start[at : at + 16])
    return qemu.peek(path, offset, length)


def patched(area: bytes, at: int, data: bytes) -> bytes:
    return area[:at] + data + area[at + len(data) :]


@pytest.mark.parametrize(
    ("password", "salt", "rounds", "key"),
    [
        (b"password", b"salt", 1, "0c60c80f961f0e71f3a9b524af6012062fe037a6"),
        (b"password", b"salt", 4096, "4b007901b765489abead49d926f721d065a429c1"),
        (b"pass\0word", b"sa\0lt", 4096, "56fa6aa75548099dcc37d7f03425e0c3"),
    ],
)
def test_pbkdf2_as_in_rfc_6070(password: bytes, salt: bytes, rounds: int, key: str) -> None:
    got = luks.hashlib.pbkdf2_hmac("sha1", password, salt, rounds, len(key) // 2)
    assert got.hex() == key


@pytest.mark.parametrize(("generator", "wraps"), [("plain", True), ("plain64", False)])
@pytest.mark.parametrize("mode", ["xts", "cbc", "ctr"])
def test_plain_forgets_the_sector_numbers_upper_half(
    mode: str, generator: str, wraps: bool
) -> None:
    """It shows past 2 TiB only, where no test image reaches (QEMU: qcrypto_ivgen_plain)."""
    parsed = luks.parse_cipher("aes", f"{mode}-{generator}", 32)
    assert isinstance(parsed, luks.CipherChoice)
    cipher = parsed.make(bytes(range(32)))
    near, far = bytearray(512), bytearray(512)
    cipher.decrypt(memoryview(near), 7)
    cipher.decrypt(memoryview(far), 2**32 + 7)
    assert (near == far) is wraps


def split(key: bytes, hash_name: str) -> bytes:
    """AFsplit of the LUKS specification: random stripes, and a last one that undoes them."""
    stripes, running = [], bytes(len(key))
    for i in range(STRIPES - 1):
        stripe = hashlib.shake_128(bytes([i & 0xFF, i >> 8])).digest(len(key))
        stripes.append(stripe)
        mixed = bytes(a ^ b for a, b in zip(running, stripe, strict=True))
        running, width = b"", hashlib.new(hash_name).digest_size
        for number, at in enumerate(range(0, len(key), width)):
            piece = mixed[at : at + width]
            running += hashlib.new(hash_name, struct.pack(">I", number) + piece).digest()[
                : len(piece)
            ]
    return b"".join(stripes) + bytes(a ^ b for a, b in zip(running, key, strict=True))


@pytest.mark.parametrize("hash_name", ["sha1", "sha256", "sha512"])
@pytest.mark.parametrize("size", [16, 32, 48, 64])
def test_the_stripes_merge_to_the_key(hash_name: str, size: int) -> None:
    key = bytes(range(size))
    assert luks.merge(bytearray(split(key, hash_name)), size, hash_name) == key


def test_the_passphrase_opens_it(area: bytes) -> None:
    luks.open_luks(area, PASSPHRASE.encode(), "x")


@pytest.mark.parametrize("wrong", [b"", b"Sesame", b"sesame\n", b"sesam"])
def test_another_does_not(area: bytes, wrong: bytes) -> None:
    with pytest.raises(UsageError, match="the passphrase does not open it") as error:
        luks.open_luks(area, wrong, "x")
    assert "esam" not in str(error.value)


def test_a_slot_that_is_not_active_does_not_count(area: bytes) -> None:
    off = patched(area, 208, struct.pack(">I", 0x0000DEAD))
    with pytest.raises(UsageError, match="the passphrase does not open it"):
        luks.open_luks(off, PASSPHRASE.encode(), "x")


def name(text: bytes) -> bytes:
    return text.ljust(32, b"\0")


@pytest.mark.parametrize(
    ("at", "data", "said"),
    [
        (0, b"SKUL", "no LUKS header"),
        (6, b"\0\2", "LUKS version 2"),
        (8, name(b"camellia"), "cipher 'camellia-xts-plain64' is not supported"),
        (8, name(b"cast5"), "cipher 'cast5-xts-plain64' needs blocks of 16 bytes"),
        (8, name(b"\xff\xfe\n"), "is not supported"),
        (40, name(b"gcm-plain64"), "is not supported"),
        (40, name(b"xts-benbi"), "IV generator"),
        (40, name(b"xts"), "IV generator"),
        (40, name(b"xts-essiv"), "the hash of the LUKS cipher"),
        (40, name(b"xts-essiv:sha1"), "makes no key of it"),
        (72, name(b"whirlpool"), "LUKS hash 'whirlpool' is not supported"),
        (72, name(b""), "LUKS hash"),
        (108, struct.pack(">I", 0), "cannot have a key of 0 bytes"),
        (108, struct.pack(">I", 40), "cannot have a key of 40 bytes"),
        (108, struct.pack(">I", 0xFFFFFFFF), "cannot have a key of 4294967295 bytes"),
        (164, struct.pack(">I", 0), "wants no iterations at all"),
        (164, struct.pack(">I", 0xFFFFFFFF), "which would take minutes"),
        (212, struct.pack(">I", 0), "wants no iterations at all"),
        (212, struct.pack(">I", 0xFFFFFFFF), "which would take minutes"),
        (248, struct.pack(">I", 0xFFFFFFFF), "key slot does not fit"),
        (252, struct.pack(">I", 0), "key slot does not fit"),
        (252, struct.pack(">I", 0xFFFFFFFF), "key slot does not fit"),
    ],
)
def test_damage_is_named_in_one_line(area: bytes, at: int, data: bytes, said: str) -> None:
    with pytest.raises(ImageError) as error:
        luks.open_luks(patched(area, at, data), PASSPHRASE.encode(), "some.qcow2")
    assert said in str(error.value)
    assert "some.qcow2" in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("length", [0, 6, 591])
def test_a_header_that_was_cut_short(area: bytes, length: int) -> None:
    with pytest.raises(ImageError, match="no LUKS header"):
        luks.open_luks(area[:length], PASSPHRASE.encode(), "x")


def test_key_material_that_was_cut_short(area: bytes) -> None:
    with pytest.raises(ImageError, match="key slot does not fit"):
        luks.open_luks(area[:100_000], PASSPHRASE.encode(), "x")


def test_damaged_key_material_opens_with_no_passphrase(area: bytes) -> None:
    (offset,) = struct.unpack(">I", area[248:252])
    bad = patched(area, offset * 512 + 1000, b"\xff\0")
    with pytest.raises(UsageError, match="the passphrase does not open it"):
        luks.open_luks(bad, PASSPHRASE.encode(), "x")
