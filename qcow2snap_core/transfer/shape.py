"""What is the same for all of a new image, and the header that says it."""

from __future__ import annotations

import os
import struct
from typing import Final, NamedTuple

from ..errors import UsageError, shown
from ..format import ondisk as q

_HEADER_LENGTH: Final = 112  # with the compression type and its padding


class Shape(NamedTuple):
    """What is the same for all of an image."""

    cluster_bits: int
    extended_l2: bool = False
    compression: int = q.COMPRESSION_ZLIB
    backing_file: bytes = b""
    backing_format: bytes = b""

    @property
    def cluster_size(self) -> int:
        return 1 << self.cluster_bits

    def over(self, backing: tuple[str, str] | None) -> Shape:
        """The same over a backing file, of which the name and the format are given."""
        name, form = backing or ("", "")
        return self._replace(backing_file=os.fsencode(name), backing_format=form.encode())

    @property
    def entry_words(self) -> int:
        """64-bit words of an L2 entry."""
        return 2 if self.extended_l2 else 1

    @property
    def l2_entries(self) -> int:
        """Entries of an L2 table."""
        return self.cluster_size // (q.L2_ENTRY_SIZE * self.entry_words)

    @property
    def bytes_per_l1_entry(self) -> int:
        """Guest bytes behind one L1 entry."""
        return self.l2_entries * self.cluster_size


def header(shape: Shape, path: str, **fields: int) -> bytes:
    """What an image begins with; ``fields`` are those that its content decides, ``path`` is for
    error lines.  Raises UsageError when there is no room for the backing file's name."""
    incompatible = q.INCOMPAT_EXTL2 if shape.extended_l2 else 0
    if shape.compression != q.COMPRESSION_ZLIB:
        incompatible |= q.INCOMPAT_COMPRESSION
    extensions = b""
    if shape.backing_format:
        extensions += struct.pack(">II", q.EXT_BACKING_FORMAT, len(shape.backing_format))
        extensions += shape.backing_format + bytes(-len(shape.backing_format) % 8)
    extensions += struct.pack(">II", q.EXT_END, 0)
    name = shape.backing_file
    known = dict(
        magic=q.MAGIC,
        version=3,
        backing_file_offset=_HEADER_LENGTH + len(extensions) if name else 0,
        backing_file_size=len(name),
        cluster_bits=shape.cluster_bits,
        crypt_method=q.CRYPT_NONE,
        incompatible_features=incompatible,
        compatible_features=0,
        autoclear_features=0,
        header_length=_HEADER_LENGTH,
        **fields,
    )
    raw = b"".join(
        struct.pack(f">{code}", known[field])
        for layout in (q.HEADER_V2, q.HEADER_V3)
        for field, code in layout.codes.items()
    )
    raw += bytes([shape.compression]).ljust(_HEADER_LENGTH - len(raw), b"\0")
    raw += extensions + name
    if len(raw) > shape.cluster_size:
        raise UsageError(
            f"the name of the backing file, {shown(os.fsdecode(name))}, does not fit into the "
            f"first cluster of {shown(path)}"
        )
    return raw
