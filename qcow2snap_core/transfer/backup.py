"""All snapshots of an image that a repository (:mod:`.repository`) does not have yet.

Each is written over the nearest one that both the image and the repository have, as what the
tables say that differs; over none, it is written whole.  If files of the repository are lost, the
snapshots that cannot be had without them are written again, in their places: what lies on a
snapshot lies as well on another file of the same disk.  The image's snapshots are known by the
digest of a copy's record (:mod:`.records`), and not by their names; the size and time of what the
image lies on are part of it, since whoever writes to that changes every snapshot.

Nothing of the active disk is read, so a QEMU may go on writing to the image, taking snapshots and
deleting some.  One that is deleted while it is read is left out, as its guard says so; one that
another was to be written over has that one written anew over the next.
"""

from __future__ import annotations

import hashlib
import os
from contextlib import suppress
from functools import partial
from typing import Final

from ..errors import ImageError, SnapshotGone, shown
from ..format.snapshots import Identity, Snapshot
from ..image.disk import Disk
from ..image.image import Image
from ..image.opener import Options
from ..storage.libnbd import is_uri
from ..util.interrupts import raise_if_interrupted
from ..util.progress import progress
from ..util.units import counted
from .compressors import COMPRESSIONS
from .job import Warn, warn_of_encryption
from .judge import Place
from .manifest import Entry, Manifest, Stored
from .mover import Plan, count, whole
from .outputs import permissions
from .overlays import (
    Step,
    compare_disk,
    compare_vm_state,
    shape_of,
    spared,
    stored,
    write_disk,
    write_vm_state,
)
from .records import Held, held
from .repository import Repository, written_repository
from .room import check_room
from .verify import Differs, compare, described

#: Files of a chain before the next snapshot is written whole: half of what can be opened, and what
#: one damaged file may take with it.
DEEPEST: Final = 100

_ATTEMPTS: Final = 5


def backup(
    image: Image, place: Place, warn: Warn, compress: str | None = None, verify: bool = True
) -> list[Entry]:
    """Add the snapshots; returns those that were.  ``compress``, "zlib" or "zstd", is for what is
    not compressed in the image; with ``verify`` each is compared with the image before it counts.

    Raises UsageError when the place will not do; what reading the image raises, after all that can
    be read was added; StorageError when the repository cannot be written.
    """
    place.ensure_apart(image.files)
    warn_of_encryption(image, warn)
    with written_repository(place, permissions(image.files)) as repository:
        return _Backup(image, repository, warn, compress, verify).run()


