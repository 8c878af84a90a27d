"""What callers give, judged when they give it and by its name.

A wrong type is a TypeError and an impossible value a ValueError, as for Python's own functions:
such a call is a mistake in a program.  What may be right and still cannot be had, a file that is
not there say, is a :class:`.UsageError` of whoever looks for it.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from operator import index

from ..errors import shown
from ..storage.local import Buffer
from ..typed import Any


def path(name: str, value: str | os.PathLike[str]) -> str:
    """A path, or where those are taken the URI of an NBD export."""
    if not isinstance(value, str | os.PathLike):
        raise TypeError(f"{name} is {_a(value)}: give a str or a path object")
    found = os.fspath(value)
    if not isinstance(found, str):  # os.DirEntry of bytes
        raise TypeError(f"{name} is a path of {_a(found)}: give one of str")
    if "\0" in found:
        raise ValueError(f"{name} is {shown(found)}: no path holds a NUL")
    return found


def paths(name: str, value: Iterable[str | os.PathLike[str]]) -> tuple[str, ...]:
    if isinstance(value, str | bytes | os.PathLike):  # a str would be read as its letters
        raise TypeError(f"{name} is {_a(value)}: give a list of paths, also for a single one")
    if not isinstance(value, Iterable):
        raise TypeError(f"{name} is {_a(value)}: give a list of paths")
    return tuple(path(f"{name}[{at}]", each) for at, each in enumerate(value))


def integer(name: str, value: int, least: int | None = 0) -> int:
    try:
        found = index(value)
    except TypeError:
        raise TypeError(f"{name} is {_a(value)}: give an int") from None
    if least is not None and found < least:
        raise ValueError(f"{name} is {found}: give {least} or more")
    return found


def seconds(name: str, value: float) -> float:
    """A time, more than none."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name} is {_a(value)}: give a number of seconds")
    if not 0 < value < 10**9:
        raise ValueError(f"{name} is {value}: give seconds, more than 0")
    return float(value)


def text(name: str, value: str) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{name} is {_a(value)}: give a str")
    return value


def one_of(name: str, value: str, choices: tuple[str, ...]) -> str:
    if text(name, value) not in choices:
        raise ValueError(f"{name} is {shown(value)}: give {' or '.join(map(repr, choices))}")
    return value


def flag(name: str, value: bool) -> bool:
    if not isinstance(value, bool):
        raise TypeError(f"{name} is {_a(value)}: give True or False")
    return value


def passphrases(value: str | bytes | Mapping[int, str | bytes] | None) -> dict[int, bytes]:
    """By layer.  No message repeats any of it."""
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        return {0: _secret("passphrase", value)}
    return {
        integer("a layer of passphrase", layer): _secret(f"passphrase[{layer!r}]", each)
        for layer, each in value.items()
    }


def writable(name: str, value: Buffer) -> memoryview:
    """A view of a buffer that can be filled."""
    try:
        view = memoryview(value)
    except TypeError:
        raise TypeError(f"{name} is {_a(value)}: give a bytearray or the like") from None
    if view.readonly or not view.c_contiguous:
        raise TypeError(f"{name} is read-only or has gaps: give a bytearray or the like")
    return view


def instance(name: str, value: object, kind: type) -> None:
    if not isinstance(value, kind):
        raise TypeError(f"{name} is {_a(value)}: give a qcow2snap_core.{kind.__name__}")


def within(size: int, length: int, offset: int) -> None:
    """Raises ValueError for a range that is not one of a disk of that size."""
    length, offset = integer("length", length, None), integer("offset", offset, None)
    if length < 0 or not 0 <= offset <= size - length:
        raise ValueError(f"{length} bytes at {offset} are outside the disk of {size}")


def _secret(name: str, value: str | bytes) -> bytes:
    if isinstance(value, str):
        return value.encode("utf-8", "surrogateescape")
    if isinstance(value, bytes):
        return value
    raise TypeError(f"{name} is {_a(value)}: give the secret itself, as str or bytes")


def _a(value: Any) -> str:
    kind = type(value).__name__
    return f"an {kind}" if kind[0].lower() in "aeiou" else f"a {kind}"
