"""Where output may go: the one judge of targets, asked before any work and any passphrase.

A command says which kinds of target it takes, and gets the one that the name means, or a line that
says what is wrong with it.  So nothing is copied for an hour that then cannot be put where it
belongs, and nothing is destroyed that was not meant.  What is there is replaced only when the user
says so (``--force``), and then a file by a file: an output is renamed over what has its name, which
would as well replace ``/dev/null``, or the directory that the user is in.

Names mean what they mean to coreutils.  ``dir/`` is a directory, and no name for a new file.  A
symlink is followed, unless it leads nowhere: whoever made it expected something there.  ``a/..`` is
for the kernel to resolve, since ``a`` may be a symlink, and must be there.
"""

from __future__ import annotations

import enum
import fcntl
import os
import stat
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from ..errors import UsageError, reason, shown
from ..storage.ground import mount_of
from ..storage.libnbd import absolute, is_uri, without_secrets
from ..storage.local import Storage, inode, kind_name
from ..storage.samefile import ensure_apart
from ..util.wording import COMMAND, Wording
from .manifest import NAME as MANIFEST

#: How the names of the files end that are made here: qcow2 files, and raw ones of VM states.
ENDING: Final = ".qcow2"
VM_STATE: Final = ".vmstate"

_BLKROGET: Final = 0x125E  # linux/fs.h: is it read-only?


class Kind(enum.Flag):
    """Kinds of target."""

    FILE = enum.auto()  # a regular file, new or to be replaced or updated
    DIRECTORY = enum.auto()  # a directory, new or empty
    DEVICE = enum.auto()  # a block device that nothing else uses
    EXPORT = enum.auto()  # the URI of an NBD export
    STREAM = enum.auto()  # standard output, or a FIFO


#: The target that stands for it; a file of that name is ``./-``.
STANDARD_OUTPUT: Final = "-"

_WORDS: Final = {
    Kind.FILE: "a file",
    Kind.DIRECTORY: "a directory that is absent or empty",
    Kind.DEVICE: "a block device",
    Kind.STREAM: "a FIFO",
    Kind.EXPORT: "an NBD URI",
}


@dataclass(frozen=True)
class Place:
    """A target that will do."""

    name: str  # as the user gave it
    kind: Kind
    path: str  # without symlinks; the URI of an export, the name of a stream
    new: bool = False  # there is nothing yet
    replace: bool = False  # what is there may be replaced

    def ensure_apart(self, files: Iterable[Storage]) -> None:
        """Raises UsageError when one of the files that are being read is the target, or lies on
        the same storage, or that cannot be told."""
        if self.kind is Kind.EXPORT:
            _check_other_uri(files, self.name)
        elif self.kind is Kind.STREAM:
            _check_other_stream(files, self.path)
        else:
            at = os.path.dirname(self.path) if self.new else self.path
            ensure_apart(at, files, self.name, new=self.new)
            if self.kind is Kind.DIRECTORY and self.replace:
                _check_not_inside(files, self.path, self.name)


def judge(
    name: str,
    accepts: Kind,
    *,
    replace: bool = False,
    in_place: bool = False,
    words: Wording = COMMAND,
) -> Place:
    """What the name means as a target.

    ``replace``: what is there may be replaced.  ``in_place``: a file or directory that is there is
    written into.
    ``words``: of whoever gave the name, for error lines.
    Raises UsageError, also when what is there is not of a kind that is accepted.
    """
    if name == STANDARD_OUTPUT and Kind.STREAM in accepts:
        return _standard_output()
    if is_uri(name) and Kind.EXPORT in accepts:
        return Place(name, Kind.EXPORT, name)
    wanted = _wanted(accepts)
    if is_uri(name):
        raise UsageError(f"{shown(without_secrets(name))} is remote: give {wanted}")
    if not name:
        raise UsageError(f"the target's name is empty: give {wanted}")
    try:
        status = os.stat(name)
    except FileNotFoundError:
        return _new(name, accepts)
    except ValueError as e:  # a NUL
        raise UsageError(f"{shown(name)} is no path: give {wanted}") from e
    except OSError as e:
        raise UsageError(f"{shown(name)}: {reason(e)}: give {wanted}") from e
    kind = _kind(status.st_mode)
    if kind is None or kind not in accepts:
        raise UsageError(f"{shown(name)} is a {kind_name(status.st_mode)}: give {wanted}")
    path = os.path.realpath(name)
    if kind is Kind.STREAM:
        path = name  # that of a pipe is no path
    elif not os.path.exists(path) or inode(os.stat(path)) != inode(status):
        raise UsageError(f"{shown(name)} is open, but has no name any more: give {wanted}")
    if kind is Kind.DIRECTORY and not in_place:
        replace = _check_directory(name, path, status, replace, words)
    elif not os.access(path, os.W_OK, effective_ids=True):
        raise UsageError(f"{shown(name)} may not be written: {_why_not(path)}")
    elif kind is Kind.DEVICE:
        _check_device(name, path)
    if kind in Kind.FILE | Kind.DIRECTORY and not in_place:
        _check_replaceable(name, path, status)
        if kind is Kind.FILE and not replace:
            raise UsageError(f"{shown(name)} is there already: {_to_replace(words)} it")
    return Place(name, kind, path, replace=replace)