class _Backup:
    """One run."""

    def __init__(
        self, image: Image, repository: Repository, warn: Warn, compress: str | None, verify: bool
    ) -> None:
        self._image = image
        self._repository = repository
        self._warn = warn
        self._compress = compress
        self._verify = verify
        self._most = permissions(image.files)
        self._digests: dict[Identity, str] = {}
        self._known = {e.digest: e for e in repository.entries if e.digest is not None}
        self._there = repository.there()
        self._added: list[Entry] = []
        listed = image.snapshots
        self._listed = {s.identity for s in listed}
        self._guard = image.guard(listed)  # one for each would parse the table for each

    def run(self) -> list[Entry]:
        table = self._image.table()
        failed: list[str] = []
        for s in table.snapshots:
            raise_if_interrupted()
            try:
                self._take(s)
            except SnapshotGone:
                self._warn(f"snapshot {shown(s.name)} was deleted meanwhile: it is left out")
            except ImageError as e:
                failed.append(str(e))
        if table.damage is not None:
            failed.append(f"the snapshot table of {shown(self._image.path)}: {table.damage}")
        self._tell_of_losses()
        for line in failed[1:]:
            self._warn(line)
        if failed:
            raise ImageError(f"{failed[0]}: all that can be read is in the repository")
        return self._added

    def _tell_of_losses(self) -> None:
        lost = [entry for entry in self._repository.entries if not self._is_there(entry)]
        if lost:
            what = counted(len(lost), "snapshot")
            where = shown(self._repository.directory)
            self._warn(f"{what} in {where} cannot be restored: verify says why")

    def _take(self, s: Snapshot) -> None:
        """Raises SnapshotGone when it is; that of another only has it done again."""
        for attempt in range(_ATTEMPTS):
            try:
                self._take_once(s)
                return
            except SnapshotGone:
                there = {other.identity for other in self._image.snapshots}
                if s.identity not in there or attempt == _ATTEMPTS - 1:
                    raise

    def _take_once(self, s: Snapshot) -> None:
        lost = self._entry_of(s)
        if lost is None:
            if self._adopt(s):
                return
        elif self._is_there(lost):
            return
        can_bear = self._there
        if lost is not None:  # a manifest names nothing before what it lies on
            entries = self._repository.entries
            can_bear = can_bear & {entry.disk.file for entry in entries[: entries.index(lost)]}
        there = self._image.snapshots
        numbers = {other.identity: number for number, other in enumerate(there)}
        at = numbers.get(s.identity, len(there))
        for other in sorted(there, key=lambda other: abs(numbers[other.identity] - at)):
            with suppress(ImageError):  # it is gone, or damaged and will say so itself
                entry = None if other.identity == s.identity else self._entry_of(other)
                if entry is not None and entry.disk.file in can_bear:
                    below = self._image.disk(other), entry
                    deep = self._repository.depth(entry) >= DEEPEST
                    break
        else:
            deep = True
        self._write(s, None if deep else below, lost)

    def _is_there(self, entry: Entry) -> bool:
        """Whether it can be restored, as far as the sizes of files tell."""
        if entry.vm_state is not None and not self._repository.has(entry.vm_state):
            return False
        return entry.disk.file in self._there

    def _entry_of(self, s: Snapshot) -> Entry | None:
        """The repository's entry of it."""
        return self._known.get(self._digest(s))

    def _digest(self, s: Snapshot) -> str:
        if s.identity not in self._digests:
            record = self._record(s)
            assert record is not None
            digest = hashlib.sha256(record.digest.encode())
            for file in self._image.files[1:]:  # who writes to one changes every snapshot
                status = None if is_uri(file.path) else os.stat(file.absolute)
                digest.update(repr(status and (status.st_size, status.st_mtime_ns)).encode())
            self._digests[s.identity] = digest.hexdigest()
        return self._digests[s.identity]

    def _record(self, s: Snapshot) -> Held | None:
        if s.identity in self._listed:
            with suppress(SnapshotGone):  # or another is: then this one is asked for alone
                return held(self._image.disk(s, guard=self._guard), s.identity)
        return held(self._image.disk(s))

    def _adopt(self, s: Snapshot) -> bool:
        """Whether an entry is the same snapshot, of an image that was compacted or restored from
        the repository: then its tables lie elsewhere, and all of its content is compared."""
        for number, entry in enumerate(self._repository.entries):
            if described(entry.snapshot) != described(s) or not self._is_there(entry):
                continue
            if self._has_content_of(s, entry):
                entries = list(self._repository.entries)
                entries[number] = entry._replace(digest=self._digest(s))
                self._repository.store(Manifest(tuple(entries)), self._most)
                self._known[self._digest(s)] = entries[number]
                return True
        return False

    def _has_content_of(self, s: Snapshot, entry: Entry) -> bool:
        disk = self._image.disk(s)
        what = shown(self._repository.path(entry.disk.file))
        try:
            with (
                self._repository.open(entry, self._image.options.words) as image,
                progress("comparing", disk.size + s.vm_state_size) as bar,
            ):
                compare(disk, partial(whole, disk), image.active_disk(), what, bar)
                if entry.vm_state is not None:
                    compare_vm_state(
                        self._image.disk(s, vm_state=True),
                        self._repository.path(entry.vm_state.file),
                        what,
                        bar,
                    )
        except Differs:
            return False
        return True

    def _write(self, s: Snapshot, below: tuple[Disk, Entry] | None, lost: Entry | None) -> None:
        """Add a snapshot, or put one into the place of what is lost of it."""
        image, repository = self._image, self._repository
        disk = image.disk(s)
        vm_state = image.disk(s, vm_state=True) if s.vm_state_size else None
        file, vm_file = repository.next_names()
        if lost is not None:
            file = lost.disk.file
            vm_file = lost.vm_state.file if lost.vm_state is not None else vm_file
        step = Step(disk, None if below is None else below[0])
        parent = None if below is None else below[1].disk.file
        shape = shape_of(image).over(None if parent is None else (parent, "qcow2"))
        if self._compress is not None:
            shape = shape._replace(compression=COMPRESSIONS[self._compress])
        plans: list[tuple[int, Plan]] = [(disk.size, step.plan)]
        if vm_state is not None:
            plans.append((vm_state.size, partial(whole, vm_state)))
        if self._compress is None:
            saved = spared(disk, step.plan, shape)
            size = disk.cluster_size
            total = check_room(plans, size, repository.directory, disk.name, saved)
        else:
            total = count(step.plan).data  # nobody knows what it will take
        kept: Stored | None = None
        if vm_state is None:
            repository.remove(vm_file)
        else:
            with repository.replaced(vm_file, self._most) as part:
                write_vm_state(part, repository.path(vm_file), vm_state, self._verify)
                kept = stored(part, vm_file)
        with repository.replaced(file, self._most) as part:
            name = repository.path(file)
            with progress("copying", total) as bar:
                write_disk(part, name, step, shape, bar, self._compress is not None)
            if self._verify:
                with progress("comparing", disk.size) as bar:
                    compare_disk(part, name, step, Options(words=image.options.words), bar)
            entry = Entry(s, stored(part, file), parent, kept, self._digest(s))
            if lost is not None:
                entries = (entry if each == lost else each for each in repository.entries)
                repository.store(Manifest(tuple(entries)), self._most)
        if lost is None:
            repository.store(Manifest((*repository.entries, entry)), self._most)
            self._there.add(file)
        else:
            self._warn(
                f"{shown(repository.path(file))} could not be restored: it was written again"
            )
            self._there = repository.there()  # with what lies on it
        self._known[self._digest(s)] = entry
        self._added.append(entry)
