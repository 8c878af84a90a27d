"""The header of a qcow2 file and its extensions, checked (spec: "Header", "Header extensions").

Only what reading snapshots needs is judged here.  The refcounts, the active L1 table and the
dirty bit may be in any state: a snapshot does not depend on them, and a damaged image is where a
snapshot is needed most.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from ..errors import ImageError, shown
from ..storage.local import Storage
from ..typed import NamedTuple
from . import ondisk as q

Bad = Callable[[str], ImageError]  # names the file and says what is wrong with it


class Header(NamedTuple):
    """What the header says; offsets and sizes in bytes."""

    version: int
    cluster_bits: int
    size: int  # of the active disk
    crypt_method: int
    l1_size: int  # entries of the active L1 table
    l1_table_offset: int
    refcount_table_offset: int
    refcount_table_clusters: int
    refcount_bits: int
    header_length: int
    incompatible: int
    autoclear: int
    compression: int
    backing_file: bytes | None
    extensions: dict[int, bytes]

    @property
    def cluster_size(self) -> int:
        return 1 << self.cluster_bits

    @property
    def extended_l2(self) -> bool:
        return bool(self.incompatible & q.INCOMPAT_EXTL2)

    @property
    def dirty(self) -> bool:
        return bool(self.incompatible & q.INCOMPAT_DIRTY)

    @property
    def has_data_file(self) -> bool:
        return bool(self.incompatible & q.INCOMPAT_DATA_FILE)

    @property
    def crypto_area(self) -> tuple[int, int] | None:
        """(host offset, length) of the LUKS header, if it says where that is."""
        where = self.extensions.get(q.EXT_CRYPTO_HEADER, b"")
        if len(where) < q.CRYPTO_HEADER.length:
            return None
        place = q.CRYPTO_HEADER.parse(where)
        return place.offset, place.length

    @property
    def backing_format(self) -> str | None:
        """As the image records it, or None."""
        recorded = self.extensions.get(q.EXT_BACKING_FORMAT)
        return None if recorded is None else recorded.decode("utf-8", "surrogateescape")


def read_header(storage: Storage) -> Header:
    """Raises ImageError for what is not qcow2, is damaged, or needs a feature that is unknown."""

    def bad(why: str) -> ImageError:
        return ImageError(f"{shown(storage.path)}: {why}")

    # A file without a size may be one of /proc, and never end.
    start = storage.read(q.HEADER_V3_LENGTH + 8, 0) if storage.size() else b""
    header = _fixed_fields(start, bad)
    name, name_offset = _backing_file(storage, header, start, bad)
    end = name_offset or header.cluster_size
    area = storage.read(max(0, end - header.header_length), header.header_length)
    header = header._replace(backing_file=name, extensions=dict(_extensions(area, bad)))
    _check_features(header, bad)
    return header


def _fixed_fields(start: bytes, bad: Bad) -> Header:
    """What stands at fixed places, in the first bytes of the file."""
    if start[:4] != q.MAGIC:
        raise bad("not a qcow2 image (qemu-img info tells what it is)")
    if len(start) < q.HEADER_V2_LENGTH:
        raise bad(f"the file ends inside the qcow2 header, after {len(start)} bytes")
    v2 = q.HEADER_V2.parse(start)
    if v2.version not in (2, 3):
        raise bad(f"qcow2 version {v2.version} is not supported, only 2 and 3 are")
    if not q.MIN_CLUSTER_BITS <= v2.cluster_bits <= q.MAX_CLUSTER_BITS:
        raise bad(f"cluster_bits is {v2.cluster_bits}, the format allows 9 to 21")
    if v2.crypt_method not in (q.CRYPT_NONE, q.CRYPT_AES, q.CRYPT_LUKS):
        raise bad(f"encryption method {v2.crypt_method} is unknown")
    header = Header(
        version=v2.version,
        cluster_bits=v2.cluster_bits,
        size=v2.size,
        crypt_method=v2.crypt_method,
        l1_size=v2.l1_size,
        l1_table_offset=v2.l1_table_offset,
        refcount_table_offset=v2.refcount_table_offset,
        refcount_table_clusters=v2.refcount_table_clusters,
        refcount_bits=16,
        header_length=q.HEADER_V2_LENGTH,
        incompatible=0,
        autoclear=0,
        compression=q.COMPRESSION_ZLIB,
        backing_file=None,
        extensions={},
    )
    if v2.version == 2:
        return header
    if len(start) < q.HEADER_V3_LENGTH:
        raise bad(f"the file ends inside the qcow2 header, after {len(start)} bytes")
    v3 = q.HEADER_V3.parse(start[q.HEADER_V2_LENGTH :])
    if not q.HEADER_V3_LENGTH <= v3.header_length <= header.cluster_size:
        raise bad(f"header_length is {v3.header_length}, which is not from 104 to a cluster")
    longer = v3.header_length > q.HEADER_V3_LENGTH and len(start) > q.HEADER_V3_LENGTH
    return header._replace(
        refcount_bits=1 << min(v3.refcount_order, 63),
        header_length=v3.header_length,
        incompatible=v3.incompatible_features,
        autoclear=v3.autoclear_features,
        compression=start[q.HEADER_V3_LENGTH] if longer else q.COMPRESSION_ZLIB,
    )


def _backing_file(
    storage: Storage, header: Header, start: bytes, bad: Bad
) -> tuple[bytes | None, int]:
    """The backing file's name, and where that is or 0."""
    v2 = q.HEADER_V2.parse(start)
    offset, size = v2.backing_file_offset, v2.backing_file_size
    if not offset:
        return None, 0
    if size > q.MAX_BACKING_NAME or offset + size > header.cluster_size:
        raise bad(
            f"the backing file's name ({size} bytes at {offset:#x}) "
            f"does not fit in the first cluster"
        )
    if offset < header.header_length and size:
        raise bad(f"the backing file's name at {offset:#x} overlaps the header")
    name = storage.read(size, offset) or None
    if name is not None and len(name) < size:
        raise bad("the file ends inside the backing file's name")
    return name, offset


