"""Hand-made bad images: which field gets which value, and what has to come of it.

Every image has two snapshots, GOOD and then BAD, on two L2 tables each.  A case changes one field
(or a few bytes) of one of the kinds in :func:`make`.
"""

from __future__ import annotations

import random
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from support import damage, qemu
from support.qemu import KiB

CLUSTER = 1 * KiB
PER_TABLE = CLUSTER // 8  # clusters behind one L2 table
CLUSTERS = 2 * PER_TABLE
SIZE = CLUSTERS * CLUSTER
PACKED = 3  # a compressed cluster of BAD
PLAIN = 20  # a standard one

# What comes of a case.  A range instead: these clusters of BAD give EIO, all others are right.
REFUSED = "the image is refused"
CLOSED = "BAD is refused, GOOD is served"
LISTED = "BAD is not in the table any more, GOOD is served"
SERVED = "everything is served"
NONE = "no snapshot can be read"

ONE_PLAIN, ONE_PACKED = range(PLAIN, PLAIN + 1), range(PACKED, PACKED + 1)
ONE_WIDE = range(1, 2)
TABLE_0, TABLE_1 = range(PER_TABLE), range(PER_TABLE, CLUSTERS)

PAST = damage.END_OF_FILE
B, H, I, Q = ">B", ">H", ">I", ">Q"  # noqa: E741 (struct's own letters)


# --- Where: functions of the image's path, giving a file offset ---

Where = Callable[[Path], int]


def header(at: int) -> Where:
    return lambda path: at


def entry(at: int) -> Where:
    return lambda path: qemu.snapshots(path)["BAD"].entry_offset + at


def l1(index: int) -> Where:
    return lambda path: qemu.snapshots(path)["BAD"].l1_table_offset + 8 * index


def l2(cluster: int) -> Where:
    return lambda path: damage.l2_entry(path, "BAD", cluster * CLUSTER)


def wide_l2(cluster: int, half: int) -> Where:
    """Of an image with extended L2 entries, whose clusters are of 16 KiB."""
    return lambda path: damage.l2_table(path, "BAD", 0) + 16 * cluster + 8 * half


def stream(path: Path) -> int:
    return damage.stream(path, "BAD", PACKED * CLUSTER)[0]


def extension(kind: int, at: int = 0) -> Where:
    """Inside a header extension; 8 is its first byte of data."""
    return lambda path: qemu.peek(path, 0, CLUSTER).index(struct.pack(I, kind)) + at


BACKING = 0xE2792ACA


@dataclass(frozen=True)
class Case:
    name: str
    where: Where
    form: str  # of struct; "" for bytes as they stand
    value: int | bytes | Callable[[int], int]
    outcome: str | range
    said: str = ""  # a regular expression, of the start-up line or of every error
    kind: str = "plain"
    extents_too: bool = True  # whether a request for extents of a lost cluster fails as well

    def apply(self, path: Path) -> None:
        at = self.where(path)
        if isinstance(self.value, bytes):
            data = self.value
        else:
            old = int.from_bytes(qemu.peek(path, at, struct.calcsize(self.form)), "big")
            new = self.value(old) if callable(self.value) else self.value
            data = struct.pack(self.form, new)
        qemu.patch(path, at, data)


