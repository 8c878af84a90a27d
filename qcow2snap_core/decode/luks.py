"""LUKS version 1: from a passphrase to the key of the disk (LUKS On-Disk Format 1.2.3).

The header holds eight key slots.  An active one keeps the master key, split into 4000 stripes so
that a disk that remaps one bad sector cannot keep a usable copy, and encrypted with a key that
PBKDF2 makes of the passphrase.  A digest in the header tells whether the key that came out is
the right one.  QEMU puts this header where the image's "crypto header" extension says.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Final, NamedTuple

from construct import Array, Bytes, Int16ub, Int32ub, Struct

from ..errors import ImageError, UsageError, shown
from ..format.ondisk import MAX_LUKS_ITERATIONS
from . import gcrypt
from .ciphers import (
    SECTOR,
    CbcSectors,
    CtrSectors,
    EcbSectors,
    Essiv,
    IvGenerator,
    Plain,
    SectorCipher,
)
from .native import make_cipher
from .xts import XtsSectors

MAGIC: Final = b"LUKS\xba\xbe"

_KEY_SLOT: Final = Struct(
    "active" / Int32ub,
    "iterations" / Int32ub,
    "salt" / Bytes(32),
    "key_material_offset" / Int32ub,  # in sectors
    "stripes" / Int32ub,
)
_HEADER: Final = Struct(
    "magic" / Bytes(6),
    "version" / Int16ub,
    "cipher_name" / Bytes(32),
    "cipher_mode" / Bytes(32),
    "hash_spec" / Bytes(32),
    "payload_offset" / Int32ub,  # in sectors; QEMU's qcow2 has the payload in its clusters
    "key_bytes" / Int32ub,
    "mk_digest" / Bytes(20),
    "mk_digest_salt" / Bytes(32),
    "mk_digest_iterations" / Int32ub,
    "uuid" / Bytes(40),
    "key_slots" / Array(8, _KEY_SLOT),
)
HEADER_LENGTH: Final = 592
_ACTIVE: Final = 0x00AC71F3

_STRIPES: Final = 4000  # the only number that QEMU and cryptsetup write

_KEY_SIZES: Final = (16, 24, 32)
_HASHES: Final = ("md5", "sha1", "sha224", "sha256", "sha384", "sha512", "ripemd160")


class CipherChoice(NamedTuple):
    """What cipher_name, cipher_mode and hash_spec say, made sure of."""

    name: str  # aes, serpent, twofish or cast5
    mode: str  # xts, cbc, ctr or ecb
    generator: str  # plain, plain64 or essiv
    essiv_hash: str

    def make(self, key: bytes) -> SectorCipher:
        bits = 32 if self.generator == "plain" else 64
        essiv_key = _hash(self.essiv_hash, key) if self.generator == "essiv" else None
        if self.name != "aes":
            return gcrypt.GcryptSectors(self.name, self.mode, key, bits, essiv_key)
        native = make_cipher(self.mode, key, bits, essiv_key)
        if native is not None:
            return native
        if self.mode == "ecb":
            return EcbSectors(key)
        generator: IvGenerator = Plain(bits) if essiv_key is None else Essiv(essiv_key)
        kinds: dict[str, Callable[[bytes, IvGenerator], SectorCipher]] = {
            "xts": XtsSectors,
            "cbc": CbcSectors,
            "ctr": CtrSectors,
        }
        return kinds[self.mode](key, generator)


def open_luks(area: bytes, passphrase: bytes, path: str) -> SectorCipher:
    """The cipher of the disk whose LUKS header, with its key slots, is ``area``.

    Raises UsageError when no key slot opens with the passphrase, ImageError for a header that is
    damaged or asks for what is not supported.
    """

    def bad(why: str) -> ImageError:
        return ImageError(f"{shown(path)}: {why}")

    if len(area) < HEADER_LENGTH or area[:6] != MAGIC:
        raise bad("there is no LUKS header where it should be")
    h = _HEADER.parse(area)
    if h.version != 1:
        raise bad(f"LUKS version {h.version} is not supported, only 1 is")
    hash_name = _name(h.hash_spec)
    if not _available(hash_name):
        raise bad(f"the LUKS hash {shown(h.hash_spec.rstrip(bytes(1)))} is not supported")
    cipher = parse_cipher(_name(h.cipher_name), _name(h.cipher_mode), h.key_bytes)
    if isinstance(cipher, str):
        raise bad(cipher)
    if cipher.name != "aes" and not gcrypt.available():
        raise bad(f"its LUKS cipher is {cipher.name}: install libgcrypt20 (Fedora: libgcrypt)")
    iterations = 0

    for slot in h.key_slots:
        if slot.active != _ACTIVE:
            continue
        material = area[slot.key_material_offset * SECTOR :][: h.key_bytes * _STRIPES]
        if slot.stripes != _STRIPES or len(material) < h.key_bytes * _STRIPES:
            raise bad("a LUKS key slot does not fit in the header")
        iterations += slot.iterations + h.mk_digest_iterations
        if not slot.iterations or not h.mk_digest_iterations:
            raise bad("a LUKS key slot wants no iterations at all")
        if iterations > MAX_LUKS_ITERATIONS:
            raise bad(f"its LUKS key slots want {iterations} iterations, which would take minutes")
        slot_key = hashlib.pbkdf2_hmac(
            hash_name, passphrase, slot.salt, slot.iterations, h.key_bytes
        )
        # Encrypted in sectors of its own, numbered from 0; the last one is padded.
        split = bytearray(material) + bytes(-len(material) % SECTOR)
        cipher.make(slot_key).decrypt(memoryview(split), 0)
        key = merge(split[: len(material)], h.key_bytes, hash_name)
        digest = hashlib.pbkdf2_hmac(
            hash_name, key, h.mk_digest_salt, h.mk_digest_iterations, len(h.mk_digest)
        )
        if digest == h.mk_digest:
            return cipher.make(key)
    raise UsageError(f"{shown(path)}: the passphrase does not open it: give another one")


def parse_cipher(name: str, mode_spec: str, key_bytes: int) -> CipherChoice | str:
    """The cipher, or what is wrong with it."""
    mode, _, generator = mode_spec.partition("-")
    generator, _, essiv_hash = generator.partition(":")
    described = shown(f"{name}-{mode_spec}")
    if name not in ("aes", *gcrypt.NAMES) or mode not in ("xts", "cbc", "ctr", "ecb"):
        return (
            f"the LUKS cipher {described} is not supported, only AES, Serpent, Twofish and CAST5 "
            f"in XTS, CBC, CTR or ECB are"
        )
    if mode != "ecb" and generator not in ("plain", "plain64", "essiv"):
        return f"the IV generator of the LUKS cipher {described} is not supported"
    if generator == "essiv" and not _available(essiv_hash):
        return f"the hash of the LUKS cipher {described} is not supported"
    essiv_bytes = hashlib.new(essiv_hash).digest_size if generator == "essiv" else None
    if essiv_bytes not in (None, *_KEY_SIZES):
        return f"the hash of the LUKS cipher {described} makes no key of it"
    if key_bytes not in (2 * size if mode == "xts" else size for size in _KEY_SIZES):
        return f"the LUKS cipher {described} cannot have a key of {key_bytes} bytes"
    if name != "aes":
        bits = key_bytes * 8 // (2 if mode == "xts" else 1)
        wrong = gcrypt.wrong_with(name, mode, bits, essiv_bytes and essiv_bytes * 8)
        if wrong:
            return f"the LUKS cipher {described} {wrong}"
    return CipherChoice(name, mode, generator, essiv_hash)


def merge(split: bytearray, size: int, hash_name: str) -> bytes:
    """The master key out of its stripes (AFmerge): each is mixed into a running block, which is
    diffused by the hash before the next; the last one is not."""
    block = 0
    for i in range(_STRIPES - 1):
        stripe = int.from_bytes(split[i * size : (i + 1) * size], "big")
        mixed = (block ^ stripe).to_bytes(size, "big")
        block = int.from_bytes(_diffuse(mixed, hash_name), "big")
    last = int.from_bytes(split[(_STRIPES - 1) * size : _STRIPES * size], "big")
    return (block ^ last).to_bytes(size, "big")


def _diffuse(block: bytes, hash_name: str) -> bytes:
    step = hashlib.new(hash_name).digest_size
    pieces = (block[at : at + step] for at in range(0, len(block), step))
    return b"".join(
        _hash(hash_name, i.to_bytes(4, "big") + piece)[: len(piece)]
        for i, piece in enumerate(pieces)
    )


def _hash(name: str, data: bytes) -> bytes:
    return hashlib.new(name, data).digest()


def _available(name: str) -> bool:
    if name not in _HASHES:
        return False
    try:
        hashlib.new(name)
    except ValueError:  # OpenSSL keeps ripemd160 in its legacy provider
        return False
    return True


def _name(padded: bytes) -> str:
    return padded.split(b"\0", 1)[0].decode("ascii", "replace")
