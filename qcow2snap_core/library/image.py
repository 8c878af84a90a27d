"""Opening an image, and what is in it."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from types import TracebackType

from ..errors import shown
from ..format.choosing import Choice, choose
from ..image.image import Image as InnerImage
from ..image.opener import BACKING_FORMATS, Options, open_image
from ..storage.locks import LockGuard
from ..typed import TYPE_CHECKING
from . import arguments
from .disk import Disk
from .names import public
from .snapshot import Snapshot

if TYPE_CHECKING:
    from typing import NoReturn

_DEFAULTS = Options()


@public
def open(  # noqa: A001 (the name that users expect, as of gzip.open)
    path: str | os.PathLike[str],
    *,
    allow_dirs: Iterable[str | os.PathLike[str]] = (),
    allow_files: Iterable[str | os.PathLike[str]] = (),
    backing_format: str | None = None,
    passphrase: str | bytes | Mapping[int, str | bytes] | None = None,
    l2_cache_size: int = _DEFAULTS.l2_cache_size,
    cluster_cache_size: int = _DEFAULTS.cluster_cache_size,
    remote_timeout: float = _DEFAULTS.remote_timeout,
) -> Image:
    """Open a qcow2 image, read-only and without any lock: a file, a block device, or the URI of an
    NBD export.

    ``allow_dirs``, ``allow_files``: directories and files that may be backing or external data
    files, in addition to what is in the image's own directory.
    ``backing_format``: the format, ``"raw"`` or ``"qcow2"``, of a backing file whose image does not
    record it.
    ``passphrase``: the secret itself, or ``{layer: secret}``, 0 being the image and 1 its backing
    file.
    ``l2_cache_size``, ``cluster_cache_size``: how much memory L2 tables and decompressed clusters
    may take, in bytes.
    ``remote_timeout``: how many seconds the server of an NBD export may be silent when an answer
    is due; after that it is a StorageError.

    Raises UsageError for what may not or cannot be opened, ImageError for what cannot be read;
    TypeError and ValueError for an argument that makes no sense.

    >>> with open("overlay.qcow2", allow_dirs=["base"]) as image:
    ...     image
    <Image 'overlay.qcow2'>
    """
    if backing_format is not None:
        arguments.one_of("backing_format", backing_format, BACKING_FORMATS)
    options = Options(
        allow_dirs=arguments.paths("allow_dirs", allow_dirs),
        backing_format=backing_format,
        passphrases=arguments.passphrases(passphrase),
        l2_cache_size=arguments.integer("l2_cache_size", l2_cache_size),
        cluster_cache_size=arguments.integer("cluster_cache_size", cluster_cache_size),
        allow_files=arguments.paths("allow_files", allow_files),
        remote_timeout=arguments.seconds("remote_timeout", remote_timeout),
    )
    return Image(open_image(arguments.path("path", path), options))


@public
class Image:
    """An open qcow2 file, by :func:`open`.  A context manager; any number of threads may use it."""

    __slots__ = ("__weakref__", "_image")

    def __init__(self, image: InnerImage) -> None:
        self._image = image

    @property
    def path(self) -> str:
        """The name by which it was opened; secrets in a URI are left out."""
        return self._image.path

    @property
    def snapshots(self) -> tuple[Snapshot, ...]:
        """The snapshots that the file has now, in the order in which they were taken.

        A running QEMU may take and delete some at any time.  If the table is damaged, these are the
        entries before the damage, and :func:`check` reports it.
        """
        return tuple(map(Snapshot, self._image.snapshots))

    def find(self, name: str) -> Snapshot:
        """The snapshot with that ID, else the first with that name, as QEMU looks for them.

        Raises UsageError, which lists the snapshots, if there is none.
        """
        choice = Choice(arguments.text("name", name))
        return Snapshot(choose(self._image.table(), choice, self.path))

    def open(self, snapshot: Snapshot | str, *, vm_state: bool = False) -> Disk:
        """The disk of a snapshot, which is a :class:`.Snapshot` or an ID or name as for
        :meth:`find`; or with ``vm_state`` its VM state, exactly ``vm_state_size`` bytes.

        Raises UsageError when there is no such snapshot, ImageError when it is damaged,
        SnapshotGone when it was deleted.

        >>> with qcow2snap_core.open("disk.qcow2") as image:
        ...     image.open("nightly").pread(9, 0)
        b'notes.txt'
        """
        if isinstance(snapshot, str):
            snapshot = self.find(snapshot)
        arguments.instance("snapshot", snapshot, Snapshot)
        arguments.flag("vm_state", vm_state)
        disk = self._image.disk(snapshot._entry, vm_state)
        return Disk(self._image, disk, snapshot, vm_state)

    def snapshot(self, name: str) -> Disk:
        """The same as ``open(name)``."""
        return self.open(arguments.text("name", name))

    def active(self) -> Disk:
        """The active disk: what the guest sees now.

        It can be read only while nobody writes to it: as long as a QEMU has the image open for
        writing, this method and each read of the disk raise UsageError.  Raises ImageError when it
        is damaged.
        """
        return Disk(self._image, self._image.active_disk(LockGuard(self._image.files)), None)

    def close(self) -> None:
        """Close all files.  From now on every use of the image and its disks raises ValueError.
        Reads that other threads have under way return their bytes, or raise ValueError.  Closing
        a second time does nothing."""
        self._image.close()

    def __enter__(self) -> Image:
        self._image.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, e: BaseException | None, tb: TracebackType | None
    ) -> None:
        self.close()

    def __reduce__(self) -> NoReturn:
        raise TypeError("an Image cannot be pickled or copied: open it again by its path")

    def __repr__(self) -> str:
        return f"<Image {shown(self.path)}{', closed' if self._image.storage.closed else ''}>"
