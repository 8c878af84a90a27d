"""Files of a guest, written below a directory of the host's.

All names, sizes and links come from a guest who may want to write elsewhere, to fill the disk, or
to leave a trap for whoever looks at the result.  So everything is judged before anything is
written, and then:

- a name is used as one component, relative to the open descriptor of its directory, and no
  symbolic link is followed there; a directory of the target's that is a link is refused;
- a symbolic link is made only if it stays in the extracted tree whatever the others lead to:
  relative, with ``..`` at its beginning alone, and no more of them than there are directories above
  it;
- devices, FIFOs and sockets are not made; setuid, setgid and sticky bits are dropped, and what is
  written belongs to whoever writes it;
- a file is written under a temporary name, and gets its own when it is whole.
"""

from __future__ import annotations

import os
import secrets
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from typing import Final, NamedTuple

from ..errors import UsageError, escaped, reason, shown
from ..util.interrupts import raise_if_interrupted
from ..util.progress import progress
from ..util.units import binary
from .tree import MOST_ENTRIES, Filesystem, Kind, Node, Unreadable, is_safe, walk

_DIRECTORY: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_NEW: Final = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_LONGEST: Final = (1 << 63) - 1
_PAGE: Final = 4096

Path = tuple[bytes, ...]
Say = Callable[[str], None]


class Limits(NamedTuple):
    """What a guest may have this program write."""

    files: int = MOST_ENTRIES
    bytes: int = _LONGEST
    force: bool = False  #: replace files that are there


class Done(NamedTuple):
    """What was written."""

    files: int
    bytes: int
    left_out: int  #: by what this module makes and does not make
    unreadable: int  #: which somebody may miss


class _Plan(NamedTuple):
    entries: list[tuple[Path, Node]]
    total: int
    left_out: int
    unreadable: int


def extract(fs: Filesystem, top: Node, name: bytes, target: str, limits: Limits, say: Say) -> Done:
    """Write a file or a tree as ``target/name``; what is left out is said.

    Raises UsageError before anything is written for what is too much or is there already, and
    whatever reading raises; then the files that were whole before are there.
    """
    try:
        root = os.open(target, _DIRECTORY & ~os.O_NOFOLLOW)
    except OSError as e:
        raise UsageError(f"cannot extract into {shown(target)}: {reason(e)}") from e
    try:
        plan = _plan(fs, top, name, root, limits, say)
        with progress(f"extract {escaped(name, 40)}", plan.total) as advance:
            return _Writer(fs, root, limits, advance).write(plan)
    finally:
        os.close(root)


def _plan(fs: Filesystem, top: Node, name: bytes, root: int, limits: Limits, say: Say) -> _Plan:
    """Judge everything: what will be written, and how much that is."""
    found: list[tuple[Path, Node]] = []
    unsafe: set[Path] = set()
    counted: set[tuple[int, int]] = set()
    total = left_out = unreadable = 0
    entries: list[tuple[Path, Node]] = [((name,), top)]
    if not is_safe(name):
        raise UsageError(f"{shown(name)} cannot be the name of a file: say --as NAME")
    for path, node in _all(entries[0], fs, limits.files):
        raise_if_interrupted()
        if path[:-1] in unsafe:
            unsafe.add(path)
            continue
        try:
            why = _why_not(fs, path, node)
            if why is None and node.kind is Kind.FILE and node.key not in counted:
                total += fs.stored(node)
                if node.links > 1:
                    counted.add(node.key)
        except Unreadable as e:
            say(f"left out: {e}")
            unreadable += 1
            continue
        if why is None:
            found.append((path, node))
        else:
            say(f"left out: {shown(b'/'.join(path))} {why}")
            left_out += 1
            unsafe.add(path)
    if total > limits.bytes:
        raise UsageError(f"there are {binary(total)} to write: allow more by --max-bytes")
    free = os.fstatvfs(root)
    needed = total + len(found) * _PAGE
    if needed > free.f_bavail * free.f_frsize:
        room = binary(free.f_bavail * free.f_frsize)
        raise UsageError(f"it needs {binary(needed)}, and there are {room} free")
    _judge_target(root, found, limits.force)
    return _Plan(found, total, left_out, unreadable)


def _why_not(fs: Filesystem, path: Path, node: Node) -> str | None:
    """Why this is not written.  Raises Unreadable, and UsageError for an impossible size."""
    if not is_safe(path[-1]):
        return "cannot be the name of a file"
    if node.kind is Kind.LINK:
        return None if stays_inside(fs.link(node), len(path) - 2) else "leads elsewhere"
    if node.kind is Kind.FILE and not 0 <= node.size <= _LONGEST:
        raise UsageError(f"{shown(b'/'.join(path))} has {node.size} bytes: no file has")
    return None if node.kind in (Kind.FILE, Kind.DIRECTORY) else "is no file, directory or link"


def _all(top: tuple[Path, Node], fs: Filesystem, most: int) -> Iterator[tuple[Path, Node]]:
    yield top
    for path, node in walk(fs, top[1], most):
        yield (*top[0], *path), node


