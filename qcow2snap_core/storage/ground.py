"""What a file or device lies on, all the way down.

A loop device and the file behind it hold the same bytes, and so do a disk and its partitions, a
logical volume and the disks below it, a device and the files on its filesystem.  Paths and inode
numbers do not show that.  So to compare two files or devices, the *ground* of each is worked out:
for every file or device below it, down to the last one, the range in which its bytes lie.

* A partition is a range of its disk; a loop device a range of its file or device; a device of the
  device mapper (but one of LVM) or of md all that its slaves have.  It *is* those bytes.
* A file lies somewhere in the device of its filesystem, and a logical volume somewhere in its
  physical volumes.  Only the filesystem or LVM knows where, but each of them keeps the parts into
  which it divides a device apart.

Two grounds collide when they have a range in common, unless the same filesystem, LVM or partition
table divided that range between them.  So two files of a filesystem do not collide, nor two volumes
of a group, nor two partitions; but a file collides with the device on which it is stored, and a
loop device with the file to which it leads, in either order.

sysfs says how devices lie on each other.  For a loop device it has only a path, which may mean
another file in another mount namespace, or may have been deleted.  The device itself tells device
and inode (LOOP_GET_STATUS64), so it is asked first; the path is for users who may not open it.  The
device of a filesystem is the ``st_dev`` of its files; btrfs and some others invent a number there,
and then the mount, found by its ID, names its device.

Two things stay unknown: what is behind a network device, and where overlayfs, FUSE or a network
filesystem stores a file.  There two names of one file are recognized by what ``stat`` says, down to
the nanosecond of the last change.  A device with a filesystem that this kernel has mounted is
refused as a target by the kernel itself (O_EXCL, see :mod:`..transfer.targets`).
"""

from __future__ import annotations

import fcntl
import os
import re
import stat
import struct
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, NamedTuple

from .local import DEVICE, inode

Node = tuple[int, int]  # a file or a device, as :func:`.local.inode` says it

_END: Final = 1 << 64  # beyond every device
_SECTOR: Final = 512  # sysfs counts in these, whatever the device's are
_MOST_PARTS: Final = 1000  # of one ground
_DEEPEST: Final = 20  # filesystems kept in files, which FUSE may even let lie in themselves

_LOOP_GET_STATUS64: Final = 0x4C05  # linux/loop.h
_LOOP_INFO64: Final = struct.Struct("=5Q4I64s64s32s2Q")

# Device-mapper devices whose makers divide a device among several, by the start of their UUID.
_DIVIDING: Final = re.compile(r"LVM-|part\d+-|stratis-")


class Part(NamedTuple):
    """Bytes ``start`` to ``end`` of a file or device: all of them, or somewhere in them."""

    node: Node
    start: int = 0
    end: int = _END
    divider: Node | None = None  # whose division put it somewhere in there


@dataclass
class Ground:
    """What a file, directory or device lies on, itself included."""

    node: Node
    parts: list[Part] = field(default_factory=list)
    unknown: str = ""  # what could not be found out, if anything
    # Of a file: its inode's number, its size and its times.  Two files that agree in all of them
    # are one, if a filesystem without a device has either: that may show another's files.
    stamp: tuple[int, ...] = ()
    nowhere: bool = False  # on a filesystem without a device

    def collides(self, other: Ground) -> bool:
        """Whether the two have bytes in common, as far as they are known."""
        if (self.nowhere or other.nowhere) and self.stamp and self.stamp == other.stamp:
            return True
        return any(
            a.node == b.node
            and max(a.start, b.start) < min(a.end, b.end)
            and (a.divider is None or a.divider != b.divider)
            for a in self.parts
            for b in other.parts
        )


class _Unknown(Exception):
    """Why it cannot be found out what something lies on, and the part of that which can."""

    def __init__(self, why: str, known: Iterable[Part] = ()) -> None:
        super().__init__(why)
        self.known = known


