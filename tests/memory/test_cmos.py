"""Descriptions of device states that were made by hand: what describes nothing says nothing."""

from __future__ import annotations

import json
from typing import Any

import pytest

from qcow2snap_core.memory.cmos import Cmos, read_cmos

CLOCK = "mc146818rtc"
REGISTERS = bytearray(128)
REGISTERS[0x34:0x36] = (0x100).to_bytes(2, "little")
REGISTERS[0x5B:0x5E] = (0x200).to_bytes(3, "little")
FIELDS = [{"name": "cmos_data", "size": 128}]


def asked(*devices: Any, name: str = CLOCK) -> Cmos | None:
    """What a state says that has a clock by that name alone, and such a description."""
    header = b"\x04" + bytes(4) + bytes([len(name)]) + name.encode() + bytes(8)
    text = json.dumps({"devices": devices}).encode()
    state = header + REGISTERS + b"\x7e" + bytes(4)
    state += b"\x00\x06" + len(text).to_bytes(4, "big") + text
    return read_cmos(lambda length, at: state[at : at + length], len(state))


def test_a_clock_is_read() -> None:
    said = asked({"name": CLOCK, "fields": FIELDS})
    assert said == ((16 << 20) + (0x100 << 16), 0x200 << 16)


@pytest.mark.parametrize(
    "device",
    [
        {"name": CLOCK, "fields": [5]},
        {"name": CLOCK, "fields": [*FIELDS, 5]},
        {"name": CLOCK, "fields": [*FIELDS, None]},
        {"name": CLOCK, "fields": [*FIELDS, ["array_len"]]},
        {"name": CLOCK, "fields": [{"name": "cmos_data", "size": 128, "array_len": "1"}]},
        {"name": CLOCK, "fields": 5},
        {"name": CLOCK, "fields": FIELDS, "subsections": [5]},
        {"name": CLOCK, "fields": FIELDS, "subsections": {}},
        {"name": "\ud800", "fields": FIELDS},
        {"name": 5, "fields": FIELDS},
        5,
    ],
)
def test_what_describes_nothing_says_nothing(device: Any) -> None:
    assert asked(device) is None
