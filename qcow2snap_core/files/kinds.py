"""What a partition begins with: which filesystem is in it, if any."""

from __future__ import annotations

from typing import Final

from .window import Window

EXT: Final = "ext"
XFS: Final = "XFS"
BTRFS: Final = "Btrfs"
NTFS: Final = "NTFS"
EXFAT: Final = "exFAT"
FAT: Final = "FAT"
LVM: Final = "LVM"

#: Whose names mean the same in upper and lower case
CASELESS: Final = (NTFS, EXFAT, FAT)

_MAGICS: Final = (
    (1080, b"\x53\xef", EXT),
    (0, b"XFSB", XFS),
    (0x10040, b"_BHRfS_M", BTRFS),
    (3, b"NTFS    ", NTFS),
    (3, b"EXFAT   ", EXFAT),
    (54, b"FAT", FAT),
    (82, b"FAT32", FAT),
    *((sector * 512, b"LABELONE", LVM) for sector in range(4)),
    (0, b"LUKS\xba\xbe", "LUKS encryption of the guest's own"),
    (3, b"-FVE-FS-", "BitLocker encryption"),
    (4086, b"SWAPSPACE2", "swap space"),
)

READABLE: Final = (EXT, XFS, BTRFS, NTFS, EXFAT, FAT)


def kind_of(window: Window) -> str | None:
    """What is in it: one of the names above, a description of something else, or None.

    Raises what reading the window raises.
    """
    start = window.pread(0, 0x10080)
    for offset, magic, kind in _MAGICS:
        if start[offset : offset + len(magic)] == magic:
            return kind
    return None
