"""Filesystems through The Sleuth Kit, that is pytsk3: ext, NTFS, FAT and exFAT.

libtsk is a tool for forensics: it lists what was deleted, adds files of its own making, and reads
what a driver would refuse.  All that is left out here.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

from ..errors import ImageError, shown
from . import kinds
from .tree import Kind, Node, Unreadable
from .window import Window, judged

_PIECE: Final = 1 << 20
_PATH_MAX: Final = 4096
_ALLOCATED: Final = 1  # TSK_FS_NAME_FLAG_ALLOC and TSK_FS_META_FLAG_ALLOC
_TYPES: Final = {  # TSK_FS_META_TYPE_*
    1: Kind.FILE,
    2: Kind.DIRECTORY,
    3: Kind.FIFO,
    4: Kind.CHARACTER,
    5: Kind.BLOCK,
    6: Kind.LINK,
    8: Kind.SOCKET,
}
_VIRTUAL: Final = (10, 11)  # $MBR, $OrphanFiles: libtsk's own
_DATA: Final = (1, 128)  # TSK_FS_ATTR_TYPE_DEFAULT, _NTFS_DATA
_REPARSE: Final = 192
_ENCRYPTED, _COMPRESSED = 0x10, 0x20  # TSK_FS_ATTR_ENC, _COMP
_FILLER, _HOLE = 1, 3  # TSK_FS_ATTR_RUN_FLAG_*: what no run was found for, and a hole
_NTFS_OWN: Final = 16  # MFT records up to here are the filesystem's own files


class Sleuthkit:
    """A filesystem that libtsk reads from a window."""

    def __init__(self, window: Window, kind: str) -> None:
        """Raises ImageError, and ImportError where pytsk3 is missing."""
        import pytsk3

        class Image(pytsk3.Img_Info):  # type: ignore[misc]
            def __init__(self) -> None:
                super().__init__(url="", type=pytsk3.TSK_IMG_TYPE_EXTERNAL)

            def read(self, offset: int, size: int) -> bytes:
                return window.pread(offset, size)

            def get_size(self) -> int:
                return window.length

        self.kind = kind
        self._window = window
        # Holes of ext files have no runs, but what NTFS lists has.
        self._lost = 0 if kind == kinds.EXT else _FILLER
        self._image = Image()
        with judged(window, f"the {kind} filesystem"):
            self._fs = pytsk3.FS_Info(self._image)
            self._block_size = int(self._fs.info.block_size)

    def root(self) -> Node:
        with judged(self._window, "the root directory"):
            file = self._fs.open_meta(inode=self._fs.info.root_inum)
            return self._node(b"", file)

    def inode(self, number: int) -> Node:
        """A file without a name, such as a journal."""
        with judged(self._window, f"inode {number}"):
            return self._node(b"", self._fs.open_meta(inode=number))

    def children(self, node: Node) -> Iterator[Node]:
        with judged(self._window, f"the directory {shown(node.name)}"):
            for file in self._fs.open_dir(inode=node.key[1]):
                info = file.info.name
                name = bytes(info.name)
                if name in (b".", b"..") or not int(info.flags) & _ALLOCATED:
                    continue
                meta = file.info.meta
                if meta is None:
                    raise ImageError(f"the inode of {shown(name)} cannot be read")
                if int(meta.type) in _VIRTUAL or self._is_own(int(meta.addr)):
                    continue
                if not int(meta.flags) & _ALLOCATED:
                    raise ImageError(f"the inode of {shown(name)} is not in use")
                yield self._node(name, file)

    def link(self, node: Node) -> bytes:
        # A short target stands in the inode, and libtsk reads zeros in its place as content; a long
        # one is content, and libtsk may not have it as a target.
        with judged(self._window, f"the link {shown(node.name)}"):
            target = node.handle.info.meta.link
            if isinstance(target, str):
                target = target.encode("utf-8", "surrogateescape")
            if not target:
                target = node.handle.read_random(0, min(node.size, _PATH_MAX))
            if not target or len(target) != node.size or b"\0" in target:
                raise Unreadable(f"the link {shown(node.name)} cannot be read")
            return bytes(target)

    def stored(self, node: Node) -> int:
        return sum(length for _, length in self.ranges(node))

    def chunks(self, node: Node) -> Iterator[tuple[int, bytes]]:
        for start, length in self.ranges(node):
            offset, end = start, start + length
            while offset < end:
                piece = self.pread(node, offset, min(_PIECE, end - offset))
                if not piece:
                    raise ImageError(f"{shown(node.name)} ends early, at {offset} of {node.size}")
                yield offset, piece
                offset += len(piece)

    def pread(self, node: Node, offset: int, length: int) -> bytes:
        with judged(self._window, shown(node.name)):
            return bytes(node.handle.read_random(offset, length))

    def ranges(self, node: Node) -> list[tuple[int, int]]:
        """Where a file may have data.  Raises Unreadable for what libtsk would make up."""
        if not node.size:
            return []
        found: list[tuple[int, int]] = []
        with judged(self._window, shown(node.name)):
            data = None
            for attribute in node.handle:
                kind, flags = int(attribute.info.type), int(attribute.info.flags)
                if kind == _REPARSE and self.kind == kinds.NTFS:
                    tag = node.handle.read_random(0, 4, kind, int(attribute.info.id))
                    number = int.from_bytes(tag, "little")
                    raise Unreadable(
                        f"{shown(node.name)} has its content elsewhere: reparse tag {number:#010x}"
                    )
                if kind in _DATA and not attribute.info.name:
                    if flags & _ENCRYPTED:
                        raise Unreadable(f"{shown(node.name)} is encrypted by the guest")
                    data = attribute
            if data is None:
                if self.kind == kinds.EXT:  # inline data
                    return [(0, node.size)]
                raise ImageError(f"{shown(node.name)} has no content")
            end = 0
            for run in data:
                start, length = (int(x) * self._block_size for x in (run.offset, run.len))
                if start != end or int(run.flags) & self._lost:
                    raise ImageError(f"{shown(node.name)} has lost a part of its content")
                end = start + length
                if not int(run.flags) & _HOLE and start < node.size:
                    found.append((start, min(end, node.size) - start))
            if end < node.size:
                found.append((end, node.size - end))
            if int(data.info.flags) & _COMPRESSED:  # the runs are not where the content is
                return [(0, node.size)]
        return found

    def _is_own(self, inode: int) -> bool:
        return self.kind == kinds.NTFS and inode < _NTFS_OWN and inode != 5

    def check(self) -> None:
        self._window.check()

    def _node(self, name: bytes, file: Any) -> Node:
        meta = file.info.meta
        return Node(
            name,
            _TYPES.get(int(meta.type), Kind.OTHER),
            int(meta.size),
            int(meta.mode) & 0o7777,
            int(meta.uid),
            int(meta.gid),
            int(meta.mtime) * 10**9 + int(meta.mtime_nano),
            int(meta.ctime) * 10**9 + int(meta.ctime_nano),
            int(meta.nlink),
            (0, int(meta.addr)),
            file,
        )
