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

Until it is whole an output is nobody's but the user's.  Then it gets the permissions that the umask
leaves, or those of what it replaces, but never more than what was read for it had.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import re
import secrets
import shutil
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from hashlib import sha256
from pathlib import Path
from typing import Final

from ..errors import UsageError, reason, shown
from ..storage.libnbd import is_uri
from ..storage.local import Storage
from ..storage.locks import of_byte
from .judge import ensure_overlays

_BYTE: Final = 1 << 62
_CREATE_FILE: Final = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
_OPEN_DIRECTORY: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC


# linux/fs.h, of renameat2
_NOREPLACE: Final = 1
_EXCHANGE: Final = 2
_AT_FDCWD: Final = -100
_UNKNOWN: Final = (errno.EINVAL, errno.ENOSYS)  # by the filesystem, or by the kernel


@contextmanager
def output(
    path: str, is_directory: bool = False, most: int = 0o7777, *, replace: bool = False
) -> Iterator[str]:
    """The name of an empty file or directory that the block fills; then it is renamed to ``path``.

    ``most`` are the permissions that a file may get, of a directory its own files' (:func:`private`
    and :func:`publish`).  A symlink is followed, so that what it leads to is replaced and not the
    link; nothing is replaced but an empty directory unless ``replace`` says so.  Whoever calls has
    asked :mod:`.judge` whether that will do.
    """
    path = os.path.realpath(path)
    directory = os.path.dirname(path)
    clear(directory)
    try:
        part, held = _begin(directory, is_directory)
    except OSError as e:
        raise UsageError(f"cannot write into the directory {shown(directory)}: {reason(e)}") from e
    try:
        yield part
        _permit(held, path, most)
        _settle(part)
        _give_name(part, path, is_directory, replace)
    except BaseException:
        _remove(part)
        raise
    finally:
        os.close(held)
    sync(directory)


@contextmanager
def alone_in(directory: str) -> Iterator[None]:
    """Nobody else does the same in that directory until the block ends; what killed ones have left
    there is removed.  Raises UsageError when somebody does."""
    fd = os.open(directory, _OPEN_DIRECTORY)
    try:
        try:
            _lock(fd, fcntl.F_WRLCK, unless_impossible=True)
        except BlockingIOError:
            raise UsageError(
                f"{shown(directory)} is being written by another command: wait for its end"
            ) from None
        clear(directory)
        yield
    finally:
        os.close(fd)


def permissions(files: Iterable[Storage]) -> int:
    """Those that all of the files have."""
    most = 0o777
    for file in files:
        if not is_uri(file.path):
            try:
                most &= os.stat(file.absolute).st_mode
            except OSError:  # its name is gone
                most &= 0o600
    return most


def private(path: str) -> None:
    """Make an empty file that nobody else may read, in a directory that is an output."""
    os.close(os.open(path, _CREATE_FILE, 0o600))


def publish(path: str, most: int) -> None:
    """Give such a file the permissions of a new one, ``most`` at the most."""
    with suppress(PermissionError):
        os.chmod(path, 0o666 & ~_umask() & most)


def _permit(fd: int, path: str, most: int) -> None:
    """Give what is going to have that name its permissions."""
    is_directory = stat.S_ISDIR(os.fstat(fd).st_mode)
    mode = (0o777 if is_directory else 0o666) & ~_umask()
    with suppress(FileNotFoundError):
        mode = stat.S_IMODE(os.stat(path).st_mode)
    with suppress(PermissionError):  # by a filesystem that keeps none, as on a memory card
        os.fchmod(fd, mode if is_directory else mode & most)


def _umask() -> int:
    """Without changing it, which all threads would feel."""
    status = Path("/proc/self/status").read_text("ascii", "replace")
    return int(status.partition("\nUmask:")[2].split()[0], 8)


def _give_name(part: str, path: str, is_directory: bool, replace: bool) -> None:
    if replace and is_directory:
        _exchange(part, path)  # now it is the old one that has the temporary name
        try:
            ensure_overlays(path, part)  # it was judged perhaps hours ago
        except BaseException:
            _exchange(part, path)
            raise
        sync(os.path.dirname(path))  # before anything is removed
        _remove(part)
    elif replace or is_directory:  # a directory only takes the place of an empty one
        os.rename(part, path)
    else:
        try:
            _rename(part, path, _NOREPLACE)
        except FileExistsError:
            raise UsageError(
                f"{shown(path)} was made by somebody else meanwhile: it was left alone, start again"
            ) from None
        except OSError as e:
            if e.errno not in _UNKNOWN:
                raise
            os.rename(part, path)


def _exchange(part: str, path: str) -> None:
    try:
        _rename(part, path, _EXCHANGE)
    except OSError as e:
        raise UsageError(
            f"the filesystem of {shown(path)} cannot replace a directory by another "
            f"({reason(e)}): remove the old one first"
        ) from e


def _rename(old: str, new: str, flags: int) -> None:
    call = ctypes.CDLL(None, use_errno=True).renameat2
    call.argtypes = [ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_char_p, ctypes.c_uint]
    if call(_AT_FDCWD, os.fsencode(old), _AT_FDCWD, os.fsencode(new), flags):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), new)


def _settle(path: str) -> None:
    """Bring it to the disk, so that after a crash the name does not lead to less."""
    if os.path.isdir(path):
        for entry in os.scandir(path):
            sync(entry.path)
    sync(path)


def sync(path: str) -> None:
    """Bring a file or directory to the disk."""
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
                os.mkdir(part, 0o700)
            fd = os.open(part, _OPEN_DIRECTORY if is_directory else _CREATE_FILE, 0o600)
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


def clear(directory: str) -> None:
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
            fcntl.fcntl(fd, fcntl.F_OFD_SETLK, of_byte(kind, _BYTE))
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
