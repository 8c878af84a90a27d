"""A filesystem in a snapshot, asked by paths for as long as a mount lasts.

What the libraries give for a file is bound to the filesystem as they have opened it, and that ends
with the first read that fails (:mod:`..files.window`): for a mount of days, one bad cluster must
not be the end.  So here everything goes by its path: listings are kept while there is room, and
after a failure the filesystem is opened anew and listed again.

Everything in it is a guest's word (:mod:`..files.tree`).  A name that no file can have is escaped.
What is damaged is shown, and cannot be opened: to leave it out would be to lose it silently.  A
link is shown so that the host's kernel, which follows it, arrives where the guest would: an
absolute one, or one that climbs above the root, would lead to the host's own files.
"""

from __future__ import annotations

from asyncio import Lock
from collections.abc import Callable, Mapping
from typing import Final, NamedTuple, TypeVar

from ..errors import Error, ImageError, shown
from ..files.content import Content
from ..files.extract import stays_inside
from ..files.tree import Filesystem, Kind, Node, Unreadable, is_safe
from ..files.volumes import How, open_filesystem
from ..image.disk import Disk

_T = TypeVar("_T")
Path = tuple[bytes, ...]
Key = tuple[int, int]  # of a node

_DEEPEST: Final = 1000  # directories
_MOST_LINKS: Final = 40  # as the kernel
_LONGEST_NAME: Final = 1024  # bytes, FUSE_NAME_MAX
_LONGEST_TARGET: Final = 4095
_LARGEST: Final = (1 << 63) - 1
#: Entries of one directory: they are all in memory while it is shown
_MOST_ENTRIES: Final = 100_000
#: How many entries the listings that are kept may have, the last one not counted
_KEPT: Final = 50_000


class Damaged(NamedTuple):
    """An entry of a directory that cannot be used, and why."""

    why: str


Listing = Mapping[bytes, Node | Damaged]


class NotThere(Exception):
    """No such file."""


