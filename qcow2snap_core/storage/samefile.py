"""Whether writing to one thing would write into another, through whatever lies between them
(:mod:`.ground`)."""

from __future__ import annotations

from collections.abc import Iterable

from ..errors import UsageError, reason, shown
from .ground import Ground, Part, System
from .local import DEVICE, REMOTE, Storage


def ensure_apart(path: str, files: Iterable[Storage], name: str, *, new: bool = False) -> None:
    """Raises UsageError when writing to what is at the path would write into one of the files that
    are being read, or when that cannot be told.

    ``new``: a new file is going to be in that directory.  ``name`` is the target's in error lines.
    """
    system = System()
    try:
        target = system.of_path(path)
    except OSError as e:
        raise UsageError(f"cannot open {shown(path)}: {reason(e)}") from e
    for file in files:
        if file.inode[0] == REMOTE:  # behind NBD: another machine's, as far as can be told
            continue
        if file.inode == target.node:
            raise UsageError(is_source(name, file.path))
        source = _of_storage(file, system)
        if target.collides(source):
            raise UsageError(
                f"{shown(name)} lies on the same storage as {shown(file.path)}, which is being "
                f"copied: give another target"
            )
        unknown = source.unknown or target.unknown
        if unknown and not new:  # a new file takes nothing that is somebody else's
            raise UsageError(
                f"there is no telling whether {shown(name)} lies on {shown(file.path)}, which is "
                f"being copied, as {unknown}: give another target"
            )


def is_source(name: str, file: str) -> str:
    """The error line where a target is one of the files that are read."""
    what = "the source itself" if name == file else shown(file)
    return f"{shown(name)} is {what}, which is being copied: give another target"


def _of_storage(file: Storage, system: System) -> Ground:
    """The ground of what was opened, even if its name leads elsewhere by now."""
    kind, number = file.inode
    if kind == DEVICE:
        return system.of_device(number)
    try:
        ground = system.of_path(file.absolute)
    except OSError:
        ground = None
    if ground is None or ground.node != file.inode:
        return Ground(file.inode, [Part(file.inode)], "its name leads elsewhere now")
    return ground