def _new(name: str, accepts: Kind) -> Place:
    """For a name that leads nowhere yet."""
    kind = next((k for k in (Kind.FILE, Kind.DIRECTORY) if k in accepts), None)
    plain = name.rstrip("/")
    if os.path.islink(plain):
        raise UsageError(f"{shown(name)} is a symlink that leads nowhere: remove it first")
    if kind is None:
        raise UsageError(f"there is no {shown(name)}: give {_wanted(accepts)}")
    if plain != name and kind is Kind.FILE:
        raise UsageError(f"there is no directory {shown(name)}, and no file can be called that")
    directory, last = os.path.split(plain)
    directory = directory or "."
    try:
        parent = os.path.realpath(directory, strict=True)
        os.stat(os.path.join(parent, ""))
    except FileNotFoundError:
        raise UsageError(f"there is no directory {shown(directory)}: make it first") from None
    except OSError as e:
        raise UsageError(f"{shown(directory)}: {reason(e)}") from e
    ensure_writable(parent)
    return Place(name, kind, os.path.join(parent, last), new=True)


def _standard_output() -> Place:
    if os.isatty(1):
        raise UsageError("standard output is a terminal: redirect it to a file or a program")
    if fcntl.fcntl(1, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
        raise UsageError("standard output is closed: redirect it to a file or a program")
    return Place("standard output", Kind.STREAM, STANDARD_OUTPUT)


def _to_replace(words: Wording) -> str:
    return f"add {words.flag('force')} to replace"


def _check_directory(
    name: str, path: str, status: os.stat_result, replace: bool, words: Wording
) -> bool:
    """Returns whether there is something in it that is to be replaced: files as a split makes them
    and no others, since all else would be lost too."""
    try:
        found = os.listdir(path)
    except OSError as e:
        raise UsageError(f"cannot look into {shown(name)}: {reason(e)}") from e
    if replace:
        ensure_overlays(name, path)
    if found and not replace:
        raise UsageError(
            f"{shown(name)} is not empty: give a directory that is, or none, or "
            f"{_to_replace(words)} the overlays in it"
        )
    if inode(status) == inode(os.stat(".")):
        # It will be another directory of this name, and whoever is in this one is in none.
        raise UsageError(
            f"{shown(name)} is the current directory: give a name in it, or go elsewhere"
        )
    return bool(found)


def ensure_overlays(name: str, path: str) -> None:
    """Raises UsageError when the directory at ``path`` has anything in it that split does not make;
    ``name`` is what it is called."""
    for entry in sorted(os.scandir(path), key=lambda entry: entry.name):
        ours = entry.name.endswith((ENDING, VM_STATE)) or entry.name == MANIFEST
        if not (ours and entry.is_file(follow_symlinks=False)):
            raise UsageError(
                f"{shown(name)} is not replaced, since {shown(entry.name)} in it is no overlay: "
                f"give a directory that is absent or empty"
            )


def _check_device(name: str, path: str) -> None:
    try:
        # O_EXCL on a device: the kernel refuses it while it is mounted, or part of another.  Not
        # for writing: closing that would have udev look at it anew.
        fd = os.open(path, os.O_RDONLY | os.O_EXCL | os.O_CLOEXEC)
        try:
            answer = bytearray(4)
            fcntl.ioctl(fd, _BLKROGET, answer)
        finally:
            os.close(fd)
    except OSError as e:
        raise UsageError(f"cannot open {shown(name)}: {reason(e)}") from e
    if any(answer):
        raise UsageError(f"{shown(name)} is read-only")


def _check_replaceable(name: str, path: str, status: os.stat_result) -> None:
    """Whether something else may be renamed over it."""
    parent = os.path.dirname(path)
    ensure_writable(parent)
    if mount_of(path) != mount_of(parent):
        raise UsageError(f"{shown(name)} is a mount point, which cannot be replaced")
    above = os.stat(parent)
    mine = 0, status.st_uid, above.st_uid
    if above.st_mode & stat.S_ISVTX and os.geteuid() not in mine:
        raise UsageError(
            f"{shown(name)} is another user's, which cannot be replaced in the sticky directory "
            f"{shown(parent)}"
        )


def ensure_writable(parent: str) -> None:
    """Raises UsageError for a directory in which nothing can be made."""
    if not os.access(parent, os.W_OK | os.X_OK, effective_ids=True):
        raise UsageError(f"cannot write into the directory {shown(parent)}: {_why_not(parent)}")


def _why_not(path: str) -> str:
    if os.statvfs(path).f_flag & os.ST_RDONLY:
        return "read-only file system"
    return "permission denied"


def _check_other_uri(files: Iterable[Storage], uri: str) -> None:
    """The same export may have many URIs; this is for the slip of giving one twice."""
    for file in files:
        if file.absolute == absolute(uri):
            raise UsageError(f"{shown(file.path)} is being copied, it cannot be the target")


def _check_other_stream(files: Iterable[Storage], path: str) -> None:
    """What is redirected may be a file or a device."""
    status = os.fstat(1) if path == STANDARD_OUTPUT else os.stat(path)
    if stat.S_ISREG(status.st_mode) or stat.S_ISBLK(status.st_mode):
        ensure_apart("/proc/self/fd/1", files, "standard output")


def _check_not_inside(files: Iterable[Storage], directory: str, name: str) -> None:
    there = {inode(entry.stat()) for entry in os.scandir(directory)}
    for file in files:
        if file.inode in there:
            raise UsageError(
                f"{shown(file.path)} is being copied and lies in {shown(name)}: give another target"
            )


def _kind(mode: int) -> Kind | None:
    kinds = {
        stat.S_IFREG: Kind.FILE,
        stat.S_IFDIR: Kind.DIRECTORY,
        stat.S_IFBLK: Kind.DEVICE,
        stat.S_IFIFO: Kind.STREAM,
    }
    return kinds.get(stat.S_IFMT(mode))


def _wanted(accepts: Kind) -> str:
    words = [word for kind, word in _WORDS.items() if kind in accepts]
    return " or ".join([", ".join(words[:-1]), words[-1]] if words[1:] else words)
