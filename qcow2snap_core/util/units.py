"""Sizes and numbers as people write and read them."""

from __future__ import annotations

from ..errors import UsageError
from ..typed import Final

_SUFFIXES: Final = {"": 0, "b": 0, "k": 10, "m": 20, "g": 30, "t": 40, "p": 50, "e": 60, "s": 9}


def parse_size(text: str) -> int:
    """Bytes, from what nbdkit's own plugins accept: ``512``, ``64k``, ``1G``, ``2048s`` (sectors),
    ``0x10000`` (nbdkit since 1.48).  ``010`` is ten, as it was for nbdkit before.

    nbdkit's parser prints an error line of its own, which does not name the key; hence this one.
    Raises UsageError.
    """
    import re

    # Every letter that can be a hexadecimal digit is one: 0x10b has no unit.
    found = re.fullmatch(r"\+?(0x[0-9a-f]+|\d+)([a-z]?)", text.lower(), re.ASCII)
    if found is None or found[2] not in _SUFFIXES:
        raise UsageError(f"{text!r} is no size: give bytes, or a number with a unit, like 64M")
    size = int(found[1], 16 if found[1].startswith("0x") else 10) << _SUFFIXES[found[2]]
    if size >= 1 << 63:
        raise UsageError(f"{text!r} is too large a size")
    return size


def parse_seconds(text: str) -> float:
    """A time in seconds, more than none: ``30``, ``0.5``.  Raises UsageError."""
    import re

    if re.fullmatch(r"\d{1,9}(\.\d{1,9})?", text, re.ASCII) and float(text) > 0:
        return float(text)
    raise UsageError(f"{text!r} is no time: give seconds, more than 0, like 30 or 0.5")


def binary(size: int) -> str:
    """A size for people, as ``qemu-img`` writes it: ``0 B``, ``1.5 GiB``."""
    units = ("B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB")
    step = max((size * 1024 // 1000).bit_length() - 1, 0) // 10  # 1000 B is 0.977 KiB
    return f"{size / (1 << 10 * step):.3g} {units[step]}"


def counted(number: int, noun: str, plural: str = "") -> str:
    """``1 file``, ``2 files``; ``plural`` where an s does not make it."""
    return f"{number:,} {noun if number == 1 else plural or f'{noun}s'}"
