"""Where a passphrase comes from, in the notation of nbdkit's luks filter.

``SECRET`` itself, ``+FILE`` or ``-FD`` for the first line of a file or descriptor, ``-`` for a
prompt.  A secret never appears in an error line, not even in part.
"""

from __future__ import annotations

import os
import sys

from ..errors import UsageError, reason, shown

_LONGEST = 64 << 10  # bytes; a device that never ends must not fill the memory


def read_passphrase(key: str, value: str) -> bytes:
    """The passphrase that ``key=value`` means.  Raises UsageError."""
    if value == "-":
        return _ask(key)
    if value.startswith("+"):
        return _from_file(key, value[1:])
    if value.startswith("-"):
        return _from_descriptor(key, value[1:])
    return _not_too_long(key, os.fsencode(value))


def _ask(key: str) -> bytes:
    if not sys.stdin or not sys.stdin.isatty():
        raise UsageError(f"{key}=- asks on a terminal, there is none: use {key}=+FILE")
    try:
        from getpass import getpass

        from .interrupts import raising

        with raising():
            return os.fsencode(getpass("passphrase: "))
    except EOFError:
        raise UsageError(f"{key}=-: no passphrase was entered") from None


def _from_file(key: str, path: str) -> bytes:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except (OSError, ValueError) as e:
        said = reason(e) if isinstance(e, OSError) else str(e)
        raise UsageError(f"{key}=+FILE: cannot open {shown(path)}: {said}") from e
    return _first_line(key, fd)


def _from_descriptor(key: str, number: str) -> bytes:
    plain = number.isascii() and number.isdigit() and len(number) <= 9
    if not plain or int(number) <= 2:
        raise UsageError(f"{key}=-FD: give the number of an open descriptor above 2")
    return _first_line(key, int(number))


def _first_line(key: str, fd: int) -> bytes:
    try:
        with open(fd, "rb") as f:
            line = f.readline(_LONGEST + 1)
    except OSError as e:
        raise UsageError(f"{key}=: cannot read the passphrase: {reason(e)}") from e
    return _not_too_long(key, line.removesuffix(b"\n"))


def _not_too_long(key: str, secret: bytes) -> bytes:
    """A part of it would be another passphrase."""
    if len(secret) > _LONGEST:
        raise UsageError(f"{key}=: the passphrase is longer than 64 KiB: is it the right file?")
    return secret
