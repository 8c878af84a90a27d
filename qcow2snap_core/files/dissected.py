"""Filesystems through dissect: XFS, Btrfs, ext, and LVM's volumes; optional, from PyPI.

It is Python throughout: damage shows as any exception, never as a crash.  Names are text there,
and what is not UTF-8 came from bytes by surrogateescape.
"""

from __future__ import annotations

import importlib
import io
import stat
from collections.abc import Iterator
from typing import Any, Final

from ..errors import ImageError, UsageError, shown
from . import kinds
from .tree import Kind, Node
from .window import Window, judged

_PIECE: Final = 1 << 20
_BUFFER: Final = 1 << 16  # it reads a sector or a block at a time
_CLASSES: Final = {
    kinds.EXT: ("extfs", "ExtFilesystem"),
    kinds.XFS: ("xfs", "XfsFilesystem"),
    kinds.BTRFS: ("btrfs", "BtrfsFilesystem"),
    kinds.NTFS: ("ntfs", "NtfsFilesystem"),
    kinds.EXFAT: ("exfat", "ExfatFilesystem"),
    kinds.FAT: ("fat", "FatFilesystem"),
}
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
        return node.size

    def chunks(self, node: Node) -> Iterator[tuple[int, bytes]]:
        with judged(self._window, shown(node.name)):
            file = node.handle.open() if node.size else io.BytesIO()
        offset = 0
        while offset < node.size:
            with judged(self._window, shown(node.name)):
                piece = file.read(min(_PIECE, node.size - offset))
            if not piece:
                raise ImageError(f"{shown(node.name)} ends early, at {offset} of {node.size}")
            if piece.count(0) != len(piece):  # it does not say where the holes are
                yield offset, piece
            offset += len(piece)

    def pread(self, node: Node, offset: int, length: int) -> bytes:
        with judged(self._window, shown(node.name)):
            file = node.handle.open()
            file.seek(offset)
            return bytes(file.read(length))

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