def stays_inside(target: bytes, depth: int) -> bool:
    """Whether a symbolic link that lies ``depth`` directories below the top leads nowhere else,
    even through other such links: what is behind ``..`` depends on them."""
    if target.startswith(b"/") or b"\0" in target or not target:
        return False
    parts = [p for p in target.split(b"/") if p not in (b"", b".")]
    up = 0
    while up < len(parts) and parts[up] == b"..":
        up += 1
    return up <= depth and b".." not in parts[up:]


def _judge_target(root: int, found: list[tuple[Path, Node]], force: bool) -> None:
    """Raises UsageError for what is there and must not be."""
    absent: set[Path] = set()
    for path, node in found:
        if path[:-1] in absent:
            absent.add(path)
            continue
        try:
            with _directory(root, path[:-1]) as folder:
                mode = os.stat(path[-1], dir_fd=folder, follow_symlinks=False).st_mode
        except FileNotFoundError:
            absent.add(path)
            continue
        except OSError as e:
            raise UsageError(f"cannot write {shown(b'/'.join(path))}: {reason(e)}") from e
        if (node.kind is Kind.DIRECTORY) != stat.S_ISDIR(mode):
            raise UsageError(f"{shown(b'/'.join(path))} is there, and something else: remove it")
        if not force and node.kind is not Kind.DIRECTORY:
            raise UsageError(f"{shown(b'/'.join(path))} is there: replace files with --force")


@contextmanager
def _directory(root: int, path: Path) -> Iterator[int]:
    """The descriptor of a directory below the target, reached through no link."""
    fd = os.dup(root)
    try:
        for part in path:
            below = os.open(part, _DIRECTORY, dir_fd=fd)
            os.close(fd)
            fd = below
        yield fd
    finally:
        os.close(fd)


class _Writer:
    def __init__(
        self, fs: Filesystem, root: int, limits: Limits, advance: Callable[[int], None]
    ) -> None:
        self._fs = fs
        self._root = root
        self._limits = limits
        self._advance = advance
        self._first: dict[tuple[int, int], Path] = {}  # of the hard links of an inode

    def write(self, plan: _Plan) -> Done:
        files = done = 0
        directories = []
        for path, node in plan.entries:
            raise_if_interrupted()
            with _directory(self._root, path[:-1]) as folder:
                if node.kind is Kind.DIRECTORY:
                    with suppress(FileExistsError):
                        os.mkdir(path[-1], 0o700, dir_fd=folder)
                    directories.append((path, node))
                elif node.kind is Kind.LINK:
                    self._put(folder, path, partial(self._link, folder, node))
                    files += 1
                else:
                    done += self._file(folder, path, node)
                    files += 1
        for path, node in reversed(directories):  # their times, after what is in them
            with _directory(self._root, path) as folder:
                os.fchmod(folder, node.mode & 0o777 | 0o700)
                os.utime(folder, ns=(node.mtime, node.mtime))
        return Done(files, done, plan.left_out, plan.unreadable)

    def _put(self, folder: int, path: Path, make: Callable[[bytes], None]) -> None:
        """Make something under a temporary name, then give it its own."""
        part = f".qcow2snap-{secrets.token_hex(8)}.part".encode()
        try:
            make(part)
            if self._limits.force:
                os.rename(part, path[-1], src_dir_fd=folder, dst_dir_fd=folder)
                return
            try:
                os.link(part, path[-1], src_dir_fd=folder, dst_dir_fd=folder, follow_symlinks=False)
            except FileExistsError:
                raise UsageError(f"{shown(b'/'.join(path))} is there now") from None
            except OSError:  # a filesystem without hard links
                os.rename(part, path[-1], src_dir_fd=folder, dst_dir_fd=folder)
        finally:
            with suppress(FileNotFoundError):
                os.unlink(part, dir_fd=folder)

    def _link(self, folder: int, node: Node, part: bytes) -> None:
        os.symlink(self._fs.link(node), part, dir_fd=folder)
        with suppress(OSError):
            os.utime(part, ns=(node.mtime, node.mtime), dir_fd=folder, follow_symlinks=False)

    def _file(self, folder: int, path: Path, node: Node) -> int:
        first = self._first.get(node.key)
        written = 0

        def copy(part: bytes) -> None:
            nonlocal written
            fd = os.open(part, _NEW, 0o600, dir_fd=folder)
            try:
                written = self._content(fd, node)
            finally:
                os.close(fd)

        def link(part: bytes) -> None:
            assert first is not None
            with _directory(self._root, first[:-1]) as other:
                os.link(first[-1], part, src_dir_fd=other, dst_dir_fd=folder, follow_symlinks=False)

        if first is not None:
            try:
                self._put(folder, path, link)
                return 0
            except OSError:
                pass  # a filesystem without hard links
        self._put(folder, path, copy)
        if node.links > 1:
            self._first[node.key] = path
        return written

    def _content(self, fd: int, node: Node) -> int:
        written = 0
        for offset, piece in self._fs.chunks(node):
            raise_if_interrupted()
            view, at = memoryview(piece), 0
            while at < len(view):
                at += os.pwrite(fd, view[at:], offset + at)
            written += at
            self._advance(at)
        os.ftruncate(fd, node.size)
        os.fchmod(fd, node.mode & 0o777)
        os.utime(fd, ns=(node.mtime, node.mtime))
        if self._limits.force:  # after a crash there is what it replaces, or all of this
            os.fsync(fd)
        return written
