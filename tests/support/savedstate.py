"""States of machines as savevm writes them, made by hand, and put into an image."""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence
from pathlib import Path

from support import qemu
from support.differential.steps import vm_state

PAGE = 4096
ZERO, MEM_SIZE, DATA, EOS, CONTINUE, XBZRLE, HOOK, COMPRESSED, MULTIFD = (
    *(0x02, 0x04, 0x08, 0x10, 0x20, 0x40, 0x80, 0x100, 0x200),
)
START, PART, END, FULL, COMMAND = 1, 2, 3, 4, 8
RAM_ID = 2


def put_state(image: Path, name: str, state: bytes, size: int | None = None) -> None:
    """Take a snapshot with that state, in the way in which savevm does; ``size`` is what is
    recorded of it, if that is less."""
    padded = image.with_name("state")
    padded.write_bytes(state.ljust(-(-len(state) // 512) * 512, b"\0"))
    qemu.io(image, f"write -b -s {padded} 0 {padded.stat().st_size}")
    padded.unlink()
    qemu.take(image, name)
    vm_state(str(image), name, str(size or len(state)))


def be(size: int, number: int) -> bytes:
    return number.to_bytes(size, "big")


def counted(name: str) -> bytes:
    return be(1, len(name)) + name.encode()


def head(machine: str | None = "pc-i440fx-7.2", more: bytes = b"") -> bytes:
    """The header and the configuration, with subsections behind the machine's name."""
    said = b"QEVM" + be(4, 3)
    if machine is None:
        return said
    return said + b"\x07" + be(4, len(machine)) + machine.encode() + more


def subsection(name: str, content: bytes) -> bytes:
    return b"\x05" + counted(name) + be(4, 1) + content


def section(kind: int, content: bytes, name: str = "ram", number: int = RAM_ID) -> bytes:
    """A section with its footer."""
    named = counted(name) + be(4, 0) + be(4, 4) if kind in (START, FULL) else b""
    return be(1, kind) + be(4, number) + named + content + b"\x7e" + be(4, number)


def block_list(blocks: Sequence[tuple[str, int]], total: int | None = None) -> bytes:
    total = sum(size for _, size in blocks) if total is None else total
    listed = b"".join(counted(name) + be(8, size) for name, size in blocks)
    return be(8, total | MEM_SIZE) + listed


def page(offset: int, content: bytes, kind: int = DATA, block: str | None = None) -> bytes:
    """``block`` None: the same as before."""
    if block is None:
        return be(8, offset | kind | CONTINUE) + content
    return be(8, offset | kind) + counted(block) + content


def zeros(offsets: Iterable[int]) -> bytes:
    return b"".join(page(offset, b"\0", ZERO) for offset in offsets)


EOS_WORD = struct.pack(">Q", EOS)


def state(
    blocks: Sequence[tuple[str, int]],
    parts: Sequence[bytes],
    machine: str | None = "pc-i440fx-7.2",
    more: bytes = b"",
) -> bytes:
    """A state whose last part is the RAM's end, with something behind it."""
    said = head(machine, more) + section(START, block_list(blocks) + EOS_WORD)
    for n, part in enumerate(parts, 1):
        said += section(END if n == len(parts) else PART, part + EOS_WORD)
    return said + section(FULL, b"whatever", "timer", 0) + b"\0"


ALIGNED = 1 << 20
MAPPED_RAM = subsection("configuration/capabilities", be(4, 1) + counted("mapped-ram"))


def mapped_header(bitmap: int, pages: int, version: int = 1, page_size: int = PAGE) -> bytes:
    return be(4, version) + be(8, page_size) + be(8, bitmap) + be(8, pages)


def mapped(blocks: Sequence[tuple[str, dict[int, bytes], int]], section_: bytes = b"") -> bytes:
    """A state in the form mapped-ram, of blocks with some pages by their number, and their sizes;
    where a page is zero there is something else, as it need not have been written."""
    total = sum(size for _, _, size in blocks)
    said = head("pc-q35-11.0", MAPPED_RAM) + be(1, START) + be(4, RAM_ID) + counted("ram")
    said += be(4, 0) + be(4, 4) + be(8, total | MEM_SIZE)
    for name, pages, size in blocks:
        said += counted(name) + be(8, size)
        bits = sum(1 << n for n in pages)
        bitmap = bits.to_bytes(-(-size // PAGE // 64) * 8, "little")
        at = len(said) + 28
        first = -(-(at + len(bitmap)) // ALIGNED) * ALIGNED
        said += mapped_header(at, first) + bitmap
        said = said.ljust(first, b"\0")
        said += b"".join(pages.get(n, b"old!" * (PAGE // 4)) for n in range(size // PAGE))
    said += EOS_WORD + b"\x7e" + be(4, RAM_ID)
    said += section(PART, section_ + EOS_WORD) + section(END, EOS_WORD)
    return said + section(FULL, b"whatever", "timer", 0) + b"\0"
