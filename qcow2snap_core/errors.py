"""What can go wrong, in three kinds: the user's words, the image's content, the disk's answer.

Every message is one lower-case line that says what and where; where a user can mend it, it
says how.  Whatever comes out of an image or a command line goes through :func:`shown` first, so
that a snapshot named with a line feed or an escape sequence cannot forge a line of a log.
"""

from __future__ import annotations

from .typed import Final

#: The longest path.  A snapshot's name may have 64 KiB, and a log line must not.
MOST_SHOWN: Final = 4096


class Error(Exception):
    """The base of all errors that this package raises on purpose; ``str()`` is one line."""

    #: What the lowest layer said, which the ones above repeat: 200 names would fill a log.
    _located: str | None = None


class UsageError(Error):
    """What was asked for cannot be: a bad value, no such snapshot, a file that is refused."""


class ImageError(Error):
    """The image says something that is damaged, impossible or not supported."""


class StorageError(Error):
    """The disk under the image failed: an I/O error, or the file is shorter than it was."""


class SnapshotGone(ImageError):
    """The snapshot that was served has been deleted; nothing of it can be read any more."""


for _kind in (Error, UsageError, ImageError, StorageError, SnapshotGone):
    _kind.__module__ = "qcow2snap_core"  # where users find them, and what a traceback is to say


def shown(text: str | bytes, most: int = MOST_SHOWN) -> str:
    """``text`` in quotes, on one line, whatever it holds and however long it is."""
    return f"'{escaped(text, most)}'"


def escaped(text: str | bytes, most: int = MOST_SHOWN) -> str:
    """``text`` on one line, without quotes: for what a user may want to type again."""
    if isinstance(text, bytes):
        text = text.decode("utf-8", "surrogateescape")
    more = "…" if len(text) > most else ""
    return "".join(c if c.isprintable() else _escape(c) for c in text[:most]) + more


def reason(error: OSError) -> str:
    """What the operating system said, in lower case: ``no such file or directory``."""
    text = error.strerror or str(error)
    return text[:1].lower() + text[1:]


def _escape(character: str) -> str:
    code = ord(character)
    if 0xDC80 <= code <= 0xDCFF:  # surrogateescape: a byte that is not UTF-8
        return f"\\x{code - 0xDC00:02x}"
    return character.encode("unicode_escape").decode("ascii")
