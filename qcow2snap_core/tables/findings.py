"""What a check finds, and whose it is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, NamedTuple, Protocol

from ..image.disk import Disk
from ..util.units import binary, counted

ACTIVE: Final = "@active"
MOST: Final = 1000  # findings; a lost table can make millions

# The kinds of findings.
BAD_TABLE: Final = "table"  # a table that cannot be read or believed
BAD_ENTRY: Final = "entry"  # out of bounds, unaligned, reserved bits
OVERLAP: Final = "overlap"
NOT_COUNTED: Final = "refcount"
IN_PLACE: Final = "copied"
UNREADABLE: Final = "data"  # clusters that cannot be read or decoded
LEAK: Final = "leak"  # clusters that are counted more often than used: no damage


class Finding(NamedTuple):
    """One thing that is wrong, or a waste of space."""

    problem: str
    message: str
    snapshots: tuple[str, ...] = ()  # whose it is: IDs, or @active
    host: int | None = None  # host offset
    clusters: int | None = None  # how many, of leaks

    @property
    def is_damage(self) -> bool:
        """False of leaked clusters, which waste space and harm nothing."""
        return self.problem != LEAK


class Owner(NamedTuple):
    """A snapshot or the active disk, of which something may be wrong."""

    id: str
    disk: Disk


class Named(Protocol):
    """An owner, or a snapshot that could not be opened."""

    @property
    def id(self) -> str: ...


class TooManyError(Exception):
    """There are enough findings."""


class Findings:
    """Gathers them, of everything or of what concerns one owner."""

    def __init__(self) -> None:
        self.all: list[Finding] = []
        #: whose findings are wanted, besides nobody's
        self.about: Owner | None = None
        self._ids: dict[tuple[str, ...], tuple[str, ...]] = {}

    def add(
        self, problem: str, message: str, owners: Sequence[Named] = (), host: int | None = None
    ) -> None:
        """Raises TooManyError after the last one that is wanted."""
        if owners and not self.concern(owners):
            return
        ids = tuple(o.id for o in owners)
        ids = self._ids.setdefault(ids, ids)  # 65,536 in each of them would be much memory
        self.all.append(Finding(problem, message, ids, host))
        if len(self.all) == MOST:
            raise TooManyError

    def add_leaks(self, clusters: int, size: int) -> None:
        """Clusters that take space and are nobody's, as one finding; ``size`` in bytes.

        Only where all else is well: what is behind a damaged table looks like a leak as well, and
        must not be given away.  And only where everything is asked for.
        """
        if not self.all and self.about is None:
            message = (
                f"{counted(clusters, 'cluster')} ({binary(size)}) counted more often than used: "
                f"space is wasted, nothing is harmed, and qemu-img check -r leaks gets it back"
            )
            self.all.append(Finding(LEAK, message, clusters=clusters))

    def concern(self, owners: Sequence[Named]) -> bool:
        """Whether what is wrong with something of theirs is wanted."""
        return self.about is None or any(owner is self.about for owner in owners)


def union(*lists: Sequence[Owner]) -> Sequence[Owner]:
    """All owners that are in any of the lists, each once."""
    first = lists[0] if lists else ()
    if all(owners == first for owners in lists):
        return first
    return tuple({id(owner): owner for owners in lists for owner in owners}.values())
