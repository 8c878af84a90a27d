"""The entries of several L2 tables side by side: what all have alike is dropped at little cost.

Tables are compared a stride at a time, which Python does without looking at single entries.
"""

from __future__ import annotations

import sys
from array import array
from collections.abc import Sequence
from typing import Final

from ..format import ondisk as q
from ..image.tablereader import Entries

STRIDE: Final = 64  # entries compared at a time


def differing(parts: Sequence[Entries[int]]) -> tuple[list[Entries[int]], list[Entries[int]]]:
    """The same parts of several tables without most of what all have in common, and that; of one
    table alone nothing is dropped."""
    if len(parts) == 1:
        return list(parts), []
    kept: list[Entries[int]] = [array("Q") for _ in parts]
    common: list[Entries[int]] = []
    for at in range(0, len(parts[0]) if parts else 0, STRIDE):
        strides = [part[at : at + STRIDE] for part in parts]
        if strides.count(strides[0]) == len(strides):
            common.append(strides[0])
            continue
        for part, stride in zip(kept, strides, strict=True):
            part.extend(stride)
    return kept, common


_LOW_BYTE, _HIGH_BYTE = (0, 7) if sys.byteorder == "little" else (7, 0)
_NOT_COMPRESSED: Final = bytes(range(q.OFLAG_COMPRESSED >> 56))  # high bytes of such entries


def streams_and_offsets(entries: Entries[int]) -> tuple[list[int], set[int]]:
    """The compressed clusters' entries, and the host offsets of the others."""
    raw = entries.tobytes()
    streams: list[int] = []
    offsets = set(entries)
    if raw[_HIGH_BYTE::8].translate(None, _NOT_COMPRESSED):
        streams = [e for e in entries if e & q.OFLAG_COMPRESSED]
        offsets.difference_update(streams)
    if raw[_LOW_BYTE::8].translate(None, b"\0"):  # zero clusters may have an allocation
        offsets = {e & q.OFFSET_MASK for e in offsets}
    offsets.discard(0)
    return streams, offsets
