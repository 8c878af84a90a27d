"""Is this file what an update starts from?  Asked of the record that it keeps (:mod:`.records`).

Devices and exports keep none, nor does what other programs have made.  There all that the update
will *not* write can be compared with the image: what both snapshots have alike must be there.  An
interrupted update does not change that either.  Or the user is believed.

The record is written when the copy is whole.  An update in place writes another one first, that
of the way from the old snapshot to the new one, and brings it to the disk: whatever happens then,
the file never says that it holds what it does not.
"""

from __future__ import annotations

import errno
import os
import stat
import tempfile
from contextlib import suppress
from enum import Enum
from typing import Final

from ..errors import UsageError, reason, shown
from ..image.disk import Disk
from .outputs import sync
from .records import MOST, Record, held, parse, text

ATTRIBUTE: Final = "user.qcow2snap.copy"
ENDING: Final = ".qcow2snap"


class Base(Enum):
    """By what it is made sure that the target of an update holds the old snapshot."""

    RECORDED = "its record"
    COMPARED = "its content"
    TRUSTED = "the user's word"


_ADVICE: Final = "add --verify-base to compare it first, or --trust-base if it holds"


def check_base(path: str, old: Disk, new: Disk) -> bool:
    """Raises UsageError, which says what the file holds, unless an update from the one disk to the
    other is right for it.

    Returns whether it was begun and interrupted: then what the file holds has to be compared, since
    nothing says whether others have written to it after that.
    """
    record = _read(path)
    if record is None:
        raise UsageError(f"{shown(path)} has no record of what it holds: {_ADVICE} {old.name}")
    wanted = held(old)
    if wanted is None:
        raise UsageError(
            f"{old.name} may have changed since {shown(path)} was made: {_ADVICE} it as it is"
        )
    status = os.stat(path)
    says = "an active disk as it once was" if record.holds is None else str(record.holds)
    if record.between:
        if record.since != wanted or record.holds is None or record.holds != held(new):
            before = "an active disk" if record.since is None else str(record.since)
            raise UsageError(
                f"{shown(path)} is neither {before} nor {says}, an update was interrupted: "
                f"repeat that one, or make a full copy"
            )
        unchanged = status.st_size in (old.size, new.size)
    else:
        if record.holds != wanted:
            which = "but that of another disk" if says == str(wanted) else f"not {wanted}"
            raise UsageError(
                f"{shown(path)} holds {says}, {which}: give --since what it holds, or make "
                f"a full copy"
            )
        unchanged = record == record.of(status) and status.st_size == old.size
    if not unchanged:
        raise UsageError(
            f"{shown(path)} was changed after {says} had been copied to it: make a full copy, "
            f"or {_ADVICE} {old.name} all the same"
        )
    return record.between


def no_record(name: str, old: Disk) -> UsageError:
    """The error for a target that keeps no record."""
    return UsageError(f"{shown(name)} keeps no record of what it holds: {_ADVICE} {old.name}")


def _read(path: str) -> Record | None:
    """The file's record.  Raises UsageError when there is one that cannot be read."""
    try:
        raw = _raw(path)
        return None if raw is None else parse(raw)
    except OSError as e:
        why = reason(e)
    except ValueError as e:
        why = str(e)
    raise UsageError(
        f"the record of what {shown(path)} holds cannot be read: {why}: make a full copy, or "
        f"{_ADVICE} the snapshot of --since"
    )


def _raw(path: str) -> bytes | None:
    try:
        return os.getxattr(path, ATTRIBUTE)
    except OSError as e:
        if e.errno not in (errno.ENODATA, errno.ENOTSUP):
            raise
    try:
        return _content(_beside(path))
    except FileNotFoundError:
        return None


def keep_in(path: str, fd: int, record: Record) -> None:
    """Give an open file its record, and bring both to the disk.  Raises UsageError."""
    kept = keep(fd, record)
    os.fsync(fd)
    keep_beside(path, None if kept else record.of(os.fstat(fd)))


def keep(fd: int, record: Record) -> bool:
    """Make the record the open file's attribute; False where there can be none."""
    try:
        os.setxattr(fd, ATTRIBUTE, text(record.of(os.fstat(fd))))
        return True
    except OSError:  # no attributes here, no room for one, no permission
        with suppress(OSError):
            os.removexattr(fd, ATTRIBUTE)  # or an older one would stand
        return False


def keep_beside(path: str, record: Record | None) -> None:
    """Make the record, of the file as it is, the file beside it, or remove that; what is there and
    is no record is left alone.

    Raises UsageError.
    """
    beside = _beside(path)
    try:
        if record is None:
            if _is_record(beside):
                os.unlink(beside)
            return
        if os.path.lexists(beside) and not _is_record(beside):
            raise FileExistsError(errno.EEXIST, "it is there and is something else")
        status = os.stat(path)
        fd, part = tempfile.mkstemp(".part", ".qcow2snap-record-", os.path.dirname(beside))
        try:
            with open(fd, "wb") as f:
                os.fchmod(fd, status.st_mode & 0o666)
                f.write(text(record.of(status)))
                f.flush()
                os.fsync(fd)
            os.rename(part, beside)  # replaces a link, and not what it leads to
        except BaseException:
            os.unlink(part)
            raise
        sync(os.path.dirname(beside))
    except OSError as e:
        raise UsageError(
            f"cannot keep a record of what {shown(path)} holds in {shown(beside)}: {reason(e)}"
        ) from e


def _is_record(beside: str) -> bool:
    try:
        parse(_content(beside))
    except (OSError, ValueError):
        return False
    return True


def _content(beside: str) -> bytes:
    fd = os.open(beside, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    with open(fd, "rb") as f:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise ValueError(f"{shown(beside)} is no regular file")
        return f.read(MOST + 1)


def _beside(path: str) -> str:
    return os.path.realpath(path) + ENDING
