"""Which snapshots a policy keeps: the rules of ``restic forget``, in its words.

A rule with a number N looks at the periods that have snapshots, from the newest on, and keeps the
newest snapshot of each of the first N.  If there are fewer periods, it keeps the oldest snapshot as
well.  Periods are those of the calendar, in local time: hours, days, weeks that begin on Mondays,
months, years.  ``within`` keeps all snapshots that are younger than a duration, counted back from
the newest one that is not in the future.  A snapshot that any of the rules keeps is kept.

Source: "Removing snapshots according to a policy" in restic's documentation.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import date
from typing import Final, NamedTuple

from ..errors import UsageError, shown
from ..format.snapshots import Snapshot

#: How many to keep of a kind: every one.
ALL: Final = -1


class Duration(NamedTuple):
    """Of the calendar, but for the hours."""

    years: int
    months: int
    days: int
    hours: int

    def before(self, moment: int) -> float:
        """The time that much before another, both in seconds since the epoch."""
        t = time.localtime(moment)
        day = t.tm_year - self.years, t.tm_mon - self.months, t.tm_mday - self.days
        try:
            # It makes a date of whatever month and day it is given.
            return time.mktime((*day, *t[3:6], 0, 0, -1)) - 3600 * self.hours
        except OverflowError:
            return float("-inf")

    def __str__(self) -> str:
        return "".join(f"{n}{unit}" for n, unit in zip(self, "ymdh", strict=True) if n)


class Policy(NamedTuple):
    """How many to keep of each kind, or ALL; none if 0."""

    last: int = 0
    hourly: int = 0
    daily: int = 0
    weekly: int = 0
    monthly: int = 0
    yearly: int = 0
    within: Duration | None = None


def parse_duration(text: str) -> Duration:
    """Years, months, days and hours, as in ``2y5m7d3h``.  Raises UsageError."""
    parts = re.findall(r"(\d{1,9})([ymdh])", text, re.ASCII)
    amounts = {unit: int(n) for n, unit in parts}
    whole = "".join(map("".join, parts)) == text and len(amounts) == len(parts)
    if not whole or not any(amounts.values()):
        raise UsageError(
            f"{shown(text)} is no duration: give years, months, days and hours, like 2y5m7d3h"
        )
    return Duration(*(amounts.get(unit, 0) for unit in "ymdh"))


_PERIODS: Final[dict[str, Callable[[time.struct_time], object]]] = {
    "hourly": lambda t: t[:4],
    "daily": lambda t: t[:3],
    "weekly": lambda t: date(*t[:3]).isocalendar()[:2],
    "monthly": lambda t: t[:2],
    "yearly": lambda t: t[:1],
}


def reasons_to_keep(
    snapshots: Sequence[Snapshot], policy: Policy, now: float
) -> list[tuple[str, ...]]:
    """For each snapshot, in the table's order, why it is kept; nothing for one that is not.
    ``now`` is in seconds since the epoch."""
    moments = [(s.date_sec, s.date_nsec) for s in snapshots]
    # Of two with one time the table's later one is the newer.
    newest_first = sorted(range(len(snapshots)), key=lambda k: (moments[k], k), reverse=True)
    local = [time.localtime(seconds) for seconds, _ in moments]
    reasons: list[list[str]] = [[] for _ in snapshots]
    if policy.within is not None:
        for k in _younger(moments, policy.within, now):
            reasons[k].append(f"within {policy.within}")
    _count(newest_first, policy.last, range(len(snapshots)), "last", reasons)
    for kind, period in _PERIODS.items():
        _count(newest_first, getattr(policy, kind), [period(t) for t in local], kind, reasons)
    return [tuple(each) for each in reasons]


def _younger(moments: Sequence[tuple[int, int]], within: Duration, now: float) -> Iterator[int]:
    newest = max(((sec, nsec) for sec, nsec in moments if sec + nsec / 10**9 < now), default=None)
    start = None if newest is None else (within.before(newest[0]), newest[1])
    yield from (k for k, moment in enumerate(moments) if start is None or moment > start)


def _count(
    newest_first: Sequence[int],
    count: int,
    periods: Sequence[object],
    kind: str,
    reasons: Sequence[list[str]],
) -> None:
    """Note whom a rule keeps that counts periods."""
    met: object = None
    for k in newest_first:
        if not count:
            return
        if periods[k] != met:
            reasons[k].append(f"{kind} snapshot")
            met = periods[k]
            count -= 1
        elif k == newest_first[-1]:
            reasons[k].append(f"oldest {kind} snapshot")
