"""Internal snapshots to an external chain.

An overlay is made of each snapshot, the oldest as the base, and one of the active disk; each holds
only what differs from the one before it.  What FILE itself has as backing file becomes that of the
base, unless a layer is encrypted: then the base holds all of it.  What a chain of files cannot say,
IDs, names, dates, clocks and VM states, is written beside them (:mod:`.manifest`).

Before the chain gets its name, every state is read back and compared with the source.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import partial
from typing import Final

from ..errors import UsageError, shown
from ..format.filenames import file_names
from ..format.ondisk import MAX_CHAIN
from ..format.snapshots import Snapshot
from ..image.image import Image
from ..storage.locks import ensure_not_written
from ..util.progress import progress
from . import manifest
from .chains import BACKED_UP, check_source, kept_backing, relative
from .job import Warn, warn_of_encryption
from .judge import ENDING, VM_STATE, Kind, Place
from .manifest import Entry, Manifest
from .mover import whole
from .outputs import output, permissions, private, publish
from .overlays import Step, compare_disk, shape_of, spared, stored, write_disk, write_vm_state
from .room import check_room
from .verify import reading

SPLIT_TARGETS: Final = Kind.DIRECTORY

ACTIVE: Final = "active"


def split(image: Image, place: Place, warn: Warn, verify: bool = True) -> list[str]:
    """Make the chain in a directory; returns its files, base first.

    With ``verify`` it is compared with the source before it gets its name.
    Raises UsageError before anything is written when that cannot be done.
    """
    directory = place.name
    check_source(image, place, BACKED_UP)
    snapshots = image.snapshots
    keep = image.header.backing_file is not None and not image.encrypted
    disks = [image.disk(s) for s in snapshots] + [image.active_disk()]
    steps = [
        Step(disk, below, keep) for disk, below in zip(disks, [None, *disks[:-1]], strict=True)
    ]
    names = file_names(snapshots, max(ENDING, VM_STATE, key=len), (ACTIVE,))
    files = [name + ENDING for name in (*names, ACTIVE)]
    if verify:
        _check_depth(len(files) + (len(image.chain) - 1 if keep else 0))
    warn_of_encryption(image, warn)
    with output(directory, is_directory=True, replace=place.replace) as temporary:
        plans = [(step.disk.size, step.plan) for step in steps]
        vm_states = [image.disk(s, vm_state=True) if s.vm_state_size else None for s in snapshots]
        plans += [(vm.size, partial(whole, vm)) for vm in vm_states if vm is not None]
        saved = sum(spared(step.disk, step.plan, shape_of(image)) for step in steps)
        parent = os.path.dirname(temporary)
        total = check_room(plans, image.header.cluster_size, parent, shown(directory), saved)
        paths = [os.path.join(temporary, file) for file in files]
        shown_as = [os.path.join(directory, file) for file in files]
        backing = kept_backing(image, directory) if keep else None
        with progress("splitting", total) as bar:
            for file, path, name, step in zip(files, paths, shown_as, steps, strict=True):
                private(path)
                write_disk(path, name, step, shape_of(image).over(backing), bar)
                backing = relative(file), "qcow2"
        for path, name, vm_state in zip(paths, shown_as, vm_states, strict=False):
            if vm_state is not None:
                private(_beside(path))
                write_vm_state(_beside(path), _beside(name), vm_state, verify)
        ensure_not_written(image.files, BACKED_UP)
        if verify:
            with progress("comparing", sum(step.disk.size for step in steps)) as bar:
                for path, name, step in zip(paths, shown_as, steps, strict=True):
                    compare_disk(path, name, step, reading(image), bar)
            ensure_not_written(image.files, BACKED_UP)
        _describe(snapshots, paths)
        for each in os.listdir(temporary):
            publish(os.path.join(temporary, each), permissions(image.files))
    return files


def _describe(snapshots: Sequence[Snapshot], paths: Sequence[str]) -> None:
    """Write what the chain itself cannot say beside it."""
    entries: list[Entry] = []
    parent: str | None = None
    for snapshot, path in zip(snapshots, paths, strict=False):
        disk = stored(path, os.path.basename(path))
        vm_state = None
        if snapshot.vm_state_size:
            vm_state = stored(_beside(path), os.path.basename(_beside(path)))
        entries.append(Entry(snapshot, disk, parent, vm_state))
        parent = disk.file
    path = os.path.join(os.path.dirname(paths[0]), manifest.NAME)
    private(path)
    with open(path, "wb") as file:
        file.write(manifest.text(Manifest(tuple(entries), os.path.basename(paths[-1]))))


def _beside(path: str) -> str:
    """What the VM state of an overlay's snapshot is called."""
    return path.removesuffix(ENDING) + VM_STATE


def _check_depth(files: int) -> None:
    if files > MAX_CHAIN:
        raise UsageError(
            f"the chain would have {files} files, more than the {MAX_CHAIN} that can be read back "
            f"and compared: add --no-verify"
        )
