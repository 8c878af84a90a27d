"""What the bytes of a qcow2 file mean: structures, bit masks and limits, all in one place.

The names are those of QEMU's docs/interop/qcow2.txt ("the spec") and block/qcow2.h.  All numbers
in the file are big-endian.  Nothing here reads a file or judges a value; that is done where a
value is used, with the limits below.
"""

from __future__ import annotations

import struct
import sys
from array import array
from types import SimpleNamespace

from ..typed import Any, Final


class Layout:
    """A structure: its fields in their order, big-endian and without gaps.

    This and not a construct.Struct for what is read at every start of a server: to import construct
    takes longer than all of the rest.  tests/format/test_ondisk.py holds both to the same fields.
    """

    def __init__(self, **codes: str) -> None:
        """``codes``: the type of each field, as the module struct writes it."""
        self.codes = codes
        packed = struct.Struct(">" + "".join(codes.values()))
        self.length: Final = packed.size  # bytes
        #: ``unpack(raw)``: the values of exactly that many bytes, as a tuple
        self.unpack = packed.unpack

    def parse(self, raw: bytes) -> Any:
        """The values under their names; ``raw`` may be longer."""
        return SimpleNamespace(
            **dict(zip(self.codes, self.unpack(raw[: self.length]), strict=True))
        )


U16: Final = "H"
U32: Final = "I"
U64: Final = "Q"

# --- The header (spec: "Header") -------------------------------------------------------------

MAGIC: Final = b"QFI\xfb"
HEADER_V2: Final = Layout(
    magic="4s",
    version=U32,
    backing_file_offset=U64,
    backing_file_size=U32,
    cluster_bits=U32,
    size=U64,
    crypt_method=U32,
    l1_size=U32,
    l1_table_offset=U64,
    refcount_table_offset=U64,
    refcount_table_clusters=U32,
    nb_snapshots=U32,
    snapshots_offset=U64,
)

HEADER_V3: Final = Layout(
    incompatible_features=U64,
    compatible_features=U64,
    autoclear_features=U64,
    refcount_order=U32,
    header_length=U32,
)

HEADER_V2_LENGTH: Final = HEADER_V2.length
#: "the minimum header_length for version 3"
HEADER_V3_LENGTH: Final = HEADER_V2.length + HEADER_V3.length

# cluster_bits and size of the active disk: what reading the snapshot table needs of the header.
ACTIVE_OFFSET: Final = 20
ACTIVE_LENGTH: Final = 12

# nb_snapshots and snapshots_offset: the twelve bytes that QEMU rewrites for every snapshot
# taken or deleted (qcow2_write_snapshots).
SNAPSHOT_FIELDS_OFFSET: Final = 60
SNAPSHOT_FIELDS: Final = Layout(nb_snapshots=U32, snapshots_offset=U64)
SNAPSHOT_FIELDS_LENGTH: Final = SNAPSHOT_FIELDS.length

INCOMPAT_DIRTY: Final = 1 << 0
INCOMPAT_CORRUPT: Final = 1 << 1
INCOMPAT_DATA_FILE: Final = 1 << 2
INCOMPAT_COMPRESSION: Final = 1 << 3
INCOMPAT_EXTL2: Final = 1 << 4

AUTOCLEAR_BITMAPS: Final = 1 << 0
AUTOCLEAR_DATA_FILE_RAW: Final = 1 << 1

COMPRESSION_ZLIB: Final = 0
COMPRESSION_ZSTD: Final = 1

CRYPT_NONE: Final = 0
CRYPT_AES: Final = 1
CRYPT_LUKS: Final = 2

# --- Header extensions (spec: "Header extensions") ---------------------------------------------

EXTENSION: Final = Layout(type=U32, length=U32)
EXTENSION_LENGTH: Final = EXTENSION.length

EXT_END: Final = 0x00000000
EXT_BACKING_FORMAT: Final = 0xE2792ACA
EXT_FEATURE_TABLE: Final = 0x6803F857
EXT_CRYPTO_HEADER: Final = 0x0537BE77
EXT_DATA_FILE: Final = 0x44415441
EXT_BITMAPS: Final = 0x23852875

# The extensions that are read, and how long each may be: whatever it names is in error lines too.
MAX_EXTENSION_BYTES: Final = {
    EXT_BACKING_FORMAT: 15,  # as in QEMU
    EXT_FEATURE_TABLE: 192 * 48,  # every bit of the three kinds of feature
    EXT_CRYPTO_HEADER: 16,
    EXT_DATA_FILE: 4095,  # PATH_MAX
    EXT_BITMAPS: 4095,  # 24 in fact; a wrong one concerns `qcow2snap check` alone
}

