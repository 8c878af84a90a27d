"""The header of an ELF file that has memory in it, as QEMU's dump-guest-memory writes it.

Every part of the memory is a segment, of which its physical address is known and no other; a
debugger wants processors' registers besides, which are not here.  Whoever looks for what is at an
address (volatility3, drgn, makedumpfile) needs no more.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Final

from ..errors import UsageError
from .places import Placed

# System V ABI: Elf64_Ehdr, Elf64_Phdr
_HEADER: Final = struct.Struct("<16sHHIQQQIHHHHHH")
_SEGMENT: Final = struct.Struct("<IIQQQQQQ")
_IDENT: Final = b"\x7fELF" + bytes((2, 1, 1))  # 64 bits, little-endian, version 1
_CORE: Final = 4
_X86_64: Final = 62
_LOAD: Final = 1
_ALIGNED: Final = 1 << 16  # so that holes of pages are holes in the file
_MOST: Final = 0xFFFE  # segments


def elf_header(placed: Sequence[Placed]) -> tuple[bytes, list[int]]:
    """(the header, the offset in the file of each place).  Raises UsageError."""
    if len(placed) > _MOST:
        raise UsageError("the memory has too many parts for an ELF file: write a raw one")
    offsets = []
    size = _HEADER.size + len(placed) * _SEGMENT.size
    at = -(-size // _ALIGNED) * _ALIGNED
    segments = []
    for place in placed:
        offsets.append(at)
        length = place.length
        segments.append(_SEGMENT.pack(_LOAD, 0, at, 0, place.address, length, length, 0))
        at += length
    header = _HEADER.pack(
        _IDENT,
        _CORE,
        _X86_64,
        1,
        0,
        _HEADER.size,
        0,
        0,
        _HEADER.size,
        _SEGMENT.size,
        len(placed),
        0,
        0,
        0,
    )
    return header + b"".join(segments), offsets
