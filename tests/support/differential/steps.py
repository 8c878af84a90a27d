"""The steps of a program for which QEMU has no tool.

They are commands too: ``tests/differential.py --do noise noise0 17 4096``.
"""

from __future__ import annotations

import random
import struct
from collections.abc import Callable
from pathlib import Path

from support import qemu


def noise(name: str, seed: str, length: str) -> None:
    """A file of bytes that compress to about half."""
    Path(name).write_bytes(random.Random(int(seed)).randbytes(int(length) // 2).hex().encode())


def vm_state(image: str, snapshot: str, length: str) -> None:
    """Say in a snapshot's entry how long its VM state is, as savevm does."""
    path = Path(image)
    at = qemu.snapshots(path)[snapshot].entry_offset
    qemu.patch(path, at + 32, struct.pack(">I", int(length)))
    qemu.patch(path, at + 40, struct.pack(">Q", int(length)))


OWN: dict[str, Callable[[str, str, str], None]] = {"noise": noise, "vm-state": vm_state}
