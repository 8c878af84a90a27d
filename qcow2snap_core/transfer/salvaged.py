"""A raw file of what can be read, and a map of what cannot, in the format of GNU ddrescue.

What was lost reads as zeros, and each range of it has a line in the map: there is never a copy
without its map.  The map is written last and gets its name first, so at worst there is a map of
nothing, which is removed if the copy got no name.  It takes no other map's place: that may be the
one of the copy that is replaced, which is there until the new one is.

The format: "Mapfile structure" in ddrescue's manual.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import suppress

from .. import __version__
from ..errors import UsageError, shown
from ..storage.libnbd import is_uri
from .job import Job
from .judge import Kind, Place, judge
from .outputs import output
from .rawfile import give_size, opened
from .room import check_space
from .salvage import Loss
from .targets import RawTarget
from .updates import keep, keep_beside


class SalvagedFile:
    """A file that is new, or replaces another, and its map, which is always new."""

    def __init__(self, target: str, map_name: str, *, replace: bool = False) -> None:
        """Raises UsageError when one of them will not do."""
        self.place: Place = judge(target, Kind.FILE, replace=replace)
        if not is_uri(map_name) and os.path.lexists(map_name):
            raise UsageError(
                f"{shown(map_name)} is there already, and no map is replaced: give another name"
            )
        self.map: Place = judge(map_name, Kind.FILE)
        if self.map.path == self.place.path:
            raise UsageError(f"{shown(map_name)} is the copy's name: give the map another one")

    def take(self, job: Job) -> None:
        assert job.salvage is not None
        path = self.place.name
        self.map.ensure_apart(job.image.files)
        copied: os.stat_result | None = None
        try:
            with output(path, most=job.permissions, replace=self.place.replace) as part:
                check_space(os.path.dirname(part), job.amount.data, f"copying to {shown(path)}")
                with opened(part) as fd:
                    give_size(path, fd, job.new.size)
                    job.move(RawTarget(path, fd, empty=True))
                    losses = job.salvage.losses()
                    # With holes in it, it is no copy that an update could start from.
                    record = None if losses else job.record()
                    kept = record is not None and keep(fd, record)
                with output(self.map.name, most=job.permissions) as map_part:
                    _write(map_part, _lines(job, path, losses))
                copied = os.stat(part)
        except BaseException:
            if copied is not None and not _leads_to(path, copied):
                os.unlink(self.map.path)
            raise
        keep_beside(path, None if kept else record)


def _leads_to(path: str, file: os.stat_result) -> bool:
    with suppress(OSError):
        return os.path.samestat(os.stat(path), file)
    return False


def _write(path: str, lines: Iterable[str]) -> None:
    with open(path, "w", encoding="utf-8", errors="backslashreplace") as f:
        f.writelines(f"{line}\n" for line in lines)


def _lines(job: Job, copy: str, losses: Iterable[Loss]) -> Iterator[str]:
    yield f"# Mapfile. Created by qcow2snap {__version__}"
    yield f"# {job.new.name} in {shown(copy)}: what is not finished (+) could not be read (-)"
    yield "# and is zeros there"
    yield "# current_pos  current_status  current_pass"
    yield "0x00000000     +               1"
    yield "#      pos        size  status"
    at, size = 0, job.new.size
    for loss in losses:
        if at < loss.offset:
            yield _line(at, loss.offset - at, "+")
        if loss.why:
            yield f"# {loss.why}"
        yield _line(loss.offset, loss.length, "-")
        at = loss.offset + loss.length
    if at < size:
        yield _line(at, size - at, "+")


def _line(offset: int, length: int, status: str) -> str:
    return f"{offset:#010x}  {length:#010x}  {status}"
