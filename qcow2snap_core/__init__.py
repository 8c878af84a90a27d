"""qcow2snap_core: read the internal snapshots of qcow2 images.

>>> import qcow2snap_core
>>> with qcow2snap_core.open("disk.qcow2") as image:
...     for snapshot in image.snapshots:
...         print(snapshot.id, snapshot.name)
...     disk = image.open("nightly")
...     first_sector = disk.pread(512, 0)
1 weekly
2 nightly

Only the names in ``__all__`` are public; docs/library.md describes them.  Each is imported when it
is first used.  So importing the package takes almost no time, and the plugin, which uses the
modules below directly, loads nothing of the library.
"""

from __future__ import annotations

import sys

from .typed import TYPE_CHECKING

# As python3 -m qcow2snap_core, which imports this first: Ctrl-C is not to end in a traceback.
if sys.argv[:1] == ["-m"] and "qcow2snap_core" in sys.orig_argv:
    from .util.interrupts import default

    default()

if TYPE_CHECKING:
    from .errors import Error, ImageError, SnapshotGone, StorageError, UsageError
    from .library.analysis import Finding, changes, check, exclusive_sizes
    from .library.conversion import Copied, compact, copy, join, split
    from .library.disk import Disk, Extent
    from .library.image import Image, open  # noqa: A004 (the name that users expect: gzip.open)
    from .library.repositories import backup, restore, verify
    from .library.snapshot import Snapshot

__version__ = "0.9.0"

__all__ = [
    "Copied",
    "Disk",
    "Error",
    "Extent",
    "Finding",
    "Image",
    "ImageError",
    "Snapshot",
    "SnapshotGone",
    "StorageError",
    "UsageError",
    "__version__",
    "backup",
    "changes",
    "check",
    "compact",
    "copy",
    "exclusive_sizes",
    "join",
    "open",
    "restore",
    "split",
    "verify",
]

_HOMES = {
    "errors": ("Error", "ImageError", "SnapshotGone", "StorageError", "UsageError"),
    "library.analysis": ("Finding", "changes", "check", "exclusive_sizes"),
    "library.conversion": ("Copied", "compact", "copy", "join", "split"),
    "library.disk": ("Disk", "Extent"),
    "library.image": ("Image", "open"),
    "library.repositories": ("backup", "restore", "verify"),
    "library.snapshot": ("Snapshot",),
}


if not TYPE_CHECKING:  # to which a misspelt name would then be an object

    def __getattr__(name):
        for home, names in _HOMES.items():
            if name in names:
                from importlib import import_module

                found = globals()[name] = getattr(import_module(f".{home}", __name__), name)
                return found
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return list(__all__)
