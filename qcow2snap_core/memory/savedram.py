"""The RAM in a saved state.

savevm writes a migration stream (QEMU: migration/savevm.c, migration/ram.c):

    QEVM, version 3
    configuration       the machine's type, and capabilities that change what follows
    ram, start          the RAM blocks with their lengths
    ram, part …         pages, each with its place in a block; 0 to many of these sections
    ram, end            the last pages
    device states       one section each
    the end, and a description of the device states in JSON

No section has a length: only who knows what is in one can find its end.  The RAM is self-contained
up to the end of its last section, so nothing else has to be understood for it, and nothing behind
it is read here.  What comes in between from anything but the RAM is refused, since it could not be
left out without guessing; on a PC that is memory of virtio-mem, passed-through devices, and disks
or bitmaps that are migrated too, which savevm does not do.

savevm stops the machine, and so sends each page once, as a rule; but a page may come again, when a
device has written to it meanwhile, and then the last one counts.  A page that is zero is sent as
well, as a mark.  So a page that never comes is no zero page, but one that is lost.

All that is read is checked: whether a block is known, and a page inside of it; whether lengths add
up to what is announced; and what is announced against the state's own size.

There is another form for the pages, :mod:`.mappedram`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from ..errors import ImageError, shown
from ..util.interrupts import raise_if_interrupted
from ..util.units import binary
from .blocks import MOST_BLOCKS, MOST_RAM, PAGE, Block, Run
from .mappedram import Mapped, mapped_runs, read_header
from .pages import FLAGS, MEM_SIZE, Pages
from .stream import Stream

_MAGIC: Final = b"QEVM"
_VERSION: Final = 3

# migration/savevm.h, migration/qemu-file-types.h
_START: Final = 0x01
_PART: Final = 0x02
_END: Final = 0x03
_FULL: Final = 0x04
_SUBSECTION: Final = 0x05
_CONFIGURATION: Final = 0x07
_COMMAND: Final = 0x08
_FOOTER: Final = 0x7E

_RAM: Final = "ram"
_RAM_VERSION: Final = 4

_LEAST: Final = 8 + 1  # a zero page
_MOST_CAPABILITIES: Final = 1000

#: Commands with which a stream does not become another, and the bytes that belong to them
#: (QEMU's enum qemu_vm_cmd): open-return-path, ping, switchover-start.
_COMMANDS: Final = {1: 0, 2: 4, 11: 0}

_IGNORE_SHARED: Final = "x-ignore-shared"
_MAPPED_RAM: Final = "mapped-ram"


class SavedRam:
    """The RAM in a stream: its blocks at once, its pages as they come."""

    def __init__(self, stream: Stream) -> None:
        """Read up to the pages.  Raises ImageError for what is damaged or not understood."""
        self._stream = stream
        if stream.take(4) != _MAGIC or stream.number(4) != _VERSION:
            raise ImageError(f"{stream.name} is no migration stream of version 3")
        #: the machine's type; None if it was saved without, as types before 2.4 are
        self.machine: str | None = None
        self._is_mapped = False
        self._mapped: list[Mapped] = []
        if stream.peek() == _CONFIGURATION:
            stream.take(1)
            self._configuration()
        self._section = self._start()
        self.blocks = self._block_list()
        self._pages = Pages(stream, self.blocks)
        self._footers: bool | None = None
        #: where the device states begin, if that is known before all pages have been read
        self.end: int | None = None
        if self._is_mapped:
            for _ in self._sections():
                raise stream.damaged("a page in a section, where each should have its place")
            self.end = stream.offset

    def runs(self) -> Iterator[Run]:
        """All pages, in the order in which they were sent; once.  Raises ImageError, also when the
        stream ends before the RAM does."""
        if self._is_mapped:
            return mapped_runs(self._stream, self.blocks, self._mapped)
        return self._sections()

    # --- Sections ---

    def _sections(self) -> Iterator[Run]:
        """The pages in the sections, from within the first to the end of the last."""
        kind = _START
        while True:
            raise_if_interrupted()  # there may be sections without end, and no page in any
            yield from self._pages.runs()
            self._footer()
            if kind == _END:
                return
            kind = self._next()

    def _configuration(self) -> None:
        """QEMU: vmstate_configuration."""
        stream = self._stream
        self.machine = stream.text(stream.number(4))
        while stream.peek() == _SUBSECTION:
            stream.take(1)
            name = stream.text()
            stream.number(4)
            if name == "configuration/target-page-bits":
                if 1 << min(stream.number(4), 63) != PAGE:
                    raise ImageError(f"{stream.name} has other pages than x86: only that is read")
            elif name == "configuration/capabilities":
                self._capabilities()
            elif name == "configuration/uuid":
                stream.take(16)
            else:
                raise ImageError(f"{stream.name} has a configuration that is not known: {name}")

    def _capabilities(self) -> None:
        stream = self._stream
        count = stream.number(4)
        if count > _MOST_CAPABILITIES:
            raise stream.damaged(f"{count} capabilities")
        for _ in range(count):
            name = stream.text()
            if name == _IGNORE_SHARED:
                raise ImageError(
                    f"{stream.name} was saved without the memory that is shared with other "
                    f"programs ({name})"
                )
            self._is_mapped = self._is_mapped or name == _MAPPED_RAM

    def _start(self) -> int:
        """The RAM's first section, without its content; returns its number."""
        stream = self._stream
        while (kind := stream.number(1)) == _COMMAND:
            self._command()
        if kind not in (_START, _FULL):
            raise stream.damaged(f"a section of type {kind:#x} before the RAM")
        section, name = stream.number(4), stream.text()
        _, version = stream.number(4), stream.number(4)
        if kind != _START or name != _RAM:
            raise self._foreign(name)
        if version != _RAM_VERSION:
            raise ImageError(f"{stream.name} has RAM of version {version}: only 4 is read")
        return section

    def _footer(self) -> None:
        """The end of a section; with machine types before 2.4 none has one."""
        stream = self._stream
        there = stream.peek() == _FOOTER
        if self._footers is None:
            self._footers = there
        if not self._footers:
            return
        if stream.number(1) != _FOOTER or stream.number(4) != self._section:
            raise stream.damaged("a section of the RAM that does not end where it should")

    def _next(self) -> int:
        """On to the next section of the RAM; returns its type."""
        stream = self._stream
        while (kind := stream.number(1)) == _COMMAND:
            self._command()
        if kind in (_START, _FULL):
            stream.number(4)
            raise self._foreign(stream.text())
        if kind not in (_PART, _END):
            raise stream.damaged(f"a section of type {kind:#x} before the RAM's end")
        if stream.number(4) != self._section:
            raise stream.damaged("a part of another section than the RAM's")
        return kind

    def _command(self) -> None:
        stream = self._stream
        command, length = stream.number(2), stream.number(2)
        if _COMMANDS.get(command) != length:
            raise ImageError(
                f"{stream.name} has the command {command} of a live migration, which is not read"
            )
        stream.take(length)

    def _foreign(self, name: str) -> ImageError:
        return ImageError(
            f"{self._stream.name} has the state of {shown(name)} before the end of its RAM: it "
            f"does not say how long that is"
        )

    # --- The RAM ---

    def _block_list(self) -> tuple[Block, ...]:
        stream = self._stream
        word = stream.number(8)
        total = word & ~FLAGS
        if word & FLAGS != MEM_SIZE:
            raise stream.damaged("the RAM does not begin with its blocks")
        if not self._is_mapped and total // PAGE * _LEAST > stream.size:
            raise ImageError(
                f"{stream.name} has {stream.size} bytes, which cannot be the {total // PAGE} "
                f"pages that it announces"
            )
        if total > MOST_RAM:
            raise ImageError(
                f"{stream.name} has {binary(total)} of RAM: no more than {binary(MOST_RAM)} is read"
            )
        blocks: dict[str, int] = {}
        left = total
        while left:
            raise_if_interrupted()
            if len(blocks) == MOST_BLOCKS:
                raise stream.damaged(f"more than {MOST_BLOCKS} RAM blocks")
            name, size = stream.text(), stream.number(8)
            if name in blocks:
                raise stream.damaged(f"RAM block {shown(name)} comes twice")
            if not 0 < size <= left or size % PAGE:
                raise stream.damaged(f"RAM block {shown(name)} of {size} bytes, with {left} to go")
            blocks[name] = size
            left -= size
            if self._is_mapped:
                self._mapped.append(read_header(stream, Block(name, size)))
        return tuple(Block(name, size) for name, size in blocks.items())
