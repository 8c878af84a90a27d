"""Output files that are there whole or not at all.

The work is done under a temporary name in the same directory, ``.qcow2snap-….part``, which is
renamed at the end.  Whatever ends the work before that, an error or Ctrl-C, removes it again; a
kill that no program can answer may leave it behind, but never anything under the real name.  The
next run with an output in that directory removes it.

It must not remove what another is still writing, perhaps another user's, in another container, whom
``/proc`` does not show.  So the writer holds a lock on it until it has been renamed, and whoever
clears takes that lock first and then makes sure that the name still leads to what was locked.  A
writer does the same after it has made the file, as somebody's clearing may have come in between.

* A file's lock is on one byte far behind its end, of the kind that QEMU uses (OFD): the qemu-img
  and qemu-nbd that write the file hold theirs on bytes 100 to 300.  flock would not do: on NFS the
  kernel makes such a lock of it, on the whole file, and QEMU could not write.
* A directory can only be locked with flock.  On network filesystems that reaches no further than
  this machine; so the names begin with what is this machine's until it starts anew, and those of
  others are left alone.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import secrets
import shutil
import stat
import struct
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from hashlib import sha256
from pathlib import Path
from typing import Final

from ..errors import UsageError, reason, shown
from ..util.units import binary

_FLOCK: Final = "hhqqi0q"  # struct flock: l_type, l_whence, l_start, l_len, l_pid
_BYTE: Final = 1 << 62
_CREATE_FILE: Final = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
_OPEN_DIRECTORY: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC


@contextmanager
def output(path: str, is_directory: bool = False) -> Iterator[str]:
    """The name of an empty file or directory that the block fills; then it is renamed to ``path``.

    A symlink is followed, so that what it leads to is replaced and not the link.  Whoever calls has
    asked :func:`.destination` whether that will do.
    """
    path = os.path.realpath(path)
    directory = os.path.dirname(path)
    _clear(directory)
    try:
        part, held = _begin(directory, is_directory)
    except OSError as e:
        raise UsageError(f"cannot write into the directory {shown(directory)}: {reason(e)}") from e
    try:
        yield part
        _settle(part)
        os.rename(part, path)
    except BaseException:
        _remove(part)
        raise
    finally:
        os.close(held)
    _sync(directory)


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
    """How the temporary names of this run of the machine begin."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_bytes()
    return f".qcow2snap-{sha256(boot).hexdigest()[:8]}-"


def _begin(directory: str, is_directory: bool) -> tuple[str, int]:
    """Make a file or directory that is ours: its path, and the descriptor that holds the lock."""
    while True:
        part = os.path.join(directory, f"{_prefix()}{secrets.token_hex(8)}.part")
        try:
            if is_directory:
                os.mkdir(part)
            fd = os.open(part, _OPEN_DIRECTORY if is_directory else _CREATE_FILE, 0o666)
        except FileNotFoundError:
            if not is_directory:
                raise
            continue  # somebody's cleaning came between the two
        with suppress(BlockingIOError):
            # Where nothing can be locked nobody's cleaning can lock it either, and it is safe.
            _lock(fd, fcntl.F_WRLCK, unless_impossible=True)
            if _is_named(part, fd):
                return part, fd
        os.close(fd)  # somebody's cleaning was quicker, and removes it


def _clear(directory: str) -> None:
    """Remove what killed processes have left."""
    with suppress(OSError):
        for name in os.listdir(directory):
            if re.fullmatch(re.escape(_prefix()) + r"[0-9a-f]{16}\.part", name):
                with suppress(OSError):  # somebody's, or not ours to open
                    _clear_one(os.path.join(directory, name))


def _clear_one(part: str) -> None:
    """Remove it if nobody holds it.  Raises OSError when somebody does."""
    fd = os.open(part, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        # Shared, for which a file need not be writable, but no writer can have it meanwhile.
        _lock(fd, fcntl.F_RDLCK)
        if _is_named(part, fd):  # else it was renamed: it is whole
            _remove(part)
    finally:
        os.close(fd)


def _lock(fd: int, kind: int, unless_impossible: bool = False) -> None:
    """Lock a file or directory for as long as it is open.  Raises BlockingIOError when it is
    somebody else's."""
    try:
        mode = os.fstat(fd).st_mode
        if stat.S_ISDIR(mode):
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        elif stat.S_ISREG(mode):
            fcntl.fcntl(fd, fcntl.F_OFD_SETLK, struct.pack(_FLOCK, kind, os.SEEK_SET, _BYTE, 1, 0))
        else:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
    except OSError as e:
        if e.errno in (errno.EAGAIN, errno.EACCES):
            raise BlockingIOError from e
        if not unless_impossible:
            raise


def _is_named(path: str, fd: int) -> bool:
    """Whether the path still leads to what is open."""
    try:
        return os.path.samestat(os.stat(path, follow_symlinks=False), os.fstat(fd))
    except FileNotFoundError:
        return False


def _remove(path: str) -> None:
    with suppress(FileNotFoundError):
        if os.path.isdir(path):
            shutil.rmtree(path)
        else:
            os.unlink(path)
