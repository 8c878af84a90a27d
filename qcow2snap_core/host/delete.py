"""Having QEMU delete snapshots: qemu-img where nobody uses the image, else the QEMU that does.

It has to be exactly the one that is meant, and QEMU knows most of them by name.  Names repeat, and
one's name may be another's ID.  What a name leads to has changed with the versions of QEMU: the
first snapshot whose name it is, the first whose ID or name, an ID before any name.  So a name is
given only where all of these are one, and what is to be deleted later is looked at before the first
is.  A running QEMU can be given name and ID together.

What QEMU takes for the name that it is given may be more than what is equal to it (:mod:`.names`).

Each is looked for in the file's own table before, and there it must be gone afterwards, with all
others still there.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Protocol

from ..errors import Error, StorageError, UsageError, escaped, shown
from ..format.snapshots import Snapshot
from ..image.image import Image
from ..util.interrupts import raise_if_interrupted
from .names import fits, is_found, rewritten


class Deleter(Protocol):
    """A QEMU that deletes snapshots of one image."""

    def ensure_exact(self, there: Sequence[Snapshot], snapshot: Snapshot) -> None:
        """Raises UsageError unless it can be told that it is this one, while those are there."""

    def delete(self, there: Sequence[Snapshot], snapshot: Snapshot) -> None:
        """Have it done.  Raises QmpError or StorageError with QEMU's reason."""


def ensure_deletable(by: Deleter, there: Sequence[Snapshot], doomed: Sequence[Snapshot]) -> None:
    """Raises UsageError unless all of ``doomed`` can be deleted one after the other."""
    left = list(there)
    for snapshot in doomed:
        by.ensure_exact(left, snapshot)
        left.remove(snapshot)


def delete(image: Image, doomed: Sequence[Snapshot], by: Deleter) -> Iterator[Snapshot]:
    """Have snapshots deleted; each is handed out when it is gone from the file.

    Stops between two of them, when that was asked for (:mod:`..util.interrupts`).  Raises
    StorageError when the file does not say what QEMU was asked for.
    """
    for snapshot in doomed:
        raise_if_interrupted()
        there = image.table().snapshots
        if snapshot.identity not in {s.identity for s in there}:
            raise StorageError(f"{called(snapshot)} was deleted by somebody else meanwhile")
        by.ensure_exact(there, snapshot)
        failure: Error | None = None
        try:
            by.delete(there, snapshot)
        except Error as e:  # which does not say how far it came
            failure = e
        gone, lost = _missing(image, there, snapshot)
        if gone:
            yield snapshot
        elif failure is None:
            raise StorageError(
                f"QEMU has deleted {called(snapshot)}, but {shown(image.path)} still has it: is it "
                f"the file that QEMU has open?"
            )
        if lost is not None:
            why = "somebody else has deleted it" if failure is None else failure
            raise StorageError(
                f"since {called(snapshot)} was to be deleted {called(lost)} is missing from "
                f"{shown(image.path)} too: {why}"
            )
        if failure is not None:
            raise failure


def called(snapshot: Snapshot) -> str:
    """The snapshot in an error line."""
    return f"snapshot {shown(snapshot.name)} (ID {escaped(snapshot.id)})"


def ensure_named(there: Sequence[Snapshot], snapshot: Snapshot, instead: str = "") -> None:
    """Raises UsageError unless its name means this snapshot to every QEMU; ``instead`` is what can
    be done."""
    name = snapshot.name
    if "\0" in name + snapshot.id:
        raise UsageError(f"{called(snapshot)} cannot be told to QEMU, which reads up to the NUL")
    first = next(s for s in there if is_found(s, "name", name))
    taken = next(
        (s for s in there if is_found(s, "id", name) and s.identity != snapshot.identity), None
    )
    if first.identity != snapshot.identity:
        why = f"{called(first)} comes first"
    elif taken is not None:
        why = f"its name is the ID of {called(taken)}"
    elif not (fits("name", name) and fits("id", snapshot.id)):
        why = "which keeps only the beginning of its name or ID"
    else:
        return
    raise UsageError(f"{called(snapshot)} cannot be told to QEMU, {why}{instead}")


def _missing(
    image: Image, before: Sequence[Snapshot], doomed: Snapshot
) -> tuple[bool, Snapshot | None]:
    """Whether it is gone from the table, and another that is.  Raises StorageError."""
    table = image.table()
    if table.damage:
        raise StorageError(
            f"the snapshot table of {shown(image.path)} is damaged since {called(doomed)} was "
            f"deleted: {table.damage}"
        )
    missing = Counter(rewritten(s.identity) for s in before)
    missing -= Counter(rewritten(s.identity) for s in table.snapshots)
    gone = doomed.identity in missing
    missing -= Counter([doomed.identity])
    return gone, next((s for s in before if rewritten(s.identity) in missing), None)
