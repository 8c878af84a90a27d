"""Print a file of the guest's filesystem as a snapshot has it, without mounting anything.

usage: extract.py IMAGE SNAPSHOT /PATH/IN/THE/GUEST >FILE

The first partition that has the file is taken, or the whole disk where there are no partitions.
The Sleuth Kit reads the filesystems: NTFS, FAT, exFAT, ext2 to ext4, HFS+, UFS, ISO 9660.  It wants
its Python module pytsk3 (Debian: python3-tsk).
"""

import sys
from collections.abc import Iterator

import pytsk3

import qcow2snap_core

SECTOR = 512
PIECE = 1 << 20


class SnapshotImage(pytsk3.Img_Info):
    """What pytsk3 reads a disk by."""

    def __init__(self, disk: qcow2snap_core.Disk) -> None:
        self._disk = disk
        super().__init__(url="", type=pytsk3.TSK_IMG_TYPE_EXTERNAL)

    def read(self, offset: int, length: int) -> bytes:
        return self._disk.pread(max(0, min(length, self._disk.size - offset)), offset)

    def get_size(self) -> int:
        return self._disk.size


def filesystems(image: SnapshotImage) -> Iterator[pytsk3.FS_Info]:
    try:
        offsets = [p.start * SECTOR for p in pytsk3.Volume_Info(image)]
    except OSError:  # there is no partition table
        offsets = [0]
    for offset in offsets:
        try:
            yield pytsk3.FS_Info(image, offset)
        except OSError:  # an unused area, swap, or a filesystem that it does not know
            continue


def main(image_path: str, name: str, path: str) -> None:
    with qcow2snap_core.open(image_path) as image:
        disk = SnapshotImage(image.open(name))
        for filesystem in filesystems(disk):  # which pytsk3 wants to be kept with its files
            try:
                file = filesystem.open(path)
            except OSError:
                continue
            size = file.info.meta.size
            for offset in range(0, size, PIECE):
                sys.stdout.buffer.write(file.read_random(offset, min(PIECE, size - offset)))
            return
    raise FileNotFoundError(f"no filesystem in the snapshot has {path}")


if __name__ == "__main__":
    if len(sys.argv) != 4:
        sys.exit("usage: extract.py IMAGE SNAPSHOT /PATH/IN/THE/GUEST >FILE")
    try:
        main(*sys.argv[1:])
    except (qcow2snap_core.Error, OSError) as e:
        sys.exit(f"extract.py: {e}")
