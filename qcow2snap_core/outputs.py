"""Output files that are there whole or not at all.

The work is done under a temporary name in the same directory, ``.qcow2snap-….part``, which is
renamed at the end.  Whatever ends the work before that, an error or Ctrl-C, removes it again; a
kill that no program can answer may leave it behind, but never anything under the real name.  The
next run with an output in that directory removes it: the name says whose it was, and only if that
process can be known to be dead, not when it may run on another machine or in another container.
"""

from __future__ import annotations

import os
import re
import secrets
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from hashlib import sha256
from pathlib import Path

from .errors import UsageError, shown
from .libnbd import absolute, is_uri
from .storage import Storage, inode
from .units import binary


@contextmanager
def output(path: str) -> Iterator[str]:
    """A name for a file or directory that the block makes; then it is renamed to ``path``.

    A symlink is followed, so that what it leads to is replaced and not the link.
    """
    path = os.path.realpath(path)
    directory = os.path.dirname(path)
    _clear(directory)
    part = os.path.join(directory, f"{_prefix()}{os.getpid()}-{secrets.token_hex(4)}.part")
    try:
        yield part
        _settle(part)
        os.rename(part, path)
    except BaseException:
        _remove(part)
        raise
    _sync(directory)


def check_other(files: Iterable[Storage], path: str) -> None:
    """Raises UsageError when the path or URI is one of the files that are being read."""
    if is_uri(path):
        _check_other_uri(files, path)
        return
    try:
        this = inode(os.stat(path))
    except FileNotFoundError:
        return
    for file in files:
        if file.inode == this:
            raise UsageError(f"{shown(path)} is {shown(file.path)}, which is being copied")


def _check_other_uri(files: Iterable[Storage], uri: str) -> None:
    """The same export may have many URIs; this is for the slip of giving one twice."""
    for file in files:
        if file.absolute == absolute(uri):
            raise UsageError(f"{shown(file.path)} is being copied, it cannot be the target")


def check_space(directory: str, needed: int, what: str) -> None:
    """Raises UsageError unless the directory's filesystem has that many bytes free."""
    status = os.statvfs(directory)
    free = status.f_bavail * status.f_frsize
    if needed > free:
        raise UsageError(
            f"{what} needs {binary(needed)}, {shown(directory)} has {binary(free)} free"
        )


def _settle(path: str) -> None:
    """Bring it to the disk, so that after a crash the name does not lead to less."""
    if os.path.isdir(path):
        for entry in os.scandir(path):
            _sync(entry.path)
    _sync(path)


def _sync(path: str) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _prefix() -> str:
    """How the temporary names of processes begin that have been started here since the machine
    was: those whose numbers mean something here."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text()
    here = f"{boot}{os.stat('/proc/self/ns/pid').st_ino}"
    return f".qcow2snap-{sha256(here.encode()).hexdigest()[:8]}-"


def _clear(directory: str) -> None:
    """Remove what killed processes have left."""
    with suppress(OSError):
        for name in os.listdir(directory):
            found = re.fullmatch(re.escape(_prefix()) + r"(\d+)-[0-9a-f]+\.part", name)
            if found and not os.path.exists(f"/proc/{found[1]}"):
                _remove(os.path.join(directory, name))


def _remove(path: str) -> None:
    with suppress(FileNotFoundError):
        if os.path.isdir(path):
            shutil.rmtree(path)
        else:
            os.unlink(path)
