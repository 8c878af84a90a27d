"""Filesystems through dissect: XFS, Btrfs, ext, and LVM's volumes; optional, from PyPI.

It is Python throughout: damage shows as any exception, never as a crash.  Names are text there,
and what is not UTF-8 came from bytes by surrogateescape.

Where a file has data is asked for first, and only that is read.  It makes a sparse file of
terabytes cheap, and it keeps out two kinds of wrong bytes of versions up to 3.15: what an XFS
extent that was allocated and never written had before, and block 0 in place of the hole at the end
of a file without extents.
"""

from __future__ import annotations

import importlib
import io
import stat
from collections.abc import Iterator
from typing import Any, Final

from ..errors import ImageError, UsageError, shown
from . import kinds
from .tree import Kind, Node, Unreadable
from .window import Window, judged

_PIECE: Final = 1 << 20
_BUFFER: Final = 1 << 16  # it reads a sector or a block at a time
_CLASSES: Final = {
    kinds.EXT: ("extfs", "ExtFilesystem"),
    kinds.XFS: ("xfs", "XfsFilesystem"),
    kinds.BTRFS: ("btrfs", "BtrfsFilesystem"),
}
_EXT_EXTENTS: Final = 0x80000  # EXT4_EXTENTS_FL
_EXT_UNWRITTEN: Final = 0x8000  # more blocks than this, less it: EXT_INIT_MAX_LEN
_MOST_BLOCKS: Final = 1 << 24  # of each there is a number in memory
_XFS_REALTIME: Final = 1  # XFS_DIFLAG_REALTIME
_XFS_LOCAL: Final = 1  # XFS_DINODE_FMT_LOCAL
_TYPES: Final = {
    stat.S_IFREG: Kind.FILE,
    stat.S_IFDIR: Kind.DIRECTORY,
    stat.S_IFLNK: Kind.LINK,
    stat.S_IFIFO: Kind.FIFO,
    stat.S_IFSOCK: Kind.SOCKET,
    stat.S_IFCHR: Kind.CHARACTER,
    stat.S_IFBLK: Kind.BLOCK,
}


