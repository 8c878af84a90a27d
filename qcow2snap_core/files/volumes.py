"""From a disk and what a user calls a part of it to a filesystem that is safe to believe.

Which library reads which filesystem was decided by what they read right (docs/files.md); what one
is known to read wrong it is not asked for.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final, NamedTuple

from ..errors import ImageError, UsageError, escaped, shown
from ..image.disk import Disk
from ..util.units import binary, counted
from . import journal, kinds
from .dissected import Dissect, logical_volumes
from .partitions import Partition, partitions
from .tree import Filesystem, Node, Unreadable
from .tsk import Sleuthkit
from .window import Window

BACKENDS: Final = ("tsk", "dissect")
_MAKE: Final[dict[str, Callable[[Window, str], Any]]] = {"tsk": Sleuthkit, "dissect": Dissect}
_PREFERRED: Final = {
    kinds.EXT: ("dissect", "tsk"),
    kinds.XFS: ("dissect",),
    kinds.BTRFS: ("dissect",),
    kinds.NTFS: ("tsk",),
    kinds.EXFAT: ("tsk",),
    kinds.FAT: ("tsk",),
}
_INSTALL: Final = {
    "tsk": "python3-tsk (Debian) or pytsk3 (pip)",
    "dissect": "dissect.target with dissect.{} (pip)",
}
_PARTS: Final = {kinds.EXT: "extfs"}

# Bits of an ext superblock's s_feature_incompat, with their names in the kernel's ext4.h
_RECOVER: Final = 0x4
_ENCRYPT: Final = 0x10000
_INLINE_DATA: Final = 0x8000
#: FILETYPE, RECOVER, META_BG, EXTENTS, 64BIT, MMP, FLEX_BG, EA_INODE, CSUM_SEED, LARGEDIR,
#: INLINE_DATA, CASEFOLD: what reading a file does not depend on, or what the tests read
_KNOWN: Final = 0x2 | _RECOVER | 0x10 | 0x40 | 0x80 | 0x100 | 0x200 | 0x400 | 0x2000 | 0x4000
_EXT_KNOWN: Final = _KNOWN | _INLINE_DATA | 0x20000
_BIGALLOC: Final = 0x200  # of s_feature_ro_compat
_JOURNAL_INODE: Final = 8
_NTFS_LOG: Final = 2


class How(NamedTuple):
    """What a user may want otherwise."""

    backend: str | None = None  #: one of BACKENDS
    ignore_journal: bool = False


def whole(disk: Disk) -> Window:
    """All of a disk."""
    return Window(disk.raw(), 0, disk.size)


def is_partitioned(disk: Window) -> bool:
    """Whether it is a table of partitions that it begins with, and no filesystem: FAT and NTFS have
    the same two bytes at the end of their first sector."""
    return kinds.kind_of(disk) is None


def parts(disk: Window) -> list[Partition]:
    """The partitions of a disk, as :func:`.partitions`; none if it begins with a filesystem."""
    return partitions(disk) if is_partitioned(disk) else []


def places(disk: Window) -> list[str | None]:
    """What of a disk may hold a filesystem, as :func:`open_filesystem` names it: partitions, or
    None for all of it; without those that are LVM's.  Raises ImageError for damage.
    """
    windows = _numbered(disk) or {None: disk}
    return [name for name, window in windows.items() if kinds.kind_of(window) != kinds.LVM]


def volumes(disk: Window) -> list[str]:
    """LVM's volumes in a disk, as ``VG/LV``.

    Raises UsageError where no library is there to read them, ImageError for damage.
    """
    found = (*_numbered(disk).values(), disk)
    devices = [window for window in found if kinds.kind_of(window) == kinds.LVM]
    return list(logical_volumes(devices)) if devices else []


def described(name: str, found: list[Partition]) -> str:
    """An error line that lists partitions; ``name`` is what a user would put before a number."""
    which = ", ".join(f"{name}{p.number} ({p.type}, {binary(p.length)})" for p in found)
    return f"this disk has {counted(len(found), 'partition')}: name one, {which}"


def open_filesystem(disk: Disk, snapshot: str, part: str | None, how: How = How()) -> Filesystem:  # noqa: B008
    """The filesystem in a disk, in the partition with a number, or in an LVM volume ``VG/LV``.

    Raises UsageError with what there is when ``part`` does not name one or is needed, and when no
    library is installed; ImageError for damage, and for what would not be read right.
    """
    window = _volume(whole(disk), snapshot, part)
    kind = kinds.kind_of(window)
    if kind is None:
        raise UsageError(
            "there is no filesystem that is known here: qcow2snap serve shows the disk to programs "
            "that may know it, like guestfish"
        )
    if kind not in kinds.READABLE:
        raise UsageError(f"there is {kind} in it, and no filesystem")
    back_ends = tuple(b for b in _PREFERRED[kind] if how.backend in (None, b))
    if not back_ends:
        raise UsageError(f"{how.backend} is not used for {kind} filesystems: leave --backend out")
    if kind == kinds.EXT:
        back_ends = _judge_ext(window, back_ends)
    filesystem = _opened(window, kind, back_ends)
    if kind == kinds.EXT and _incompatible(window) & _RECOVER and not how.ignore_journal:
        log = filesystem.inode(_JOURNAL_INODE)
        window.overlay(*journal.replayed(_reader(filesystem, log), log.size))
        filesystem = _opened(window, kind, back_ends)
    if not how.ignore_journal and _is_dirty(window, kind, filesystem):
        raise UsageError(
            f"the {kind} filesystem was in use, and its journal is not replayed here: "
            "--ignore-journal reads it as it lies, files that were changed last may be wrong"
        )
    return filesystem  # type: ignore[no-any-return]


def _numbered(disk: Window) -> dict[str | None, Window]:
    return {str(p.number): Window(disk, p.offset, p.length) for p in parts(disk)}


def _volume(disk: Window, snapshot: str, part: str | None) -> Window:
    found = parts(disk)
    places = {str(p.number): Window(disk, p.offset, p.length) for p in found}
    if part is not None and part in places:
        window = places[part]
        if kinds.kind_of(window) != kinds.LVM:
            return window
    elif not found and part is None:
        if kinds.kind_of(disk) != kinds.LVM:
            return disk
    elif part is None and len(found) > 1:
        physical = [n for n, w in places.items() if kinds.kind_of(w) == kinds.LVM]
        more = f"; {', '.join(physical)} holds LVM volumes" if physical else ""
        raise UsageError(described(f"{snapshot}:", found) + more)
    elif part is None:
        [window] = places.values()
        if kinds.kind_of(window) != kinds.LVM:
            return window
    devices = [w for w in (*places.values(), disk) if kinds.kind_of(w) == kinds.LVM]
    volumes = logical_volumes(devices) if devices else {}
    if part in volumes:
        volume = volumes[part]
        return Window(volume, 0, volume.seek(0, 2))
    names = ", ".join(f"{snapshot}:{name}" for name in (*places, *volumes))
    what = f"no {shown(part)} in this disk" if part else "this disk has several volumes"
    if not names:
        raise UsageError(f"{what}: it has no partitions, leave {shown(':' + (part or ''))} away")
    raise UsageError(f"{what}: name one, {names}")


def _opened(window: Window, kind: str, back_ends: tuple[str, ...]) -> Any:
    broken = ""
    for name in back_ends:
        try:
            return _MAKE[name](window, kind)
        except ModuleNotFoundError:
            continue
        except ImportError as e:  # dissect.target 3.25 with Python 3.14
            broken += f"; the {name} that is here does not load: {escaped(str(e))}"
    which = " or ".join(_INSTALL[b].format(_PARTS.get(kind, kind.lower())) for b in back_ends)
    raise UsageError(f"to read {kind} filesystems install {which}{broken}")


def _judge_ext(window: Window, back_ends: tuple[str, ...]) -> tuple[str, ...]:
    """Those that read it right.  Raises Unreadable when none does."""
    features = _incompatible(window)
    read_only = int.from_bytes(window.exactly(1024 + 100, 4), "little")
    if features & _ENCRYPT:
        raise Unreadable("the filesystem is partly encrypted by the guest: mount it with its keys")
    unknown = features & ~_EXT_KNOWN
    if unknown or read_only & _BIGALLOC:
        what = f"{unknown:#x}" if unknown else "bigalloc"
        raise Unreadable(f"the ext filesystem has features that are not known here: {what}")
    if features & _INLINE_DATA:  # dissect.extfs cuts such files at 60 bytes
        back_ends = tuple(b for b in back_ends if b != "dissect")
        if not back_ends:
            raise Unreadable("dissect reads no ext filesystem with inline data: use --backend tsk")
    return back_ends


def _incompatible(window: Window) -> int:
    return int.from_bytes(window.exactly(1024 + 96, 4), "little")


def _is_dirty(window: Window, kind: str, filesystem: Any) -> bool:
    if kind == kinds.XFS:
        return journal.is_xfs_log_dirty(window)
    if kind == kinds.NTFS and isinstance(filesystem, Sleuthkit):
        log = filesystem.inode(_NTFS_LOG)
        return journal.is_ntfs_log_dirty(_reader(filesystem, log), log.size)
    return False


def _reader(filesystem: Filesystem, node: Node) -> journal.Read:
    def read(offset: int, length: int) -> bytes:
        data = filesystem.pread(node, offset, length)
        if len(data) != length:
            raise ImageError("the filesystem's journal is damaged: it ends early")
        return data

    return read