def make(directory: Path, kind: str) -> Path:
    """The image, undamaged."""
    path = directory / f"{kind}.qcow2"
    size = 4 * 16 * KiB if kind == "extl2" else SIZE
    options: dict[str, object] = {"cluster_size": CLUSTER}
    backing = None
    if kind == "v2":
        options["compat"] = "0.10"
    elif kind == "zstd":
        options["compression_type"] = "zstd"
    elif kind == "extl2":
        options = {"cluster_size": 16 * KiB, "extended_l2": "on"}
    elif kind == "overlay":
        base = directory / "base.raw"
        base.write_bytes(b"base" * (SIZE // 4))
        backing = ("base.raw", "raw")
    qemu.create(path, size, backing=backing, **options)
    noise = directory / "noise"
    noise.write_bytes(random.Random(kind).randbytes(997).hex().encode())
    qemu.io(path, f"write -P 1 0 {size}")
    qemu.take(path, "GOOD")
    if kind == "extl2":
        qemu.io(path, f"write -s {noise} 0 {size}", "write -z 32k 512")
    else:
        packed = range(8)
        qemu.io(path, *(f"discard {n * CLUSTER} {CLUSTER}" for n in packed))
        qemu.io(path, *(f"write -c -s {noise} {n * CLUSTER} {CLUSTER}" for n in packed))
        qemu.io(path, f"write -s {noise} {8 * CLUSTER} {size - 8 * CLUSTER}", "write -z 50k 3k")
    qemu.take(path, "BAD")
    noise.unlink()
    return path


_HEADER = [
    Case("magic", header(0), B, 0x52, REFUSED, "not a qcow2 image"),
    Case("version-0", header(4), I, 0, REFUSED, "version 0 is not supported"),
    Case("version-1", header(4), I, 1, REFUSED, "version 1 is not supported"),
    Case("version-4", header(4), I, 4, REFUSED, "version 4 is not supported"),
    Case("version-max", header(4), I, 2**32 - 1, REFUSED, "version 4294967295 is not"),
    Case("cluster-bits-0", header(20), I, 0, REFUSED, "cluster_bits is 0"),
    Case("cluster-bits-8", header(20), I, 8, REFUSED, "cluster_bits is 8"),
    Case("cluster-bits-22", header(20), I, 22, REFUSED, "cluster_bits is 22"),
    Case("cluster-bits-63", header(20), I, 63, REFUSED, "cluster_bits is 63"),
    Case("cluster-bits-max", header(20), I, 2**32 - 1, REFUSED, "cluster_bits is 4294967295"),
    Case("crypt-3", header(32), I, 3, REFUSED, "encryption method 3 is unknown"),
    Case("crypt-max", header(32), I, 2**32 - 1, REFUSED, "encryption method 4294967295"),
    Case("crypt-aes", header(32), I, 1, REFUSED, r"is encrypted: add passphrase="),
    Case("crypt-luks", header(32), I, 2, REFUSED, r"is encrypted: add passphrase="),
    Case("incompatible-corrupt", header(79), B, 2, REFUSED, "marked corrupt"),
    Case("incompatible-dirty", header(79), B, 1, SERVED),
    Case("incompatible-bit-5", header(79), B, 0x20, REFUSED, r"not supported: bit 5$"),
    Case("incompatible-bit-63", header(72), B, 0x80, REFUSED, r"not supported: bit 63$"),
    Case("incompatible-all", header(72), Q, 2**64 - 1, REFUSED, "marked corrupt"),
    Case("incompatible-many", header(72), Q, 2**64 - 32, REFUSED, r"bit 5, bit 6, .*, bit 63$"),
    Case("incompatible-data-file", header(79), B, 4, REFUSED, "not name its external data file"),
    Case("incompatible-extl2", header(79), B, 16, REFUSED, "extended L2 .* need clusters of 16 K"),
    Case("compatible-all", header(80), Q, 2**64 - 1, SERVED),
    Case("autoclear-all", header(88), Q, 2**64 - 1, SERVED),
    Case("refcount-order-7", header(96), I, 7, SERVED),
    Case("refcount-order-max", header(96), I, 2**32 - 1, SERVED),
    Case("header-length-0", header(100), I, 0, REFUSED, "header_length is 0"),
    Case("header-length-103", header(100), I, 103, REFUSED, "header_length is 103"),
    Case("header-length-past", header(100), I, CLUSTER + 1, REFUSED, "header_length is 1025"),
    Case("header-length-max", header(100), I, 2**32 - 1, REFUSED, "header_length is 4294967295"),
    Case("compression-1", header(104), B, 1, REFUSED, "type 1 without its feature bit"),
    Case("compression-255", header(104), B, 255, REFUSED, "type 255 without its feature bit"),
    Case("compression-2", header(104), B, 2, REFUSED, "type 2 is not supp", "zstd"),
    Case("active-size-max", header(24), Q, 2**64 - 1, SERVED),
    Case("active-l1-size-max", header(36), I, 2**32 - 1, SERVED),
    Case("active-l1-offset", header(40), Q, 2**63, SERVED),
    Case("refcounts-offset", header(48), Q, 2**64 - 1, SERVED),
    Case("refcounts-clusters", header(56), I, 2**32 - 1, SERVED),
]

_TABLE = [
    Case("count-0", header(60), I, 0, NONE, "it has none"),
    Case("count-1", header(60), I, 1, LISTED, "it has 1 'GOOD'$"),
    Case("count-3", header(60), I, 3, SERVED),  # zeros parse as an entry without a name
    Case("count-65537", header(60), I, 65537, NONE, "it has 65537 entries, more than 65536"),
    Case("count-max", header(60), I, 2**32 - 1, NONE, "it has 4294967295 entries"),
    Case("table-at-0", header(64), Q, 0, NONE, "its offset 0x0 is not one of a cluster"),
    Case("table-in-header", header(64), Q, 512, NONE, "offset 0x200 is not one of a cluster"),
    Case("table-unaligned", header(64), Q, 0x1001, NONE, "offset 0x1001 is not one of a cluster"),
    Case("table-past", header(64), Q, PAST, NONE, "lies past the end of the file"),
    Case("table-2^63", header(64), Q, 2**63, NONE, "lies past the end of the file"),
    Case("table-max", header(64), Q, 2**64 - CLUSTER, NONE, "lies past the end of the file"),
    Case("entry-l1-at-0", entry(0), Q, 0, CLOSED, "L1 table's offset 0x0 is not one"),
    Case("entry-l1-unaligned", entry(0), Q, 0x1008, CLOSED, "L1 table's offset 0x1008 is not"),
    Case("entry-l1-past", entry(0), Q, PAST, CLOSED, "L1 table.* lies past the end of the file"),
    Case("entry-l1-2^63", entry(0), Q, 2**63, CLOSED, "L1 table.* lies past the end"),
    Case("entry-l1-max", entry(0), Q, 2**64 - CLUSTER, CLOSED, "L1 table.* lies past the end"),
    Case("entry-l1-size-32M", entry(8), I, (4 << 20) + 1, CLOSED, "larger than 32 MiB"),
    Case("entry-l1-size-max", entry(8), I, 2**32 - 1, CLOSED, "larger than 32 MiB"),
    Case("entry-l1-size-past", entry(8), I, 1 << 20, CLOSED, "lies past the end of the file"),
    Case("entry-l1-size-1", entry(8), I, 1, TABLE_1, "L1 table of 1 entries covers only 131072"),
    Case("entry-id-long", entry(12), H, 0xFFFF, LISTED, "entry 2 of 2 at host offset"),
    Case("entry-name-long", entry(14), H, 0xFFFF, LISTED, "entry 2 of 2 at host offset"),
    Case("entry-extra-1025", entry(36), I, 1025, LISTED, "1025 bytes of extra data, more than"),
    Case("entry-extra-max", entry(36), I, 2**32 - 1, LISTED, "4294967295 bytes of extra data"),
    Case("entry-size-max", entry(48), Q, 2**64 - 1, CLOSED, "size of 18446744073709551615 bytes"),
    Case("entry-size-2^63", entry(48), Q, 2**63, CLOSED, "size of 9223372036854775808 bytes is"),
    Case("entry-vmstate-max", entry(40), Q, 2**64 - 1, CLOSED, "is impossible"),
    Case("entry-dates", entry(16), Q, 2**64 - 1, SERVED),
    Case("entry-clock", entry(24), Q, 2**64 - 1, SERVED),
    Case("entry-icount", entry(56), Q, 2**63, SERVED),
]

_MAPPING = [
    Case("l1-past", l1(0), Q, PAST, TABLE_0, "L2 table at host offset 0x1.* is past the end"),
    Case("l1-farthest", l1(1), Q, (1 << 56) - CLUSTER, TABLE_1, "is past the end of the file"),
    Case("l1-unaligned", l1(0), Q, 0x1200, TABLE_0, "L1 entry 0 is invalid: 0x0000000000001200"),
    Case("l1-reserved-low", l1(1), Q, lambda e: e | 1, TABLE_1, "L1 entry 1 is invalid"),
    Case("l1-reserved-high", l1(1), Q, lambda e: e | 1 << 56, TABLE_1, "L1 entry 1 is invalid"),
    Case("l1-compressed", l1(1), Q, lambda e: e | 1 << 62, TABLE_1, "L1 entry 1 is invalid"),
    Case("l1-all-ones", l1(0), Q, 2**64 - 1, TABLE_0, "L1 entry 0 is invalid"),
    Case("l1-copied", l1(0), Q, lambda e: e ^ 1 << 63, SERVED),
    Case("l2-past", l2(PLAIN), Q, PAST, ONE_PLAIN, "data cluster .* lies past the end"),
    Case("l2-farthest", l2(PLAIN), Q, (1 << 56) - CLUSTER, ONE_PLAIN, "lies past the end"),
    Case("l2-unaligned", l2(PLAIN), Q, lambda e: e | 512, ONE_PLAIN, "unaligned host offset"),
    Case("l2-reserved-low", l2(PLAIN), Q, lambda e: e | 2, ONE_PLAIN, "reserved bits set"),
    Case("l2-reserved-high", l2(PLAIN), Q, lambda e: e | 1 << 61, ONE_PLAIN, "reserved bits"),
    Case("l2-zero-reserved", l2(PLAIN), Q, lambda e: e | 5, ONE_PLAIN, "reserved bits set"),
    Case("l2-copied", l2(PLAIN), Q, lambda e: e ^ 1 << 63, SERVED),
    Case("l2-zero-in-v2", l2(PLAIN), Q, lambda e: e | 1, ONE_PLAIN, "unknown to version 2", "v2"),
    Case("l2-all-ones", l2(PLAIN), Q, 2**64 - 1, ONE_PLAIN, "compressed cluster .* lies past"),
    Case(
        "wide-reserved",
        wide_l2(1, 0),
        Q,
        lambda e: e | 1,
        ONE_WIDE,
        "reserved bits set",
        "extl2",
    ),
    Case("wide-both", wide_l2(1, 1), Q, 1 << 32 | 1, ONE_WIDE, "both data and zero", "extl2"),
    Case("wide-no-host", wide_l2(1, 0), Q, 0, ONE_WIDE, "data without a host offset", "extl2"),
    Case("wide-past", wide_l2(1, 0), Q, PAST, ONE_WIDE, "lies past the end of the file", "extl2"),
]

_STREAMS = [
    Case("packed-past", l2(PACKED), Q, 1 << 62 | PAST, ONE_PACKED, "lies past the end"),
    Case("packed-at-0", l2(PACKED), Q, 1 << 62 | 3 << 60, ONE_PACKED, "0x0 is in the header"),
    Case("packed-in-header", l2(PACKED), Q, 1 << 62 | 700, ONE_PACKED, "0x2bc is in the header"),
    Case(
        "packed-cut", l2(PACKED), Q, lambda e: e & (1 << 60) - 1 | 1 << 62, ONE_PACKED,
        "stream .*ends", extents_too=False),
    Case(
        "packed-garbage", stream, "", b"\xff" * 16, ONE_PACKED, "deflate stream is damaged",
        extents_too=False),
    Case(
        "packed-stored-block", stream, "", b"\x01\x04\0\xfb\xff1234", ONE_PACKED,
        "ends after 4 of 1024|ends too early", extents_too=False),
    Case(
        "packed-endless", stream, "", b"\x00\x00\xf8\xff\x07", ONE_PACKED,
        "damaged|ends|goes on", extents_too=False),
    Case(
        "zstd-magic", stream, "", b"\0", ONE_PACKED, "zstd frame is damaged", "zstd",
        extents_too=False),
    Case(
        "zstd-window", stream, "", b"\x28\xb5\x2f\xfd\0\xff", ONE_PACKED, "zstd frame is damag",
        "zstd", extents_too=False),
    Case(
        "zstd-skippable", stream, "", b"\x50\x2a\x4d\x18\xff\xff\xff\xff", ONE_PACKED,
        "zstd|ends after 0", "zstd", extents_too=False),
]  # fmt: skip

_BACKING = [
    Case("name-long", header(16), I, 1024, REFUSED, "does not fit in the first cl", "overlay"),
    Case("name-max", header(16), I, 2**32 - 1, REFUSED, "does not fit in the first", "overlay"),
    Case("name-in-header", header(8), Q, 8, REFUSED, "0x8 overlaps the header", "overlay"),
    Case("name-past", header(8), Q, CLUSTER - 1, REFUSED, "does not fit in the first", "overlay"),
    Case("name-offset-max", header(8), Q, 2**64 - 1, REFUSED, "does not fit in the f", "overlay"),
    Case("extension-max", extension(BACKING, 4), I, 2**32 - 1, REFUSED, "not fit", "overlay"),
    Case("extension-long", extension(BACKING, 4), I, CLUSTER, REFUSED, "not fit", "overlay"),
    Case("format-long", extension(BACKING, 4), I, 16, REFUSED, "has 16 bytes, too", "overlay"),
    Case(
        "format-vmdk", extension(BACKING, 8), "", b"vmd", REFUSED, "only raw and qcow2", "overlay"
    ),
    Case("format-control", extension(BACKING, 8), "", b"\n\x1b\0", REFUSED, r"\\n\\x1b", "overlay"),
]

CASES = [*_HEADER, *_TABLE, *_MAPPING, *_STREAMS, *_BACKING]