class Dissect:
    """A filesystem that dissect reads from a window."""

    def __init__(self, window: Window, kind: str) -> None:
        """Raises ImageError, and ImportError where dissect.target or the part for this filesystem
        is missing."""
        module, name = _CLASSES[kind]
        filesystem = importlib.import_module(f"dissect.target.filesystems.{module}")
        self.kind = kind
        self._window = window
        with judged(window, f"the {kind} filesystem"):
            self._fs = getattr(filesystem, name)(_buffered(window))
            self._root = self._node(b"", self._fs.get("/"))

    def root(self) -> Node:
        return self._root

    def inode(self, number: int) -> Node:
        """A file of an ext filesystem without a name, such as a journal."""
        with judged(self._window, f"inode {number}"):
            module = importlib.import_module("dissect.target.filesystems.extfs")
            inode = self._fs.extfs.get(number)
            return self._node(b"", module.ExtFilesystemEntry(self._fs, "", inode))

    def children(self, node: Node) -> Iterator[Node]:
        with judged(self._window, f"the directory {shown(node.name)}"):
            for found in node.handle.scandir():
                entry = found.get()
                yield self._node(_bytes(found.name), entry)

    def link(self, node: Node) -> bytes:
        with judged(self._window, f"the link {shown(node.name)}"):
            return _bytes(node.handle.readlink())

    def stored(self, node: Node) -> int:
        return sum(length for _, length in self.ranges(node))

    def chunks(self, node: Node) -> Iterator[tuple[int, bytes]]:
        for start, length in self.ranges(node):
            offset, end = start, start + length
            with judged(self._window, shown(node.name)):
                file = node.handle.open()
                file.seek(start)
            while offset < end:
                with judged(self._window, shown(node.name)):
                    piece = file.read(min(_PIECE, end - offset))
                if not piece:
                    raise ImageError(f"{shown(node.name)} ends early, at {offset} of {node.size}")
                yield offset, piece
                offset += len(piece)

    def ranges(self, node: Node) -> list[tuple[int, int]]:
        """Where a file has data, in bytes; neighbours are put together."""
        found: list[tuple[int, int]] = []
        with judged(self._window, shown(node.name)):
            if self.kind == kinds.EXT and node.size:
                self._ensure_short(node)
            for start, length in self._extents(node.handle.entry, node.size):
                end = min(start + length, node.size)
                before = sum(found[-1]) if found else -1
                if before > start:
                    raise ImageError(f"{shown(node.name)} has extents that overlap")
                if before == start:
                    found[-1] = found[-1][0], end - found[-1][0]
                elif start < end:
                    found.append((start, end - start))
        return found

    def _extents(self, inode: Any, size: int) -> Iterator[tuple[int, int]]:
        if not size:
            return
        if self.kind == kinds.XFS:
            yield from self._xfs_extents(inode, size)
        elif self.kind == kinds.EXT:
            offset, block_size = 0, self._fs.extfs.block_size
            for block, count in inode.dataruns():
                if block:  # block 0 is never a file's
                    yield offset, count * block_size
                offset += count * block_size
        else:
            offset = 0
            extents = inode.extents()
            if extents is None:  # it stands in the tree
                yield 0, size
                return
            for extent in extents:
                if extent.disk_offset:
                    yield offset, extent.length
                offset += extent.length

    def _ensure_short(self, node: Node) -> None:
        """Before all of a file's runs are in memory: a tree of extents may lead to the same ones
        again and again, and a file without extents may be as long as it likes.

        Raises ImageError for the former, Unreadable for the latter.
        """
        inode = node.handle.entry
        if not inode.inode.i_flags & _EXT_EXTENTS:
            if node.size > _MOST_BLOCKS * self._fs.extfs.block_size:
                raise Unreadable(
                    f"{shown(node.name)} has no extents and too many blocks for dissect"
                )
            return
        module = importlib.import_module("dissect.extfs.extfs")
        end = 0
        for extent in module._parse_extents(inode, io.BytesIO(inode.inode.i_block)):
            if extent.ee_block < end:
                raise ImageError(f"{shown(node.name)} has extents that overlap")
            end = extent.ee_block + extent.ee_len % _EXT_UNWRITTEN

    def _xfs_extents(self, inode: Any, size: int) -> Iterator[tuple[int, int]]:
        if inode.inode.di_flags & _XFS_REALTIME:
            raise Unreadable("its content is on an XFS realtime device")
        if inode.inode.di_format == _XFS_LOCAL:
            yield 0, size
            return
        block_size = self._fs.xfs.block_size
        for offset, _, count, unwritten in inode._iter_blocks():
            if not unwritten:
                yield offset * block_size, count * block_size

    def pread(self, node: Node, offset: int, length: int) -> bytes:
        with judged(self._window, shown(node.name)):
            file = node.handle.open()
            file.seek(offset)
            return bytes(file.read(length))

    def check(self) -> None:
        self._window.check()

    def _node(self, name: bytes, entry: Any) -> Node:
        found = entry.lstat()
        subvolume = getattr(getattr(entry.entry, "subvolume", None), "objectid", 0)
        return Node(
            name,
            _TYPES.get(stat.S_IFMT(found.st_mode), Kind.OTHER),
            found.st_size,
            stat.S_IMODE(found.st_mode),
            found.st_uid,
            found.st_gid,
            found.st_mtime_ns,
            found.st_ctime_ns,
            found.st_nlink,
            (subvolume, found.st_ino),
            entry,
        )


def logical_volumes(devices: list[Window]) -> dict[str, io.RawIOBase]:
    """LVM's volumes as ``VG/LV``, out of physical volumes that are all of one disk.

    Raises UsageError where dissect is missing, ImageError for damage.
    """
    try:
        lvm = importlib.import_module("dissect.volume.lvm")
    except ImportError:
        raise UsageError(
            "the disk has LVM volumes: pip install dissect.target dissect.volume to read them"
        ) from None
    found: dict[str, io.RawIOBase] = {}
    for device in devices:  # volume groups that span several disks are not for one disk to show
        with judged(device, "LVM's metadata"):
            group = lvm.LVM2(_buffered(device)).vg
            for volume in group.lv:
                if volume.is_visible:
                    found[f"{group.name}/{volume.name}"] = volume.open()
    return found


def _buffered(window: Window) -> io.BufferedReader:
    """Of a window of its own, which is closed with it."""
    return io.BufferedReader(Window(window, 0, window.length), _BUFFER)


def _bytes(name: str) -> bytes:
    try:
        return name.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:  # half a character of NTFS
        return name.encode("utf-8", "surrogatepass")
