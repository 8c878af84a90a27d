"""ACPI tables that were made by hand: what they say of the memory, and what says nothing.

What QEMU's own ones say is compared with QEMU in tests/e2e/test_memory.py.
"""

from __future__ import annotations

import random
import struct

import pytest

from qcow2snap_core.memory.acpi import AcpiTables
from qcow2snap_core.memory.blocks import PAGE, Block, Run
from qcow2snap_core.memory.places import ABOVE_1T, ABOVE_4G

GiB = 1 << 30
FACS = b"FACS" + (64).to_bytes(4, "little") + bytes(56)
BLOCK = Block("/rom@etc/acpi/tables", 4 * PAGE)


def table(signature: bytes, content: bytes, length: int | None = None) -> bytes:
    length = 36 + len(content) if length is None else length
    return (signature + length.to_bytes(4, "little")).ljust(36, b"\0") + content


def memory(address: int, size: int = GiB, flags: int = 1) -> bytes:
    return struct.pack("<BBIHQQIIQ", 1, 40, 0, 0, address, size, 0, flags, 0)


PROCESSOR = bytes((0, 16)) + bytes(14)


def srat(*entries: bytes) -> bytes:
    return table(b"SRAT", bytes(12) + b"".join(entries))


def window(first: int, length: int = 32 * GiB, **but: int) -> bytes:
    numbers = {"granularity": 0, "last": first + length - 1, "translation": 0, "length": length}
    numbers.update(but)
    granularity, last, translation, length = numbers.values()
    said = struct.pack("<QQQQQ", granularity, first, last, translation, length)
    return b"\x8a\x2b\x00\x00\x0c\x03" + said


def dsdt(*parts: bytes) -> bytes:
    return table(b"DSDT", b"aml".join((b"", *parts, b"")))


def told(*tables: bytes, size: int = 2 * GiB, block: Block = BLOCK) -> int | None:
    blocks = [Block("pc.ram", PAGE), block]
    found = AcpiTables(blocks)
    content = b"".join((FACS, *tables)).ljust(4 * PAGE, b"\0")
    found.note(Run(0, 0, PAGE, b"x" * PAGE))
    found.note(Run(1, 0, 4 * PAGE, b"old!" * PAGE))
    found.note(Run(1, 0, 4 * PAGE, None))
    for at in range(0, 4 * PAGE, PAGE):
        found.note(Run(1, at, PAGE, content[at : at + PAGE]))
    return found.above_4g(size)


LOW_ENTRIES = (memory(0, 640 << 10), memory(1 << 20, 2 * GiB))


@pytest.mark.parametrize(
    ("tables", "expected"),
    [
        ([dsdt(window(ABOVE_4G + 2 * GiB))], ABOVE_4G),
        ([dsdt(window(ABOVE_1T - 32 * GiB))], ABOVE_4G),
        ([dsdt(window(ABOVE_1T + 2 * GiB))], ABOVE_1T),
        ([dsdt(window(7 << 40), window(6 * GiB))], ABOVE_4G),
        ([dsdt(window(6 * GiB)), srat(*LOW_ENTRIES, PROCESSOR, memory(ABOVE_1T))], ABOVE_1T),
        ([dsdt(window(7 << 40)), srat(memory(6 * GiB), memory(ABOVE_4G))], ABOVE_4G),
        ([srat(memory(5 * GiB, flags=3), memory(6 * GiB, 0), memory(ABOVE_1T))], ABOVE_1T),
        ([srat(memory(5 * GiB, flags=0), memory(ABOVE_1T))], ABOVE_1T),
        ([srat(*LOW_ENTRIES), dsdt(window(6 * GiB))], ABOVE_4G),
        ([srat(memory(ABOVE_4G)), srat(memory(ABOVE_1T))], ABOVE_4G),
        # What tells nothing.
        ([], None),
        ([dsdt()], None),
        ([dsdt(window(7 << 40))], None),
        ([dsdt(window(ABOVE_4G))], None),
        ([dsdt(window(ABOVE_1T))], None),
        ([dsdt(window(2 * GiB))], None),
        ([dsdt(window(6 * GiB, length=GiB, last=8 * GiB))], None),
        ([dsdt(window(6 * GiB, translation=1))], None),
        ([dsdt(window(6 * GiB, granularity=1))], None),
        ([srat(*LOW_ENTRIES)], None),
        ([srat(bytes(40), memory(ABOVE_1T))], None),
        ([srat(memory(ABOVE_1T)[:39])], None),
        ([table(b"SRAT", b"")], None),
        ([table(b"XXXX", b"", 0), srat(memory(ABOVE_1T))], None),
        ([table(b"XXXX", b"", 5 * PAGE), srat(memory(ABOVE_1T))], None),
    ],
)
def test_what_tables_tell(tables: list[bytes], expected: int | None) -> None:
    assert told(*tables) == expected


def test_other_blocks_are_no_tables() -> None:
    assert told(srat(memory(ABOVE_1T)), block=BLOCK._replace(name="/rom@etc/acpi/rsdp")) is None
    assert told(srat(memory(ABOVE_1T)), block=BLOCK._replace(size=1 << 30)) is None


def test_any_byte_may_be_wrong() -> None:
    rng = random.Random(8)
    good = dsdt(window(6 * GiB)) + srat(PROCESSOR, *LOW_ENTRIES, memory(ABOVE_4G))
    for _ in range(2000):
        broken = bytearray(good)
        for _ in range(rng.randrange(1, 6)):
            broken[rng.randrange(len(broken))] = rng.choice((0, 1, 36, 40, 255, rng.getrandbits(8)))
        found = told(bytes(broken))
        assert found is None or found >= ABOVE_4G