class Volume:
    """A filesystem of a disk: in the partition or LVM volume ``part``, or all of the disk.

    For one thread at a time, which :attr:`turn` is for.  Every method raises SnapshotGone when the
    snapshot was deleted, and otherwise ImageError for damage and whatever reading the disk raises.
    """

    def __init__(self, disk: Disk, snapshot: str, part: str | None, how: How) -> None:
        self.turn = Lock()
        self._disk = disk
        self._snapshot = snapshot
        self._part = part
        self._how = how
        self._opened: Filesystem | None = None
        self._times = 0  # that it was opened
        self._listings: dict[Path, Listing] = {}
        self._kept = 0  # their entries
        # Of directories, by their key: that of the one above, and the name there.  Paths would take
        # the more the deeper they are.
        self._places: dict[Key, tuple[Key | None, bytes]] = {}

    def confirm(self) -> None:
        """Ask the guard alone; in any thread."""
        self._disk.confirm()

    def node(self, path: Path) -> Node | Damaged:
        """What is at a path.  Raises NotThere; of the root, why the filesystem cannot be read at
        all, a UsageError if something can be done about that."""
        return self._ask(lambda fs: self._find(fs, path))

    def listing(self, path: Path) -> Listing:
        """A directory's entries, without ``.`` and ``..``, by the names that they are shown by."""
        return self._ask(lambda fs: self._list(fs, path))

    def open(self, path: Path) -> OpenFile:
        """A file to be read."""
        file = OpenFile(self, path)
        self._ask(file.content)
        return file

    def read(self, file: OpenFile, offset: int, length: int) -> bytearray:
        """A part of an open file, shorter at its end."""
        return self._ask(lambda fs: file.content(fs).pread(offset, length))

    def target(self, path: Path) -> bytes:
        """Where a symbolic link leads, inside of the guest's tree."""
        return self._ask(lambda fs: self._target(fs, path))

    def close(self) -> None:
        """Give its memory back until it is asked again."""
        self._drop()
        self._places.clear()

    @property
    def times(self) -> int:
        """That it was opened: what was had of a file before the last time is of no use."""
        return self._times

    # --- Inside ---

    def _ask(self, question: Callable[[Filesystem], _T]) -> _T:
        """The guard is asked last, and for every answer: a library may have it in its memory."""
        fs = None
        try:
            fs = self._filesystem()
            answer = question(fs)
        except (Error, NotThere):
            self._disk.confirm()  # if it is gone, that is the reason for anything
            try:
                if fs is not None:
                    fs.check()
            except Error:
                self._drop()
            raise
        self._disk.confirm()
        return answer

    def _drop(self) -> None:
        """Have it opened anew.  Which directories were met remains: a guest with a bad file in each
        of them could lead whoever walks through it into the same ones without an end."""
        self._opened = None
        self._listings.clear()
        self._kept = 0

    def _filesystem(self) -> Filesystem:
        if self._opened is None:
            self._opened = open_filesystem(self._disk, self._snapshot, self._part, self._how)
            self._times += 1
        return self._opened

    def _find(self, fs: Filesystem, path: Path) -> Node | Damaged:
        if not path:
            return self._root(fs)
        found = self._list(fs, path[:-1]).get(path[-1])
        if found is None:
            raise NotThere
        return found

    def _root(self, fs: Filesystem) -> Node:
        root = _usable(self._judged(None, b"", fs.root()))
        if root.kind is not Kind.DIRECTORY:
            raise ImageError("its root is no directory")
        return root

    def _list(self, fs: Filesystem, path: Path) -> Listing:
        """Of a directory; those on the way to it are listed as well where they are not kept."""
        if len(path) > _DEEPEST:
            raise ImageError(f"directories are more than {_DEEPEST} deep")
        depth = len(path)
        while depth and path[:depth] not in self._listings:
            depth -= 1
        listing = self._listings.get(path[:depth])
        if listing is None:
            listing = self._listed(fs, (), self._root(fs))
        for below in range(depth, len(path)):
            node = listing.get(path[below])
            if node is None:
                raise NotThere
            listing = self._listed(fs, path[: below + 1], _usable(node))
        return listing

    def _listed(self, fs: Filesystem, path: Path, directory: Node) -> Listing:
        if directory.kind is not Kind.DIRECTORY:
            raise ImageError("it is no directory")
        listing: dict[bytes, Node | Damaged] = {}
        for number, node in enumerate(fs.children(directory)):
            if number == _MOST_ENTRIES:
                raise ImageError(
                    f"a directory has more than {_MOST_ENTRIES} entries: qcow2snap ls lists it"
                )
            name = _possible(node.name)
            if name in listing:
                listing[name] = Damaged("the name is there twice")
            else:
                listing[name] = self._judged(directory.key, name, node)
        while self._listings and self._kept + len(listing) > _KEPT:
            self._kept -= len(self._listings.pop(next(iter(self._listings))))
        self._listings[path] = listing
        self._kept += len(listing)
        return listing

    def _judged(self, above: Key | None, name: bytes, node: Node) -> Node | Damaged:
        place = above, name
        if node.kind is Kind.DIRECTORY and self._places.setdefault(node.key, place) != place:
            return Damaged("the directory is in two places")
        if node.kind is Kind.OTHER:
            return Damaged("it is of an unknown kind")
        if not 0 <= node.size <= _LARGEST:
            return Damaged(f"it has {node.size} bytes: no file has")
        return node

    def _target(self, fs: Filesystem, path: Path) -> bytes:
        node = _usable(self._find(fs, path))
        target = _link(fs, node)
        depth = len(path) - 1
        if stays_inside(target, depth):
            return target
        inside = b"../" * depth + b"/".join(self._resolved(fs, path[:-1], target))
        if len(inside) > _LONGEST_TARGET:
            raise Unreadable("the link is too long where it is shown")
        return inside or b"."

    def _resolved(self, fs: Filesystem, directory: Path, target: bytes) -> Path:
        """Where a link leads, as in a chroot: a path without links but for its last part, and up to
        the first part that is not there, where the kernel will stop."""
        trail = [] if target.startswith(b"/") else list(directory)
        parts = _parts(target)
        links = 0
        while parts:
            part = parts.pop()
            if part == b"..":
                del trail[-1:]
                continue
            trail.append(part)
            if not parts:
                break
            try:
                node = self._find(fs, tuple(trail))
            except NotThere:
                break
            if isinstance(node, Damaged):
                break
            if node.kind is Kind.DIRECTORY:
                continue
            if node.kind is not Kind.LINK:
                break
            links += 1
            if links > _MOST_LINKS:
                raise Unreadable("too many symbolic links on the way")
            del trail[-1:]
            onwards = _link(fs, node)
            if onwards.startswith(b"/"):
                trail.clear()
            parts += _parts(onwards)
        rest = [p for p in reversed(parts) if p != b".."]  # it is not got to
        return (*trail, *(rest or [b"."] * bool(parts)))


class OpenFile:
    """What is kept of a file between reads."""

    def __init__(self, volume: Volume, path: Path) -> None:
        self._volume = volume
        self._path = path
        self._content: Content | None = None
        self._times = 0

    def content(self, fs: Filesystem) -> Content:
        """In the filesystem as it is open now."""
        if self._content is None or self._times != self._volume.times:
            node = _usable(self._volume._find(fs, self._path))
            self._content, self._times = Content(fs, node), self._volume.times
        return self._content

    def pread(self, offset: int, length: int) -> bytearray:
        return self._volume.read(self, offset, length)


def _usable(node: Node | Damaged) -> Node:
    if isinstance(node, Damaged):
        raise Unreadable(node.why)
    return node


def _link(fs: Filesystem, node: Node) -> bytes:
    target = fs.link(node)
    if not target or b"\0" in target or len(target) > _LONGEST_TARGET:
        raise Unreadable(f"the link {shown(node.name)} cannot be read")
    return target


def _parts(target: bytes) -> list[bytes]:
    """The last one first."""
    return [p for p in target.split(b"/") if p not in (b"", b".")][::-1]


def _possible(name: bytes) -> bytes:
    """A name as the kernel takes it."""
    if not is_safe(name):
        special = b"/\0." if name.strip(b".") == b"" else b"/\0"
        name = b"".join(b"%%%02X" % c if c in special else bytes([c]) for c in name) or b"%"
    return name[:_LONGEST_NAME]