CRYPTO_HEADER: Final = Layout(offset=U64, length=U64)

# A row of the feature name table: kind of feature, bit number, name padded with NUL.
FEATURE_NAME_LENGTH: Final = 48

# --- The snapshot table (spec: "Snapshots") ----------------------------------------------------

SNAPSHOT_HEAD: Final = Layout(
    l1_table_offset=U64,
    l1_size=U32,
    id_str_size=U16,
    name_size=U16,
    date_sec=U32,
    date_nsec=U32,
    vm_clock_nsec=U64,
    vm_state_size=U32,
    extra_data_size=U32,
)
SNAPSHOT_HEAD_LENGTH: Final = SNAPSHOT_HEAD.length

# What of the extra data this reader knows; each part may be missing, more may follow.
EXTRA_VM_STATE_SIZE: Final = slice(0, 8)
EXTRA_DISK_SIZE: Final = slice(8, 16)
EXTRA_ICOUNT: Final = slice(16, 24)
ICOUNT_NONE: Final = 2**64 - 1

# --- L1 and L2 entries (spec: "Cluster mapping") -----------------------------------------------

OFLAG_COPIED: Final = 1 << 63  # refcount is one; QEMU flips it in place on a live image
OFLAG_COMPRESSED: Final = 1 << 62
OFLAG_ZERO: Final = 1 << 0
OFFSET_MASK: Final = 0x00FF_FFFF_FFFF_FE00  # bits 9 to 55 of an L1 or standard L2 entry

L1_ENTRY_SIZE: Final = 8
L2_ENTRY_SIZE: Final = 8  # an extended one is twice as long
SUBCLUSTERS: Final = 32  # per cluster, with extended L2 entries

SECTOR: Final = 512

# --- Limits: what QEMU allows, and what a larger number in a hostile image would cost ----------

MIN_CLUSTER_BITS: Final = 9
MAX_CLUSTER_BITS: Final = 21  # a larger cluster would make every table and decode buffer huge
MIN_EXTL2_CLUSTER_BITS: Final = 14  # subclusters of a sector
MAX_L1_BYTES: Final = 32 << 20  # QCOW_MAX_L1_SIZE: memory and time to walk the table
MAX_SNAPSHOTS: Final = 65536  # QCOW_MAX_SNAPSHOTS: entries to parse
MAX_SNAPSHOT_TABLE_BYTES: Final = 64 << 20  # QCOW_MAX_SNAPSHOTS_SIZE: memory for the table
MAX_EXTRA_DATA_BYTES: Final = 1024  # QCOW_MAX_SNAPSHOT_EXTRA_DATA: 4 GiB for one entry
MAX_SNAPSHOT_TEXT_BYTES: Final = 16 << 20  # memory of all IDs and names, which may have 64 KiB each
MAX_TABLE_SECONDS: Final = 0.5  # CPU for reading again a large table that is damaged at its end
MAX_BACKING_NAME: Final = 1023  # spec: "must not be longer than 1023 bytes"
MAX_EXTENSIONS: Final = 64  # a cluster of 2 MiB holds 262,144 empty ones
MAX_CHAIN: Final = 200  # open files and recursion; QEMU itself has no limit
MAX_LUKS_BYTES: Final = 16 << 20  # memory for key slots; QEMU's own header is 2 MiB
MAX_LUKS_ITERATIONS: Final = 1 << 26  # of all slots: half a minute; cryptsetup's slot is 2 seconds
MAX_LOOKUPS: Final = 1 << 18  # of a read: in clusters of 512 bytes they may take a second of CPU
MAX_EXTENT_LOOKUPS: Final = 1 << 15  # of a request for extents, which may be answered in part
MAX_DISK_SIZE: Final = 2**63 - 512  # what NBD can say, in whole sectors


def integers(raw: bytes | bytearray, kind: str = "Q") -> array[int]:
    """The numbers of a table, as an array of that type; a last one that is cut short is dropped."""
    numbers = array(kind)
    numbers.frombytes(memoryview(raw)[: len(raw) // numbers.itemsize * numbers.itemsize])
    if sys.byteorder == "little":
        numbers.byteswap()
    return numbers
