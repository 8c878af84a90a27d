"""What a repository (:mod:`.repository`) holds: read and compared with its checksums, made an image
again, or one snapshot of it a disk.

Nothing is used of a file before all of it was found to be what was written.  In the image every
snapshot has its ID, name, dates, clock and VM state again; the active disk is that of the newest.
A repository may have seen one ID given to several snapshots, one after the other was deleted: then
the newest keeps it, and the others get numbers that are free.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Final, NamedTuple

from ..errors import ImageError, StorageError, UsageError, shown
from ..format.header import read_header
from ..format.snapshots import Snapshot
from ..image.disk import Disk
from ..image.extents import Extent
from ..image.layers import RawLayer
from ..image.opener import Options
from ..util.progress import progress
from ..util.wording import Wording
from .assembly import Member, amount, assemble, check_members, compare_assembled, free_ids
from .copy import Copied, copy
from .destinations import Destination
from .job import Warn
from .judge import Kind, Place
from .manifest import Entry, Manifest, open_in
from .mover import RawSource, whole
from .outputs import output, permissions
from .overlays import data_of, streams_of
from .repository import Repository, open_repository, stored_size
from .shape import Shape
from .verify import State

RESTORE_TARGETS: Final = Kind.FILE


class Verdict(NamedTuple):
    """What was found out about a snapshot in a repository."""

    entry: Entry
    problem: str | None  # one line; None where all of it is well


class Restored(NamedTuple):
    """What is in an image that was made again."""

    snapshots: list[Snapshot]
    left_out: list[Entry]


def verify(directory: str) -> list[Verdict]:
    """Read all of a repository.  Raises as :func:`.open_repository`."""
    return _verdicts(open_repository(directory))


def _verdicts(repository: Repository) -> list[Verdict]:
    found: dict[str, Verdict] = {}
    with progress("checking", stored_size(repository.entries)) as bar:
        for entry in repository.entries:
            problem: str | None = None
            try:
                repository.check(entry, bar)
            except (ImageError, StorageError) as e:
                problem = str(e)
            if problem is None and entry.parent is not None and found[entry.parent].problem:
                problem = f"{shown(repository.path(entry.disk.file))} lies on {entry.parent}"
                problem += ", which cannot be used"
            found[entry.disk.file] = Verdict(entry, problem)
    return list(found.values())


def restore_disk(
    directory: str, name: str, to: Destination, warn: Warn, words: Wording, verify: bool = True
) -> Copied:
    """Make ``to`` hold the disk of one snapshot, by its file's name, its ID or its name.

    Raises as :func:`.copy`, and ImageError when the repository is damaged.
    """
    repository = open_repository(directory)
    entry = repository.choose(name)
    repository.check_all(repository.manifest.down_from(entry))
    with repository.open(entry, words) as image:
        return copy(image, image.active_disk(), to, warn, verify=verify)


def restore(
    directory: str,
    place: Place,
    warn: Warn,
    words: Wording,
    verify: bool = True,
    skip_damaged: bool = False,
) -> Restored:
    """Make an image with all snapshots again.

    With ``verify`` it is compared with the repository before it gets its name.  With
    ``skip_damaged`` what is damaged, or lies on that, is left out, and ``warn`` is told why.
    Raises UsageError before anything is written when that cannot be done, ImageError when the
    repository is damaged, StorageError when the image cannot be written.
    """
    repository = open_repository(directory)
    if not repository.entries:
        raise UsageError(f"{shown(directory)} has no snapshots yet: nothing can be restored")
    left_out: list[Entry] = []
    if skip_damaged:
        repository, left_out = _without_damaged(repository, warn)
    else:
        _check_all(repository, words)
    out = place.name
    with ExitStack() as opened:
        disks, files = opened.enter_context(repository.layers(words))
        place.ensure_apart(files)
        members = _members(repository, disks, warn, opened)
        shape = _shape(disks[repository.entries[-1].disk.file])
        most = permissions(files)
        with output(out, most=most, replace=place.replace) as part:
            total = check_members(members, shape, part, out)
            with progress("restoring", total) as bar:
                assemble(part, out, shape, members, bar)
            if verify:
                with progress("comparing", amount(members)) as bar:
                    compare_assembled(part, out, members, Options(words=words), bar)
    return Restored([m.snapshot for m in members if m.snapshot is not None], left_out)


def _check_all(repository: Repository, words: Wording) -> None:
    try:
        repository.check_all(repository.entries)
    except ImageError as e:
        one, others = words.given("snapshot", "NAME"), words.flag("skip-damaged")
        raise ImageError(
            f"{e}: {one} restores one that does not need it, {others} all of these"
        ) from e


def _without_damaged(repository: Repository, warn: Warn) -> tuple[Repository, list[Entry]]:
    """What can be restored, as a repository, and what cannot."""
    verdicts = _verdicts(repository)
    for verdict in verdicts:
        if verdict.problem is not None:
            warn(f"{verdict.entry} is left out: {verdict.problem}")
    whole = tuple(v.entry for v in verdicts if v.problem is None)
    if not whole:
        raise ImageError(f"{shown(repository.directory)} has no snapshot that can be restored")
    left_out = [v.entry for v in verdicts if v.problem is not None]
    return Repository(repository.directory, Manifest(whole)), left_out


def _shape(disk: Disk) -> Shape:
    """That of the file that a disk is in: the newest image that was backed up was like this."""
    header = read_header(disk.tables.storage)
    return Shape(header.cluster_bits, header.extended_l2, header.compression)


def _members(
    repository: Repository, disks: dict[str, Disk], warn: Warn, opened: ExitStack
) -> list[Member]:
    entries = repository.entries
    shape = _shape(disks[entries[-1].disk.file])
    numbers = {entry.disk.file: number for number, entry in enumerate(entries)}
    members: list[Member] = []
    for entry, id_ in zip(entries, _ids(entries, warn), strict=True):
        disk = disks[entry.disk.file]
        state = State(entry.snapshot.name, disk.size, disk, partial(whole, disk))
        vm_state: State | None = None
        if entry.vm_state is not None:
            storage = open_in(repository.directory, entry.vm_state.file)
            opened.callback(storage.close)
            raw = RawSource(RawLayer(storage))
            vm_state = State("", entry.vm_state.size, raw, raw.plan)
        below = None if entry.parent is None else numbers[entry.parent]
        plan = disk.own if entry.parent is not None else partial(_data, disk)
        streams = streams_of(disk, shape)
        snapshot = entry.snapshot._replace(id=id_)
        members.append(Member(snapshot, state, below, plan, streams, vm_state))
    return members


def _data(disk: Disk) -> Iterator[Extent]:
    return data_of(whole(disk))


def _ids(entries: Sequence[Entry], warn: Warn) -> list[str]:
    """An ID for each, its own wherever no newer one has it."""
    free = free_ids(entry.snapshot.id for entry in entries)
    met: set[str] = set()
    found: list[str] = []
    for entry in reversed(entries):
        id_ = entry.snapshot.id
        if id_ in met:
            id_ = next(free)
            warn(f"{entry} gets the ID {id_}, since a newer one has its own")
        met.add(id_)
        found.append(id_)
    return found[::-1]
