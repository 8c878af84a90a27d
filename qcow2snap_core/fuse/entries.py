"""What the tree is made of: files, directories and links that can be asked.

No word of FUSE: an entry answers or raises, in any thread.
"""

from __future__ import annotations

import os
import stat
from asyncio import Lock
from collections.abc import Callable, Sequence
from typing import Final, NamedTuple, Protocol

from ..errors import Error, escaped
from ..files.tree import Kind, Node
from ..image.disk import Disk
from .volume import Damaged, NotThere, Path, Volume

_TYPES: Final = {
    Kind.FILE: stat.S_IFREG,
    Kind.DIRECTORY: stat.S_IFDIR,
    Kind.LINK: stat.S_IFLNK,
    Kind.FIFO: stat.S_IFIFO,
    Kind.SOCKET: stat.S_IFSOCK,
    Kind.CHARACTER: stat.S_IFCHR,
    Kind.BLOCK: stat.S_IFBLK,
}


class Attributes(NamedTuple):
    """What ``ls -l`` shows."""

    mode: int
    size: int  #: bytes
    mtime: int  #: nanoseconds since 1970
    ctime: int
    uid: int
    gid: int
    links: int


class Children(NamedTuple):
    """What is in a directory, as it was when it was asked: no entry is made before it is wanted."""

    names: Sequence[bytes]
    entry: Callable[[bytes], Entry]  #: for one of the names; raises nothing


class Readable(Protocol):
    """An open file."""

    def pread(self, offset: int, length: int) -> bytes | bytearray:
        """Fewer bytes at its end."""


class Owner(Protocol):
    """The snapshot that something belongs to."""

    @property
    def date(self) -> int:
        """Nanoseconds since 1970."""


class Entry:
    """A file, directory or link of the tree.  Everything raises SnapshotGone, and other errors for
    what cannot be read."""

    #: is held while it is asked; None where nobody has to wait
    turn: Lock | None = None
    #: what its inode number goes by; hard links of a guest have one in common
    key: object
    #: whose it is; None for the root
    owner: Owner | None = None
    #: the filesystem that it is in, if it is a guest's
    volume: Volume | None = None

    @property
    def path(self) -> str:
        """How error lines call it."""
        raise NotImplementedError

    def attributes(self) -> Attributes:
        raise NotImplementedError

    def child(self, name: bytes) -> Entry:
        """Raises NotThere."""
        raise NotThere

    def children(self) -> Children:
        raise NotThere

    def described(self, children: Sequence[Entry]) -> list[Attributes]:
        """The attributes of some of its children."""
        return [child.attributes() for child in children]

    def open(self) -> Readable:
        raise NotThere

    def target(self) -> bytes:
        raise NotThere


class Made(Entry):
    """One that is not a guest's: it belongs to who mounts, and has the snapshot's date."""

    def __init__(self, owner: Owner | None, path: str, mode: int, size: int = 0):
        self.owner = owner
        self.key = self
        self._path = path
        self._mode = mode
        self._size = size

    @property
    def path(self) -> str:
        return self._path

    def attributes(self) -> Attributes:
        when = 0 if self.owner is None else self.owner.date
        return Attributes(self._mode, self._size, when, when, os.getuid(), os.getgid(), 1)


class Folder(Made):
    """A directory whose content is known."""

    def __init__(self, owner: Owner | None, path: str) -> None:
        super().__init__(owner, path, stat.S_IFDIR | 0o555)
        self.entries: dict[bytes, Entry] = {}

    def add(self, name: str, entry: Entry) -> None:
        self.entries[os.fsencode(name)] = entry

    def child(self, name: bytes) -> Entry:
        found = self.entries.get(name)
        if found is None:
            raise NotThere
        return found

    def children(self) -> Children:
        entries = dict(self.entries)
        return Children(list(entries), entries.__getitem__)


class Note(Made):
    """A file with a line that says why something cannot be shown."""

    def __init__(self, owner: Owner | None, path: str, why: Error) -> None:
        self._text = f"{why}\n".encode("utf-8", "backslashreplace")
        super().__init__(owner, path, stat.S_IFREG | 0o444, len(self._text))

    def open(self) -> Readable:
        return self

    def pread(self, offset: int, length: int) -> bytes:
        return self._text[offset : offset + length]


class Bytes(Made):
    """A snapshot's disk, or VM state, as a file.  Any number of threads read it at once."""

    def __init__(self, owner: Owner, path: str, disk: Disk) -> None:
        super().__init__(owner, path, stat.S_IFREG | 0o444, disk.size)
        self._disk = disk

    def open(self) -> Readable:
        self._disk.confirm()
        return self

    def pread(self, offset: int, length: int) -> bytearray:
        data = bytearray(max(0, min(length, self._disk.size - offset)))
        if data:
            self._disk.pread_into(data, offset)
        return data


class Guest(Entry):
    """A file, directory or link in a guest's filesystem.  What it is does not change, so its
    attributes are kept, and no library is asked for them again; the guard is."""

    owner: Owner
    volume: Volume

    def __init__(
        self,
        owner: Owner,
        volume: Volume,
        place: str,
        path: Path,
        node: Node | Damaged,
    ) -> None:
        """``place`` is where the filesystem is in the tree, ``node`` what is at ``path`` in it."""
        self.owner = owner
        self.turn = volume.turn
        self.volume = volume
        self._place = place
        self._path = path
        self._attributes = _attributes(node)
        self.key = volume, path
        if isinstance(node, Node) and node.kind is Kind.FILE and node.links > 1:
            self.key = volume, node.key

    @property
    def path(self) -> str:
        return "/".join((self._place, *map(escaped, self._path)))

    def attributes(self) -> Attributes:
        self.volume.confirm()
        return self._attributes

    def child(self, name: bytes) -> Entry:
        return self._below(name, self.volume.node((*self._path, name)))

    def children(self) -> Children:
        listing = self.volume.listing(self._path)
        return Children(list(listing), lambda name: self._below(name, listing[name]))

    def described(self, children: Sequence[Entry]) -> list[Attributes]:
        found = [child._attributes for child in children if isinstance(child, Guest)]
        assert len(found) == len(children)
        self.volume.confirm()
        return found

    def open(self) -> Readable:
        return self.volume.open(self._path)

    def target(self) -> bytes:
        return self.volume.target(self._path)

    def _below(self, name: bytes, node: Node | Damaged) -> Entry:
        return Guest(self.owner, self.volume, self._place, (*self._path, name), node)


def _attributes(node: Node | Damaged) -> Attributes:
    if isinstance(node, Damaged):
        return Attributes(stat.S_IFREG, 0, 0, 0, 0, 0, 1)
    mode = _TYPES[node.kind] | node.mode & 0o7777
    return Attributes(
        mode, node.size, node.mtime, node.ctime, node.uid, node.gid, max(1, node.links)
    )
