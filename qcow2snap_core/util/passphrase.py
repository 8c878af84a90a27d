"""Where a passphrase comes from, in the notation of nbdkit's luks filter.

``SECRET`` itself, ``+FILE`` or ``-FD`` for the first line of a file or descriptor, ``-`` for a
prompt.  A secret never appears in an error line, not even in part.
"""

from __future__ import annotations

import os
import sys

from ..errors import UsageError, reason, shown
from .wording import PLUGIN, Wording

_LONGEST = 64 << 10  # bytes; a device that never ends must not fill the memory


def read_passphrase(key: str, value: str, words: Wording = PLUGIN) -> bytes:
    """The passphrase that ``key=value`` means.  Raises UsageError."""
    if value == "-":
        return _ask(key, words)
    if value.startswith("+"):
        return _from_file(words.given(key, "+FILE"), words.name(key), value[1:])
    if value.startswith("-"):
        return _from_descriptor(words.given(key, "-FD"), words.name(key), value[1:])
    return _not_too_long(words.name(key), os.fsencode(value))


def _ask(key: str, words: Wording) -> bytes:
    asked = words.given(key, "-")
    if not sys.stdin or not sys.stdin.isatty():
        instead = words.given(key, "+FILE")
        raise UsageError(f"{asked} asks on a terminal, there is none: use {instead}")
    try:
        from getpass import getpass

        from .interrupts import raising

        with raising():
            return os.fsencode(getpass("passphrase: "))
    except EOFError:
        raise UsageError(f"{asked}: no passphrase was entered") from None


def _from_file(given: str, name: str, path: str) -> bytes:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except (OSError, ValueError) as e:
        said = reason(e) if isinstance(e, OSError) else str(e)
        raise UsageError(f"{given}: cannot open {shown(path)}: {said}") from e
    return _first_line(name, fd)


def _from_descriptor(given: str, name: str, number: str) -> bytes:
    plain = number.isascii() and number.isdigit() and len(number) <= 9
    if not plain or int(number) <= 2:
        raise UsageError(f"{given}: give the number of an open descriptor above 2")
    return _first_line(name, int(number))


def _first_line(name: str, fd: int) -> bytes:
    try:
        with open(fd, "rb") as f:
            line = f.readline(_LONGEST + 1)
    except OSError as e:
        raise UsageError(f"{name}: cannot read the passphrase: {reason(e)}") from e
    return _not_too_long(name, line.removesuffix(b"\n"))


def _not_too_long(name: str, secret: bytes) -> bytes:
    """A part of it would be another passphrase."""
    if len(secret) > _LONGEST:
        raise UsageError(f"{name}: the passphrase is longer than 64 KiB: is it the right file?")
    return secret
