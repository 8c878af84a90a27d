"""What a check finds, and whose it is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, NamedTuple

from .disk import Disk

ACTIVE: Final = "@active"
MOST: Final = 1000  # findings; a lost table can make millions

# The kinds of findings.
BAD_TABLE: Final = "table"  # a table that cannot be read or believed
BAD_ENTRY: Final = "entry"  # out of bounds, unaligned, reserved bits
OVERLAP: Final = "overlap"
NOT_COUNTED: Final = "refcount"
IN_PLACE: Final = "copied"


class Finding(NamedTuple):
    """One thing that is wrong."""

    problem: str
    message: str
    snapshots: tuple[str, ...] = ()  # whose it is: IDs, or @active
    host: int | None = None  # host offset


class Owner(NamedTuple):
    """A snapshot or the active disk, of which something may be wrong."""

    id: str
    disk: Disk


class TooManyError(Exception):
    """There are enough findings."""


class Findings:
    """Gathers them."""

    def __init__(self) -> None:
        self.all: list[Finding] = []

    def add(
        self, problem: str, message: str, owners: Sequence[Owner] = (), host: int | None = None
    ) -> None:
        """Raises TooManyError after the last one that is wanted."""
        self.all.append(Finding(problem, message, tuple(o.id for o in owners), host))
        if len(self.all) == MOST:
            raise TooManyError