_SUPPORTED = q.INCOMPAT_DIRTY | q.INCOMPAT_DATA_FILE | q.INCOMPAT_COMPRESSION | q.INCOMPAT_EXTL2


def _check_features(header: Header, bad: Bad) -> None:
    if header.incompatible & q.INCOMPAT_CORRUPT:
        raise bad(
            "the image is marked corrupt, its tables may not be what they say: "
            "run qemu-img check -r all on a copy of it"
        )
    unknown = header.incompatible & ~_SUPPORTED
    if unknown:
        names = ", ".join(_feature_name(header, bit) for bit in range(64) if unknown >> bit & 1)
        raise bad(f"it needs features that are not supported: {names}")
    if header.compression != q.COMPRESSION_ZLIB and not (
        header.incompatible & q.INCOMPAT_COMPRESSION
    ):
        raise bad(f"compression type {header.compression} without its feature bit")
    if header.compression not in (q.COMPRESSION_ZLIB, q.COMPRESSION_ZSTD):
        raise bad(f"compression type {header.compression} is not supported")
    if header.extended_l2 and header.cluster_bits < q.MIN_EXTL2_CLUSTER_BITS:
        raise bad(f"extended L2 entries need clusters of 16 KiB, not of {header.cluster_size}")


def _extensions(area: bytes, bad: Bad) -> Iterator[tuple[int, bytes]]:
    at = 0
    for _ in range(q.MAX_EXTENSIONS):
        if at + q.EXTENSION_LENGTH > len(area):
            return
        ext = q.EXTENSION.parse(area[at : at + q.EXTENSION_LENGTH])
        if ext.type == q.EXT_END:
            return
        at += q.EXTENSION_LENGTH
        if at + ext.length > len(area):
            raise bad(f"header extension {ext.type:#010x} of {ext.length} bytes does not fit")
        if ext.length > q.MAX_EXTENSION_BYTES.get(ext.type, ext.length):
            raise bad(f"header extension {ext.type:#010x} has {ext.length} bytes, too many")
        if ext.type in q.MAX_EXTENSION_BYTES:  # a chain of 200 could have 2 MiB of others each
            yield ext.type, area[at : at + ext.length]
        at += -(-ext.length // 8) * 8
    raise bad(f"more than {q.MAX_EXTENSIONS} header extensions")


def _feature_name(header: Header, bit: int) -> str:
    """What the image itself calls an incompatible feature (spec: "Feature name table")."""
    table = header.extensions.get(q.EXT_FEATURE_TABLE, b"")
    for at in range(0, len(table) - q.FEATURE_NAME_LENGTH + 1, q.FEATURE_NAME_LENGTH):
        if table[at] == 0 and table[at + 1] == bit:
            name = table[at + 2 : at + q.FEATURE_NAME_LENGTH].split(b"\0", 1)[0]
            return f"{shown(name)} (bit {bit})"
    return f"bit {bit}"
