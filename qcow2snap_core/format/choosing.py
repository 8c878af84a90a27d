"""Which snapshot a user means, and what there is to choose from."""

from __future__ import annotations

from collections.abc import Sequence

from ..errors import UsageError, escaped, shown
from ..typed import Final, NamedTuple
from ..util.spelling import nearest
from .snapshot_table import Table
from .snapshots import Snapshot


class Choice(NamedTuple):
    """Which snapshot a user means: every part that is given must match."""

    either: str | None = None  # an ID, else a name
    id: str | None = None
    name: str | None = None

    @property
    def word(self) -> str:
        """What was typed of it, in full or most of it."""
        return next(part for part in (self.name, self.either, self.id) if part is not None)

    def __str__(self) -> str:
        parts = {"": self.either, "with the ID ": self.id, "named ": self.name}
        return " and ".join(f"{how}{shown(x)}" for how, x in parts.items() if x is not None)


def choose(table: Table, choice: Choice, path: str) -> Snapshot:
    """The first snapshot that matches (QEMU: bdrv_snapshot_find, find_snapshot_by_id_or_name).

    Raises UsageError that lists what there is.
    """
    matching = [
        s for s in table.snapshots if choice.id in (None, s.id) and choice.name in (None, s.name)
    ]
    if choice.either is not None:
        matching = [s for s in matching if s.id == choice.either] or [
            s for s in matching if s.name == choice.either
        ]
    if matching:
        return matching[0]
    damaged = f" (its snapshot table is damaged: {table.damage})" if table.damage else ""
    note = f" ({table.note})" if table.note else ""
    meant = did_you_mean(choice.word, table.snapshots)
    raise UsageError(
        f"no snapshot {choice} in {shown(path)}{damaged}: {meant}{summary(table.snapshots)}{note}"
    )


def did_you_mean(word: str, snapshots: Sequence[Snapshot]) -> str:
    """``did you mean 'nightly'? ``, if there is something like it."""
    name = nearest(word, (s.name for s in snapshots))
    return "" if name is None else f"did you mean {shown(name)}? "


_BRIEF: Final = 255  # characters of a name in a list; QEMU itself makes no longer one


def summary(snapshots: Sequence[Snapshot], most: int = 50) -> str:
    """The snapshots there are, in half a line."""
    if not snapshots:
        return "it has none"
    each = [f"{escaped(s.id, _BRIEF)} {shown(s.name, _BRIEF)}" for s in snapshots[:most]]
    more = f" and {len(snapshots) - most} more" if len(snapshots) > most else ""
    return "it has " + ", ".join(each) + more
