"""RAM blocks, and runs of their pages."""

from __future__ import annotations

from typing import Final, NamedTuple

PAGE: Final = 4096  # of x86
MOST_RAM: Final = 1 << 43  # bytes, of all blocks: of each page there is a note
MOST_BLOCKS: Final = 4096


class Block(NamedTuple):
    """A RAM block of QEMU's."""

    name: str
    size: int  # bytes


class Run(NamedTuple):
    """Pages that lie together in a block."""

    block: int  # its number
    offset: int  # in the block
    length: int
    data: bytes | None  # None: zeros
