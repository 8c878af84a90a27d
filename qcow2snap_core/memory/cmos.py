"""What a machine says itself of its memory.

A PC tells its firmware through the memory of its clock how much RAM lies below and above 4 GiB
(QEMU: pc_cmos_init).  That memory is saved with the clock's state; where, says the description of
all device states at the end of a saved state (docs/devel/migration, scripts/analyze-migration.py in
QEMU's sources): they are counted from there backwards, and each has its name where it should be.

The guest can write to it.  So it is no authority, but it agrees with what places has found, or
somebody has to look.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from itertools import islice
from typing import Any, Final, NamedTuple

_FULL: Final = b"\x04"
_FOOTER: Final = b"\x7e"
_END: Final = b"\x00\x06"  # of the device states, and the description's mark

_MOST_DESCRIPTION: Final = 16 << 20  # bytes; that of a large machine has one
_MOST_STATES: Final = 64 << 20  # bytes, with the description
_MOST_MARKS: Final = 1000  # that are looked at
_CLOCK: Final = b"mc146818rtc"
_REGISTERS: Final = 128
_UNIT: Final = 64 << 10
_FIRST: Final = 16 << 20  # what is below it is in other registers

#: (length, offset): bytes of a saved state.
Read = Callable[[int, int], bytes]


class Cmos(NamedTuple):
    """Bytes of memory, in units of 64 KiB."""

    below_4g: int  # 0: 16 MiB at the most
    above_4g: int

    def agrees(self, below_4g: int, above_4g: int) -> bool:
        """Whether a machine with so much memory would say this."""
        below = below_4g // _UNIT * _UNIT if below_4g > _FIRST else 0
        return self == (below, above_4g // _UNIT * _UNIT)


def read_cmos(read: Read, size: int) -> Cmos | None:
    """From a saved state of so many bytes; None if it does not say."""
    found = _description(read, size)
    if found is None:
        return None
    description, end = found
    try:
        at = _clock(read, description, end)
    except (_OddError, RecursionError):
        return None
    if at is None:
        return None
    registers = read(_REGISTERS, at)
    below = int.from_bytes(registers[0x34:0x36], "little")
    above = int.from_bytes(registers[0x5B:0x5E], "little")
    return Cmos(_FIRST + below * _UNIT if below else 0, above * _UNIT)


def find_end(read: Read, start: int, limit: int) -> int | None:
    """Where a state ends whose device states begin at ``start``, if its size does not say that; it
    has to be before ``limit``."""
    data = read(min(limit - start, _MOST_STATES), start)
    for mark in islice(re.finditer(rb"\x00\x06(.{4})\{", data, re.DOTALL), _MOST_MARKS):
        end = mark.end() - 1 + int.from_bytes(mark[1], "big")
        if end <= len(data) and data[end - 1 : end] == b"}":
            return start + end
    return None


class _OddError(Exception):
    """A description that describes nothing."""


def _description(read: Read, size: int) -> tuple[Any, int] | None:
    """(the description, the offset of the device states' end)."""
    length = min(size, _MOST_DESCRIPTION)
    tail = read(length, size - length)
    # JSON has no such byte: so the last one is in its length, or is the states' end.
    last = tail.rfind(b"\x00")
    for end in range(max(0, last - 5), last + 1):
        begin = end + len(_END) + 4
        said = int.from_bytes(tail[end + len(_END) : begin], "big")
        if tail.startswith(_END, end) and said == length - begin:
            try:
                return json.loads(tail[begin:]), size - length + end
            except (ValueError, RecursionError):
                return None
    return None


def _clock(read: Read, description: Any, end: int) -> int | None:
    """The offset of the clock's registers."""
    for device in reversed(_list(description, "devices")):
        name = _name(device)
        length = _fields(device, end) + _subsections(device, end)
        state = end - len(_FOOTER) - 4 - length
        header = 1 + 4 + 1 + len(name) + 4 + 4
        begin = state - header
        if begin < 0:
            raise _OddError
        there = read(header, begin)
        footer = _FOOTER + there[1:5]
        if there[:1] != _FULL or there[5 : 6 + len(name)] != bytes([len(name) & 0xFF]) + name:
            raise _OddError
        if read(len(footer), state + length) != footer:
            raise _OddError
        if name == _CLOCK:
            first = _list(device, "fields")[:1]
            if not first or _get(first[0], "name", str) != "cmos_data" or length < _REGISTERS:
                raise _OddError
            return state
        end = begin
    return None


def _fields(owner: Any, most: int) -> int:
    """The bytes of all fields of a state.  QEMU: vmsd_desc_field_start and vmsd_desc_field_end."""
    total = 0
    for field in _list(owner, "fields"):
        size = _get(field, "size", int)
        total += size * (_get(field, "array_len", int) if "array_len" in field else 1)
        if not 0 <= total <= most:
            raise _OddError
    return total


def _subsections(owner: Any, most: int) -> int:
    """Those of its subsections, each with a mark, its name and its version."""
    total = 0
    for each in _list(owner, "subsections") if "subsections" in owner else ():
        total += 1 + 1 + len(_get(each, "vmsd_name", str)) + 4
        total += _fields(each, most) + _subsections(each, most)
    return total


def _name(device: Any) -> bytes:
    name: str = _get(device, "name", str)
    if not name.isascii():  # JSON can say what no encoding has: half of a surrogate pair
        raise _OddError
    return name.encode()


def _get(owner: Any, key: str, kind: type) -> Any:
    if not isinstance(owner, dict) or not isinstance(owner.get(key), kind):
        raise _OddError
    return owner[key]


def _list(owner: Any, key: str) -> list[Any]:
    found: list[Any] = _get(owner, key, list)
    return found
