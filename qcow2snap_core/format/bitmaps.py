"""Where an image keeps persistent dirty bitmaps (spec: "Bitmaps").

A directory lists the bitmaps; each has a table, whose entries lead to clusters of bits.  Nothing
here reads the bits: a check has to know which clusters they are in, since nothing else may be.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from construct import Int8ub, Int16ub, Int32ub, Int64ub, Struct

from ..errors import ImageError, shown
from ..storage.local import Storage
from . import ondisk as q
from .header import Header

#: (what it is, host offset, length in bytes)
Area = tuple[str, int, int]

# The content of the header extension.
_EXTENSION: Final = Struct(
    "nb_bitmaps" / Int32ub,
    "reserved" / Int32ub,
    "directory_size" / Int64ub,
    "directory_offset" / Int64ub,
)
_EXTENSION_LENGTH: Final = 24

# The beginning of an entry in the directory; extra data and the name follow, and padding to a
# multiple of eight bytes.
_HEAD: Final = Struct(
    "table_offset" / Int64ub,
    "table_size" / Int32ub,
    "flags" / Int32ub,
    "type" / Int8ub,
    "granularity_bits" / Int8ub,
    "name_size" / Int16ub,
    "extra_data_size" / Int32ub,
)
_HEAD_LENGTH: Final = 24

_MAX_DIRECTORY_BYTES: Final = 64 << 20  # QCOW2_MAX_BITMAP_DIRECTORY_SIZE: memory to hold it
_TABLE_BYTES: Final = 64 << 10  # of a table that are held at a time


def areas(storage: Storage, header: Header) -> Iterator[Area]:
    """The directory, the tables and the clusters of bits.

    Raises ImageError where they cannot be believed; StorageError.
    """
    extension = header.extensions.get(q.EXT_BITMAPS)
    if extension is None or not header.autoclear & q.AUTOCLEAR_BITMAPS:
        return  # some program that knows no bitmaps has written: QEMU ignores them as well
    if len(extension) != _EXTENSION_LENGTH:
        raise ImageError(f"the bitmaps' header extension has {len(extension)} bytes")
    place = _EXTENSION.parse(extension)
    offset, size = place.directory_offset, place.directory_size
    if not place.nb_bitmaps or not 0 < size <= _MAX_DIRECTORY_BYTES:
        raise ImageError(
            f"{place.nb_bitmaps} bitmaps in a directory of {size} bytes are impossible"
        )
    yield "the bitmap directory", offset, size
    directory = storage.read(size, offset)
    if len(directory) < size:
        raise ImageError(f"the bitmap directory at host offset {offset:#x} is past the file's end")
    yield from _bitmaps(storage, directory, place.nb_bitmaps, header.cluster_size)


def _bitmaps(storage: Storage, directory: bytes, count: int, cluster: int) -> Iterator[Area]:
    at = 0
    for number in range(count):
        if at + _HEAD_LENGTH > len(directory):
            raise ImageError(f"the bitmap directory ends before bitmap {number + 1} of {count}")
        head = _HEAD.parse(directory[at : at + _HEAD_LENGTH])
        end = at + _HEAD_LENGTH + head.extra_data_size + head.name_size
        if end > len(directory):
            raise ImageError(f"the bitmap directory ends inside bitmap {number + 1} of {count}")
        what = f"bitmap {shown(directory[end - head.name_size : end])}"
        if head.table_size:
            yield f"the table of {what}", head.table_offset, head.table_size * 8
            for entry in _entries(storage, head.table_offset, head.table_size, what):
                if entry & q.OFFSET_MASK:
                    yield what, entry & q.OFFSET_MASK, cluster
        at = end + -end % 8
    if at < len(directory):
        raise ImageError(f"the bitmap directory goes on behind its {count} bitmaps")


def _entries(storage: Storage, offset: int, count: int, what: str) -> Iterator[int]:
    step = _TABLE_BYTES // 8
    for first in range(0, count, step):
        size = min(step, count - first) * 8
        raw = storage.read(size, offset + first * 8)
        if len(raw) < size:
            raise ImageError(f"the table of {what} is past the file's end")
        for entry in q.integers(raw):
            flag = 0 if entry & q.OFFSET_MASK else 1  # without a cluster: all ones
            if entry & ~q.OFFSET_MASK & ~flag:
                raise ImageError(f"the table of {what} has reserved bits set: {entry:#018x}")
            yield entry
