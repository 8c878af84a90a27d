"""A state of an image in files of its own, over the state before it: what split and backup make.

The disk becomes a qcow2 file that holds what differs from the one below, compressed clusters as
they are; a VM state becomes a raw file, as ``copy`` makes it, which QEMU can be given with
``-incoming``.  Each is compared with its source before it is described and gets its name.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from functools import partial
from typing import Final, NamedTuple

from ..errors import shown
from ..format import ondisk as q
from ..format.header import read_header
from ..image.disk import Disk
from ..image.extents import ALLOCATED, Extent, merged
from ..image.image import Image
from ..image.layers import RawLayer
from ..image.opener import Options, open_image
from ..storage.local import Storage, open_storage
from ..tables.diff import changes
from ..util.interrupts import raise_if_interrupted
from ..util.progress import Advance, progress
from .manifest import Stored
from .mover import Plan, RawSource, transfer, whole
from .newimage import new_image
from .shape import Shape
from .states import StateWriter, Streams
from .targets import RawTarget
from .verify import State, check_size, check_sound, compare, compare_state

_PIECE: Final = 1 << 20


class Step(NamedTuple):
    """A state, and the one of the same image that is below it in the chain of files."""

    disk: Disk
    below: Disk | None = None
    keep: bool = False  #: without one below: it lies on what the image lies on

    def plan(self) -> Iterator[Extent]:
        """What is to be written."""
        if self.below is not None:
            return changes(self.below, self.disk)
        return self.disk.own() if self.keep else data_of(whole(self.disk))


def data_of(extents: Iterator[Extent]) -> Iterator[Extent]:
    """Without the zeros, as which a new base reads already."""
    return (e for e in extents if e.type == ALLOCATED)


def streams_of(disk: Disk, shape: Shape) -> Streams | None:
    """How to get at the compressed clusters of a disk as they are, if an image of that shape can
    have them."""
    header = read_header(disk.tables.storage)
    same = disk.cluster_size == shape.cluster_size and header.compression == shape.compression
    return disk.compressed if same and header.crypt_method == q.CRYPT_NONE else None


def spared(disk: Disk, plan: Plan, shape: Shape) -> int:
    """How much less than the bytes of a plan is written, since they come as streams."""
    if streams_of(disk, shape) is None:
        return 0
    data = (e for e in merged(plan()) if e.type == ALLOCATED)
    return sum(disk.spared(e.offset, e.length) for e in data)


def write_disk(
    part: str, name: str, step: Step, shape: Shape, advance: Advance, compress: bool = False
) -> None:
    """Fill the empty file at ``part``, which is going to be called ``name``.

    Raises what reading the disk raises, StorageError when the file cannot be written.
    """
    with new_image(part, name, shape) as new:
        writer = StateWriter(new, shape, advance, compress=compress)
        try:
            streams = streams_of(step.disk, shape)
            tables = writer.state(step.disk, step.disk.size, step.plan, streams=streams)
        finally:
            writer.close()
        step.disk.confirm()
        new.finish(tables.size, tables.l1)


def compare_disk(part: str, name: str, step: Step, options: Options, advance: Advance) -> None:
    """Compare such a file with the state; ``options`` open it.  Raises StorageError."""
    disk = step.disk
    with open_image(part, options) as image:
        check_sound(image, name)
        found = image.active_disk()
        state = State("", disk.size, disk, partial(whole, disk))
        differs: list[Plan] = [] if step.below is None else [step.plan, found.own]
        compare_state(state, found, differs, shown(name), advance)


def write_vm_state(part: str, name: str, vm_state: Disk, verify: bool) -> None:
    """The same for a raw file with a VM state, which is compared as well."""
    with progress("copying a VM state", vm_state.size) as bar:
        fd = os.open(part, os.O_RDWR | os.O_CLOEXEC)
        try:
            os.ftruncate(fd, vm_state.size)
            plan = partial(whole, vm_state)
            transfer(vm_state, plan, RawTarget(name, fd, empty=True), bar)
        finally:
            os.close(fd)
    if verify:
        with progress("comparing", vm_state.size) as bar:
            compare_vm_state(vm_state, part, shown(name), bar)


def compare_vm_state(vm_state: Disk, path: str, what: str, advance: Advance) -> None:
    """Compare a raw file with a VM state.  Raises StorageError."""
    storage = open_storage(path)
    try:
        found = RawLayer(storage)
        check_size(vm_state.size, found.size, what)
        compare(vm_state, partial(whole, vm_state), RawSource(found), what, advance)
    finally:
        storage.close()


def stored(part: str, file: str) -> Stored:
    """A description of the file at ``part``, which is going to be called that."""
    storage = open_storage(part)
    try:
        return Stored(file, *size_and_digest(storage))
    finally:
        storage.close()


def size_and_digest(storage: Storage, advance: Advance = lambda _: None) -> tuple[int, str]:
    """The size of a file in bytes and its SHA-256, of all that it has."""
    digest = hashlib.sha256()
    size = 0
    while piece := storage.read(_PIECE, size):
        raise_if_interrupted()
        digest.update(piece)
        size += len(piece)
        advance(len(piece))
    return size, digest.hexdigest()


def shape_of(image: Image) -> Shape:
    """That of an image, without what it lies on."""
    header = image.header
    return Shape(header.cluster_bits, header.extended_l2, header.compression)
