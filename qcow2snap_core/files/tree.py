"""A guest's filesystem as all back ends show it, and the ways through it.

Everything in it is a guest's word.  A name may be ``..`` or hold a slash, a link may lead in
circles, and in a damaged filesystem a directory may contain itself, or lie in two others, each of
which in two others: that makes endless trees of few blocks.  So a directory is entered once.
"""

from __future__ import annotations

from collections.abc import Iterator
from enum import Enum
from typing import Any, Final, NamedTuple, Protocol

from ..errors import ImageError, UsageError, shown
from ..util.units import counted
from .kinds import CASELESS

_MOST_LINKS: Final = 40  # as the kernel
_DEEPEST: Final = 1000  # directories
#: How many entries a walk goes through unless told otherwise
MOST_ENTRIES: Final = 1_000_000


class Kind(Enum):
    """What an entry is; the letters are those of ``ls``."""

    FILE = "-"
    DIRECTORY = "d"
    LINK = "l"
    FIFO = "p"
    SOCKET = "s"
    CHARACTER = "c"
    BLOCK = "b"
    OTHER = "?"


class Node(NamedTuple):
    """An entry of a directory."""

    name: bytes
    kind: Kind
    size: int  #: bytes, as the guest sees it
    mode: int  #: permission bits, with setuid, setgid and sticky
    uid: int
    gid: int
    mtime: int  #: nanoseconds since 1970
    ctime: int
    links: int
    key: tuple[int, int]  #: subvolume and inode number: what hard links share
    handle: Any  #: the back end's own


class Unreadable(ImageError):
    """A file whose content is not to be had, such as an encrypted one; others may be."""


class Filesystem(Protocol):
    """What a back end offers.  Everything raises ImageError for what is damaged, and whatever
    reading the disk raises."""

    kind: str

    def root(self) -> Node:
        """The root directory."""

    def children(self, node: Node) -> Iterator[Node]:
        """The entries of a directory, without ``.`` and ``..``."""

    def link(self, node: Node) -> bytes:
        """Where a symbolic link leads."""

    def ranges(self, node: Node) -> list[tuple[int, int]]:
        """Where a file may have data, as (offset, length), ascending; what is between is zeros.

        Raises Unreadable too.
        """

    def stored(self, node: Node) -> int:
        """The bytes of a file that :meth:`chunks` will give, about."""

    def chunks(self, node: Node) -> Iterator[tuple[int, bytes]]:
        """A file's content as offsets and bytes, ascending; what is between them is zeros.

        Raises Unreadable too, and ends only when all of it was there.
        """

    def pread(self, node: Node, offset: int, length: int) -> bytes:
        """A part of one of a file's :meth:`ranges`; it may be cut short."""

    def check(self) -> None:
        """Raises what reading the disk has once failed with; nothing more can be asked then."""


def is_safe(name: bytes) -> bool:
    """Whether it can be the name of a file."""
    return name not in (b"", b".", b"..") and b"/" not in name and b"\0" not in name


def find(fs: Filesystem, path: bytes) -> Node:
    """The entry at a path, links followed inside of the guest's tree, as in a chroot.

    Raises UsageError when there is none.
    """
    trail = [fs.root()]
    parts = path.split(b"/")[::-1]
    links = 0
    while parts:
        part = parts.pop()
        if part in (b"", b"."):
            continue
        if part == b"..":
            del trail[max(1, len(trail) - 1) :]
            continue
        node = _child(fs, trail[-1], part, path)
        if node.kind is Kind.LINK:
            links += 1
            if links > _MOST_LINKS:
                raise UsageError(f"too many symbolic links on the way to {shown(path)}")
            target = fs.link(node)
            if target.startswith(b"/"):
                del trail[1:]
            parts += target.split(b"/")[::-1]
        else:
            trail.append(node)
    return trail[-1]


def _child(fs: Filesystem, parent: Node, name: bytes, path: bytes) -> Node:
    if parent.kind is not Kind.DIRECTORY:
        raise UsageError(f"{shown(parent.name)} in {shown(path)} is no directory")
    alike = None
    for node in fs.children(parent):
        if node.name == name:
            return node
        if fs.kind in CASELESS and _lower(node.name) == _lower(name):
            alike = node
    if alike is None:
        raise UsageError(f"there is no {shown(name)} on the way to {shown(path)}: see ls")
    return alike


def _lower(name: bytes) -> str:
    return name.decode("utf-8", "surrogateescape").casefold()


def walk(
    fs: Filesystem, top: Node, most: int = MOST_ENTRIES
) -> Iterator[tuple[tuple[bytes, ...], Node]]:
    """All that is below a directory, each with its path from there, a directory before what is in
    it, names in order.

    Raises ImageError when a directory is met twice, is too deep or has a name twice, and UsageError
    when there are more than ``most`` entries.
    """
    seen = {top.key}
    count = 0
    pending: list[tuple[tuple[bytes, ...], Node]] = []
    if top.kind is Kind.DIRECTORY:
        pending.append(((), top))
    while pending:
        path, directory = pending.pop()
        if directory is not top:
            yield path, directory
        if directory.kind is not Kind.DIRECTORY:
            continue
        if len(path) > _DEEPEST:
            raise ImageError(f"directories are more than {_DEEPEST} deep")
        below = []
        names = set()
        for node in fs.children(directory):
            count += 1
            if count > most:
                there = counted(most, "entry", "entries")
                raise UsageError(f"there are more than {there}: allow more by --max-files")
            here = (*path, node.name)
            if node.name in names:
                raise ImageError(f"the name {shown(b'/'.join(here))} is there twice")
            names.add(node.name)
            if node.kind is Kind.DIRECTORY:
                if node.key in seen:
                    raise ImageError(f"the directory {shown(b'/'.join(here))} is in two places")
                seen.add(node.key)
            below.append((here, node))
        pending += sorted(below, key=lambda each: each[1].name, reverse=True)
