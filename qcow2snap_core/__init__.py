"""qcow2snap_core: read the internal snapshots of qcow2 images.

>>> import qcow2snap_core
>>> with qcow2snap_core.open("disk.qcow2") as image:
...     for snapshot in image.snapshots:
...         print(snapshot.id, snapshot.name)
...     disk = image.snapshot("nightly")
...     first_sector = disk.pread(512, 0)
1 weekly
2 nightly

The whole of it is in docs/library.md.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable

# As python3 -m qcow2snap_core, which imports this first: Ctrl-C is not to end in a traceback.
if sys.argv[:1] == ["-m"] and "qcow2snap_core" in sys.orig_argv:
    from .util.interrupts import default

    default()

from .errors import Error, ImageError, SnapshotGone, StorageError, UsageError
from .format.snapshots import Snapshot
from .image.disk import Disk
from .image.extents import Extent
from .image.image import Image
from .image.opener import Options, open_image

__version__ = "0.9.0"

__all__ = [
    "Disk",
    "Error",
    "Extent",
    "Image",
    "ImageError",
    "Snapshot",
    "SnapshotGone",
    "StorageError",
    "UsageError",
    "open",
]


def open(  # noqa: A001 (the name that users expect, as of gzip.open)
    path: str,
    *,
    allow_dirs: Iterable[str] = (),
    allow_files: Iterable[str] = (),
    backing_format: str | None = None,
    passphrase: str | bytes | None = None,
    l2_cache_size: int = Options().l2_cache_size,
    cluster_cache_size: int = Options().cluster_cache_size,
) -> Image:
    """Open a qcow2 image; the keywords mean what the plugin's keys mean.  Sizes in bytes; the
    passphrase is the secret itself.

    Raises UsageError for what may not or cannot be opened, ImageError for what cannot be read.
    """
    passphrases = {}
    if passphrase is not None:
        passphrases[0] = passphrase.encode() if isinstance(passphrase, str) else passphrase
    options = Options(
        tuple(allow_dirs),
        backing_format,
        passphrases,
        l2_cache_size,
        cluster_cache_size,
        allow_files=tuple(allow_files),
    )
    return open_image(path, options)
