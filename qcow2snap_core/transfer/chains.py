"""Internal snapshots to an external chain, and back.

*split* makes an overlay of each snapshot, the oldest as the base, and one of the active disk;
each holds only what differs from the one before it.  What FILE itself has as backing file
becomes that of the base, unless a layer is encrypted: then the base holds all of it.

*join* writes the layers of a chain into one image, base first, and takes a snapshot after each.
A layer adds only the clusters that it holds itself.

qemu-img and qemu-nbd write the new images; they are not encrypted and not compressed.  Before they
get their names, every state is read back and compared with the source (:mod:`.verify`).
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from typing import Final, NamedTuple

from ..errors import UsageError, shown
from ..format.filenames import file_names
from ..format.ondisk import MAX_CHAIN
from ..format.snapshot_table import read_table
from ..format.snapshots import Snapshot
from ..image.disk import Disk
from ..image.extents import ALLOCATED, Extent
from ..image.image import Image
from ..image.layers import Layer, RawLayer
from ..storage.libnbd import is_uri
from ..storage.locks import ensure_not_written
from ..tables.diff import changes
from ..util.progress import Bar, progress
from .job import Warn, warn_of_encryption
from .judge import ENDING, Kind, Place
from .mover import Plan, RawSource, transfer, whole
from .outputs import output, permissions, private, publish
from .qemu import create, options_like, qemu_img, writable
from .room import check_room
from .verify import State, Written, images, reading

SPLIT_TARGETS: Final = Kind.DIRECTORY
JOIN_TARGETS: Final = Kind.FILE

ACTIVE: Final = "active"


class Part(NamedTuple):
    """One image state to be written over the one before it."""

    state: State
    plan: Plan  # what of it is written

    @property
    def name(self) -> str:
        return self.state.name

    @property
    def size(self) -> int:
        return self.state.size


# --- split ---


def split(image: Image, place: Place, warn: Warn, verify: bool = True) -> list[str]:
    """Make the chain in a directory; returns its files, base first.

    With ``verify`` it is compared with the source before it gets its name.
    Raises UsageError before anything is written when that cannot be done.
    """
    directory = place.name
    place.ensure_apart(image.files)
    check_local(image)
    ensure_not_written(image.files)
    snapshots = image.snapshots
    keep = image.header.backing_file is not None and not image.encrypted
    parts = list(_states(image, snapshots, keep))
    if verify:
        _check_depth(len(parts) + (len(image.chain) - 1 if keep else 0))
    warn_of_encryption(image, warn)
    for s in snapshots:
        if s.vm_state_size:
            warn(f"the VM state of snapshot {shown(s.name)} is not carried over")
    most = permissions(image.files)
    with output(directory, is_directory=True, replace=place.replace) as temporary:
        total = _check_room(image, parts, temporary, directory)
        paths = [os.path.join(temporary, part.name + ENDING) for part in parts]
        backing = kept_backing(image, directory) if keep else None
        with progress("splitting", total) as bar:
            for part, path in zip(parts, paths, strict=True):
                private(path)
                _create(image, path, part.size, backing)
                _write(part, path, bar, _home(image))
                backing = _relative(part.name + ENDING), "qcow2"
        ensure_not_written(image.files)
        if verify:
            images([_overlay(part, temporary, directory) for part in parts], reading(image))
            ensure_not_written(image.files)
        for path in paths:
            publish(path, most)
    return [part.name + ENDING for part in parts]


def _states(image: Image, snapshots: Sequence[Snapshot], keep: bool) -> Iterator[Part]:
    disks = [image.disk(s) for s in snapshots] + [image.active_disk()]
    names = [*file_names(snapshots, ENDING, (ACTIVE,)), ACTIVE]
    below: Disk | None = None
    for name, disk in zip(names, disks, strict=True):
        yield Part(_state(name, disk), _changes(below, disk, keep))
        below = disk


def _overlay(part: Part, temporary: str, directory: str) -> Written:
    now, then = (os.path.join(where, part.name + ENDING) for where in (temporary, directory))
    return Written(now, then, (), part.state)


def _changes(below: Disk | None, disk: Disk, keep: bool) -> Plan:
    if below is not None:
        return lambda: changes(below, disk)
    return disk.own if keep else lambda: _only_data(whole(disk))


def _only_data(extents: Iterable[Extent]) -> Iterator[Extent]:
    """The base of a new chain reads as zeros already."""
    return (e for e in extents if e.type == ALLOCATED)


def kept_backing(image: Image, directory: str) -> tuple[str, str]:
    """The name and format of FILE's own backing file, as an image in the directory needs them."""
    storage, layer = image.chain[1]
    form = "qcow2" if isinstance(layer, Disk) else "raw"
    name = os.fsdecode(image.header.backing_file or b"").removeprefix("file:")
    if os.path.isabs(name):
        return name, form
    return _relative(
        os.path.relpath(os.path.realpath(storage.path), os.path.realpath(directory))
    ), form


