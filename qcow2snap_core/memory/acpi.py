"""Where a PC has the memory above 4 GiB, by the ACPI tables that QEMU made for it.

Where the processor is AMD's, QEMU (machine types from 7.1 on) has all of it at 1 TiB instead of
4 GiB as soon as anything could reach 1010 GiB, where such machines have their HyperTransport
(pc_memory_init and pc_max_used_gpa in hw/i386/pc.c): the memory, what ``maxmem`` leaves room for,
or the PCI devices' 64-bit window, ``pci-hole64-size``, behind both.  A state says nothing of these,
nor of the processor.  But the tables for the firmware are a RAM block of their own, which the guest
cannot write to (acpi_setup and acpi_build in hw/i386/acpi-build.c):

- the SRAT, which a machine has with NUMA nodes or with slots for memory, has the address;
- the DSDT has that 64-bit window, which lies behind all memory.  If it is below 1 TiB, the memory
  is too.  If it begins shortly behind 1 TiB, so does the memory.  Anywhere else it says nothing:
  the window begins with the first device, and firmware may put these to the end of what the
  processor can address (OVMF does, at seven eighths).
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator, Sequence
from typing import Final

from .blocks import Block, Run
from .places import ABOVE_1T, ABOVE_4G

_NAME: Final = "/rom@etc/acpi/tables"
_SHORTLY_BEHIND: Final = ABOVE_1T * 3 // 2
_MOST: Final = 16 << 20  # bytes; QEMU makes 128 KiB to 2 MiB

# ACPI specification: 5.2.6 System Description Table Header, 5.2.16.2 Memory Affinity Structure,
# 6.4.3.5.1 QWord Address Space Descriptor
_TABLE: Final = struct.Struct("<4sI28x")
_SRAT_HEADER: Final = _TABLE.size + 12
_MEMORY: Final = struct.Struct("<BB6xQQ4xI8x")
_MEMORY_TYPE: Final = 1
_ENABLED: Final = 1
_HOT_PLUGGABLE: Final = 2
_WINDOW: Final = re.compile(rb"\x8a\x2b\x00\x00..(.{40})", re.DOTALL)
_WINDOW_NUMBERS: Final = struct.Struct("<QQQQQ")


class AcpiTables:
    """The block of the tables, of which the pages are gathered as they come."""

    def __init__(self, blocks: Sequence[Block]) -> None:
        self._block = None
        self._content = bytearray()
        for n, block in enumerate(blocks):
            if block.name == _NAME and block.size <= _MOST:
                self._block, self._content = n, bytearray(block.size)

    def note(self, run: Run) -> None:
        """Take what belongs to the tables."""
        if run.block == self._block:
            content = run.data or bytes(run.length)
            self._content[run.offset : run.offset + run.length] = content

    def above_4g(self, size: int) -> int | None:
        """The address of the memory above 4 GiB, of which there are so many bytes; None if they do
        not tell."""
        # The first of a kind: a user's own (-acpitable) come behind QEMU's.
        tables = dict(reversed([*_tables(bytes(self._content))]))
        if (found := _memory(tables.get(b"SRAT", b""))) is not None:
            return found
        window = min(_windows(tables.get(b"DSDT", b"")), default=0)
        if ABOVE_4G + size <= window < ABOVE_1T:
            return ABOVE_4G
        return ABOVE_1T if ABOVE_1T + size <= window < _SHORTLY_BEHIND else None


def _tables(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    """(signature, table), one behind the other as QEMU puts them."""
    at = 0
    while at + _TABLE.size <= len(data):
        signature, length = _TABLE.unpack_from(data, at)
        if length < _TABLE.size or at + length > len(data):
            return
        yield signature, data[at : at + length]
        at += length


def _memory(srat: bytes) -> int | None:
    """The lowest address above 4 GiB of memory that is no plugged one."""
    found = []
    at = _SRAT_HEADER
    while at + 2 <= len(srat) and srat[at + 1] >= 2:
        kind, length = srat[at], srat[at + 1]
        if (kind, length) == (_MEMORY_TYPE, _MEMORY.size) and at + length <= len(srat):
            _, _, address, size, flags = _MEMORY.unpack_from(srat, at)
            if flags & (_ENABLED | _HOT_PLUGGABLE) == _ENABLED and size and address >= ABOVE_4G:
                found.append(address)
        at += length
    return min(found, default=None)


def _windows(dsdt: bytes) -> Iterator[int]:
    """Where the windows above 4 GiB begin.  They are in AML, which need not be understood for it:
    no other bytes look like one, whose numbers have to agree."""
    for match in _WINDOW.finditer(dsdt):
        granularity, first, last, translation, length = _WINDOW_NUMBERS.unpack(match[1])
        if not granularity and not translation and first >= ABOVE_4G and length == last - first + 1:
            yield first
