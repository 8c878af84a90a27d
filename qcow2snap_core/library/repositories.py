"""Backups of all snapshots: what the commands backup, restore and verify do."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable

from ..transfer import backup as backups
from ..transfer import restore as restoring
from ..transfer.destinations import new_copy
from ..transfer.judge import STANDARD_OUTPUT, judge
from ..transfer.repository import REPOSITORY
from ..util.progress import silent
from ..util.wording import LIBRARY
from . import arguments
from .conversion import check_compress, target_of, told
from .image import Image
from .names import public


@public
def backup(
    image: Image,
    repository: str | os.PathLike[str],
    *,
    compress: str | None = None,
    verify: bool = True,
    warn: Callable[[str], object] = warnings.warn,
) -> list[str]:
    """Add the snapshots to a repository that it does not have yet, each with only what changed.

    The repository is a directory that does not exist, is empty, or was made by this function.
    ``compress``, ``"zlib"`` or ``"zstd"``, is for clusters that are not compressed in the image.
    With ``verify`` a snapshot is recorded only after it was read back and compared.  A QEMU may
    write to the image meanwhile.

    Returns the paths of the qcow2 files that were added.  Raises as :func:`copy`; if a snapshot is
    damaged, after all others were added.

    >>> with qcow2snap_core.open("disk.qcow2") as image:
    ...     backup(image, "backups")
    ['backups/1.qcow2', 'backups/2.qcow2']
    """
    arguments.instance("image", image, Image)
    where = arguments.path("repository", repository)
    check_compress(compress)
    arguments.flag("verify", verify)
    place = judge(where, REPOSITORY, in_place=True, words=LIBRARY)
    with silent():
        added = backups.backup(image._image, place, told(warn), compress, verify)
    return [os.path.join(where, entry.disk.file) for entry in added]


@public
def restore(
    repository: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    snapshot: str | None = None,
    skip_damaged: bool = False,
    replace: bool = False,
    verify: bool = True,
    warn: Callable[[str], object] = warnings.warn,
) -> list[str]:
    """Make an image with all snapshots of a repository again; or with ``snapshot``, copy the disk
    of one.  ``snapshot`` is its file in the repository, its ID or its name; of several the newest
    is meant.  ``target`` can then be whatever the target of :func:`copy` can be.

    The files are compared with their checksums first.  With ``skip_damaged`` snapshots that cannot
    be restored are left out, and ``warn`` is called for each.  The other keywords are those of
    :func:`split`.  Returns the names of the snapshots.  Raises as :func:`copy`, and ImageError when
    the repository is damaged.

    >>> restore("backups", "again.qcow2")
    ['weekly', 'nightly']
    """
    where, path = arguments.path("repository", repository), arguments.path("target", target)
    for name, value in {
        "skip_damaged": skip_damaged,
        "replace": replace,
        "verify": verify,
    }.items():
        arguments.flag(name, value)
    if skip_damaged and snapshot is not None:
        raise ValueError("skip_damaged goes without snapshot, which says what is restored")
    with silent():
        if snapshot is None:
            place = target_of(path, restoring.RESTORE_TARGETS, replace)
            done = restoring.restore(where, place, told(warn), LIBRARY, verify, skip_damaged)
            return [each.name for each in done.snapshots]
        wanted = arguments.text("snapshot", snapshot)
        if path == STANDARD_OUTPUT:
            path = os.path.join(os.curdir, path)  # that is the command's notation
        to = new_copy(path, replace=replace, words=LIBRARY)
        restoring.restore_disk(where, wanted, to, told(warn), LIBRARY, verify)
        return [wanted]


@public
def verify(repository: str | os.PathLike[str]) -> list[str]:
    """Read all of a repository and compare it with its checksums.

    Returns a line for each snapshot that cannot be restored; an empty list if nothing is wrong.

    >>> verify("backups")
    []
    """
    with silent():
        found = restoring.verify(arguments.path("repository", repository))
    return [each.problem for each in found if each.problem is not None]