def _relative(name: str) -> str:
    """A file's name as one image records that of another: QEMU takes what is before a ``:`` for
    a protocol, unless there is a ``/`` before it."""
    return f"./{name}" if ":" in name else name


def _check_depth(files: int) -> None:
    if files > MAX_CHAIN:
        raise UsageError(
            f"the chain would have {files} files, more than the {MAX_CHAIN} that can be read back "
            f"and compared: add --no-verify"
        )


def check_local(image: Image) -> None:
    """What qemu-img has a part in takes files."""
    if is_uri(image.path):
        raise UsageError(f"{shown(image.path)} is remote: copy the image to a local file first")


# --- join ---


def join(top: Image, place: Place, warn: Warn, verify: bool = True) -> list[str]:
    """Make one image of the chain below and with ``top``; returns its snapshots, base first.

    With ``verify`` it is compared with the source before it gets its name.
    Raises UsageError before anything is written when that cannot be done.
    """
    out = place.name
    place.ensure_apart(top.files)
    check_local(top)
    ensure_not_written(top.files)
    chain = top.chain[::-1]
    parts = [_layer_part(storage.path, layer) for storage, layer in chain]
    warn_of_encryption(top, warn)
    for storage, layer in chain:
        if isinstance(layer, Disk) and read_table(storage).snapshots:
            warn(f"the snapshots inside {shown(storage.path)} are not carried over")
    with output(out, most=permissions(top.files), replace=place.replace) as temporary:
        total = _check_room(top, parts, temporary, out)
        _create(top, temporary, parts[0].size, None)
        size = parts[0].size
        with progress("joining", total) as bar:
            for part in parts:
                if part.size != size:
                    qemu_img("resize", "-q", "-f", "qcow2", "--shrink", temporary, str(part.size))
                _write(part, temporary, bar, grown_from=size)
                size = part.size
                qemu_img("snapshot", "-q", "-c", part.name, temporary)
        ensure_not_written(top.files)
        if verify:
            states = [part.state for part in parts]
            images([Written(temporary, out, states, states[-1])], reading(top))
            ensure_not_written(top.files)
    return [part.name for part in parts]


def _layer_part(path: str, layer: Layer) -> Part:
    name = os.path.splitext(os.path.basename(path))[0]
    if isinstance(layer, RawLayer):
        raw = RawSource(layer)
        state = State(name, layer.size, raw, raw.plan)
        return Part(state, lambda: _only_data(raw.plan()))
    assert isinstance(layer, Disk)
    own = layer.own if layer.below else lambda: _only_data(whole(layer))
    return Part(_state(name, layer), own)


# --- Both ---


def _state(name: str, disk: Disk) -> State:
    return State(name, disk.size, disk, lambda: whole(disk))


def _create(like: Image, path: str, size: int, backing: tuple[str, str] | None) -> None:
    create(path, size, options_like(like.header), backing, _home(like))


def _home(image: Image) -> str:
    """The directory of the image, in which its layers' external data files are looked for."""
    return os.path.dirname(os.path.realpath(image.path))


def _write(part: Part, path: str, bar: Bar, home: str = "/", grown_from: int | None = None) -> None:
    with writable(path, home) as target:
        if grown_from is not None and grown_from < part.size:
            # A larger layer was there before a smaller one: its bytes behind the smaller one's
            # end are still in the last cluster.
            target.zero(grown_from, min(part.size - grown_from, 2 << 20))
            target.flush()
        transfer(part.state.source, part.plan, target, bar)


def _check_room(image: Image, parts: Sequence[Part], temporary: str, out: str) -> int:
    plans = [(part.size, part.plan) for part in parts]
    return check_room(plans, image.header.cluster_size, os.path.dirname(temporary), shown(out))
