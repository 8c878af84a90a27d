"""A new qcow2 file, compressed or not.  QEMU's tools write it; it is read back and compared before
it gets its name.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from typing import Final

from ..errors import UsageError, shown
from ..image.extents import ALLOCATED, Extent, merged
from ..image.opener import Options
from ..util.progress import progress
from .job import Job
from .judge import Place
from .mover import PIECE, transfer, whole
from .outputs import output
from .qemu import create, options_like, qemu_img, writable
from .room import check_room
from .updates import keep_beside
from .verify import State, Written, images

_SECTOR: Final = 512
_CLUSTER: Final = 64 << 10  # of what is compressed: small ones gain little


class Qcow2File:
    """A qcow2 file that is new, or replaces another."""

    def __init__(self, place: Place, compress: str | None = None) -> None:
        """``compress`` is one of :data:`.COMPRESSIONS`."""
        self.place = place
        self._compress = compress

    def take(self, job: Job) -> None:
        path = self.place.name
        size = job.new.size
        if size % _SECTOR:
            raise UsageError(
                f"{size} bytes are no whole number of sectors, as a qcow2 file must have: add "
                f"--format raw"
            )
        with output(path, most=job.permissions, replace=self.place.replace) as part:
            if self._compress is None:
                self._write(job, part)
            else:
                self._write_compressed(job, part, self._compress)
            if job.verify:
                state = State("", size, job.new, lambda: whole(job.new))
                images([Written(part, path, (), state)], Options())
        keep_beside(path, None)  # of what was replaced

    def _write(self, job: Job, part: str) -> None:
        header = job.image.header
        plan = job.new.size, lambda: _data(job)
        check_room([plan], header.cluster_size, os.path.dirname(part), shown(self.place.name))
        create(part, job.new.size, options_like(header))
        with writable(part) as target, progress("copying", job.amount.data) as bar:
            transfer(job.new, lambda: _data(job), target, bar, job.threads)

    def _write_compressed(self, job: Job, part: str, how: str) -> None:
        size = job.new.size
        room = -(-size // _CLUSTER) * _CLUSTER  # the filter takes whole clusters only
        create(part, room, f"cluster_size={_CLUSTER},compression_type={how}")
        source = _Padded(job, room)

        def clusters() -> Iterator[Extent]:
            return in_clusters(_data(job), _CLUSTER)

        with (
            writable(part, compressed=True) as target,
            progress("copying", job.amount.data) as bar,
        ):
            transfer(source, clusters, target, bar, job.threads)
        if room != size:
            qemu_img("resize", "-q", "-f", "qcow2", "--shrink", part, str(size))


class _Padded:
    """A disk, and zeros behind it up to a whole cluster."""

    def __init__(self, job: Job, size: int) -> None:
        self._disk = job.new
        self._size = size

    def pread_into(self, buffer: memoryview, offset: int) -> None:
        inside = min(len(buffer), self._disk.size - offset)
        buffer[inside:] = bytes(len(buffer) - inside)
        self._disk.pread_into(buffer[:inside], offset)


def _data(job: Job) -> Iterator[Extent]:
    """What is not zeros, as which an empty file reads already."""
    return (extent for extent in job.plan() if extent.type == ALLOCATED)


def in_clusters(extents: Iterable[Extent], cluster: int) -> Iterator[Extent]:
    """The whole clusters in which the extents lie, each of them once."""

    def rounded() -> Iterator[Extent]:
        done = 0
        for offset, length, kind in extents:
            start = max(done, offset // cluster * cluster)
            done = -(-(offset + length) // cluster) * cluster
            if start < done:
                yield Extent(start, done - start, kind)

    return merged(rounded())


assert PIECE % _CLUSTER == 0  # so that no piece ends inside a cluster