class System:
    """What the kernel says of devices and mounts, read below ``root``."""

    def __init__(self, root: str = "/") -> None:
        self._root = root

    def of_path(self, path: str) -> Ground:
        """The ground of a file, directory or block device, of which nothing is read.

        Raises OSError when there is none.
        """
        with _held(path) as handle:
            status = os.fstat(handle)
            if stat.S_ISBLK(status.st_mode):
                return self.of_device(status.st_rdev)
            ground = Ground(inode(status))
            below = self._below_file(handle)
            if stat.S_ISREG(status.st_mode):
                times = status.st_mtime_ns, status.st_ctime_ns
                ground.stamp = status.st_ino, status.st_size, *times
                ground.parts.append(Part(ground.node))
            ground.nowhere = not below
            self._add(ground, below)
            return ground

    def of_device(self, number: int) -> Ground:
        """The ground of a block device."""
        ground = Ground((DEVICE, number))
        self._add(ground, [Part(ground.node)])
        return ground

    def _add(self, ground: Ground, parts: Iterable[Part]) -> None:
        """Add the parts and all that they lie on."""
        waiting = list(parts)
        while waiting:
            part = waiting.pop()
            if part in ground.parts:
                continue
            ground.parts.append(part)
            if len(ground.parts) > _MOST_PARTS:
                ground.unknown = "it lies on more than can be looked at"
                return
            try:
                waiting += self._below(part)
            except _Unknown as e:
                ground.unknown = str(e)
                waiting += e.known

    def _below(self, part: Part) -> Iterable[Part]:
        """What the part of a device lies on, one level down; of a file :meth:`_below_file` has
        said it already."""
        if part.node[0] != DEVICE:
            return ()
        name = _number(part.node[1])
        device = self.path("/sys/dev/block", name)
        if not device.is_dir():
            raise _Unknown(f"/sys says nothing of the device {name}")
        device = Path(os.path.realpath(device))
        try:
            if (device / "partition").exists():
                start, length = (int(_read(device / f)) * _SECTOR for f in ("start", "size"))
                return [_moved(part, _node(device.parent), start, length)]
            if (device / "loop" / "backing_file").exists():
                return self._below_loop(part, device)
            slaves = [Path(os.path.realpath(d)) for d in (device / "slaves").glob("*")]
            divides = _divides(device)
            return [Part(n, divider=n if divides else part.divider) for n in map(_node, slaves)]
        except (OSError, ValueError) as e:
            raise _Unknown(f"/sys is not clear about the device {name}") from e

    def _below_loop(self, part: Part, device: Path) -> list[Part]:
        path = self.path(_read(device / "loop" / "backing_file"))
        try:
            node, start, length = self._loop_status(device)
        except OSError:  # not for us to open
            start, length = (int(_read(device / "loop" / f)) for f in ("offset", "sizelimit"))
            try:
                node = inode(os.stat(path))
            except OSError:
                raise _Unknown(f"/dev/{device.name} lies on a file that has no name") from None
        here = _moved(part, node, start, length or _END)
        if node[0] == DEVICE:
            return [here]
        try:
            with _held(path) as handle:
                if inode(os.fstat(handle)) == node:
                    return [here, *self._below_file(handle)]
        except OSError:
            pass
        # Deleted, or not to be seen from here; its filesystem may still tell its device.
        if os.major(node[0]):
            return [here, _somewhere_in((DEVICE, node[0]))]
        raise _Unknown(f"the file behind /dev/{device.name} cannot be seen from here", [here])

    def _loop_status(self, device: Path) -> tuple[Node, int, int]:
        """The file or device behind a loop device, where in it that begins, and its length or 0.
        Raises OSError for who may not open it."""
        with _held(self.path("/dev", device.name), os.O_RDONLY | os.O_NONBLOCK) as fd:
            if inode(os.fstat(fd)) != _node(device):
                raise FileNotFoundError
            info = bytearray(_LOOP_INFO64.size)
            fcntl.ioctl(fd, _LOOP_GET_STATUS64, info)
        of_file, number, of_device, start, length, *_ = _LOOP_INFO64.unpack(info)
        return ((DEVICE, of_device) if of_device else (of_file, number)), start, length

    def _below_file(self, handle: int, depth: int = 0) -> list[Part]:
        """Where the file's filesystem has put it, nothing if that has no device."""
        number = os.fstat(handle).st_dev
        if os.major(number):
            return [_somewhere_in((DEVICE, number))]
        parts: list[Part] = []
        for name in self._mounted(handle):
            with suppress(OSError), _held(self.path(name)) as source:
                status = os.fstat(source)
                if stat.S_ISBLK(status.st_mode):
                    parts += [_somewhere_in((DEVICE, n)) for n in self._of_btrfs(status.st_rdev)]
                elif stat.S_ISREG(status.st_mode) and depth < _DEEPEST:
                    parts.append(_somewhere_in(inode(status)))
                    parts += self._below_file(source, depth + 1)
        return parts

    def _mounted(self, handle: int) -> list[str]:
        """The paths of what is mounted where the file is."""
        mount = _mount_id(handle)
        for line in self.path("/proc/self/mountinfo").read_bytes().splitlines():
            before, _, after = line.partition(b" - ")
            if int(before.split()[0]) == mount:
                source = re.sub(rb"\\(\d{3})", lambda m: bytes([int(m[1], 8)]), after.split()[1])
                # bcachefs names all its devices, with colons between.
                return [os.fsdecode(name) for name in source.split(b":") if name[:1] == b"/"]
        return []

    def _of_btrfs(self, number: int) -> list[int]:
        """All devices of the btrfs that has this one, of which the mount names no other."""
        for filesystem in self.path("/sys/fs/btrfs").glob("*/devices"):
            devices = [_node(Path(os.path.realpath(d)))[1] for d in filesystem.iterdir()]
            if number in devices:
                return devices
        return [number]

    def path(self, path: str, *below: str) -> Path:
        return Path(self._root, path.lstrip("/"), *below)


def mount_of(path: str) -> int:
    """The number that the mount of a file has in mountinfo.  Raises OSError."""
    with _held(path) as handle:
        return _mount_id(handle)


def _mount_id(handle: int) -> int:
    for line in Path(f"/proc/self/fdinfo/{handle}").read_text().splitlines():
        key, _, value = line.partition(":")
        if key == "mnt_id":
            return int(value)
    return -1


@contextmanager
def _held(path: str | Path, flags: int = os.O_PATH) -> Iterator[int]:
    handle = os.open(path, flags | os.O_CLOEXEC)
    try:
        yield handle
    finally:
        os.close(handle)


def _somewhere_in(node: Node) -> Part:
    return Part(node, divider=node)


def _moved(part: Part, below: Node, start: int, length: int) -> Part:
    """The part, in what its device is ``length`` bytes of, from ``start`` on."""
    end = start + min(length, part.end)
    return Part(below, start + part.start, end, part.divider)


def _divides(device: Path) -> bool:
    uuid = device / "dm" / "uuid"
    return uuid.exists() and _DIVIDING.match(_read(uuid)) is not None


def _node(device: Path) -> Node:
    """The device of a directory in sysfs."""
    major, _, minor = _read(device / "dev").partition(":")
    return DEVICE, os.makedev(int(major), int(minor))


def _number(device: int) -> str:
    return f"{os.major(device)}:{os.minor(device)}"


def _read(path: Path) -> str:
    return os.fsdecode(path.read_bytes()).rstrip("\n")
