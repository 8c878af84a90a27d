"""Which snapshots a policy keeps: the examples of restic's documentation, and its rules put
otherwise."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from datetime import datetime, timedelta
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qcow2snap_core.errors import UsageError
from qcow2snap_core.format.snapshots import Snapshot
from qcow2snap_core.tables.keep import ALL, Duration, Policy, parse_duration, reasons_to_keep

NEVER = 2.0**33  # later than any date that a table can have
KINDS = ("last", "hourly", "daily", "weekly", "monthly", "yearly")


@pytest.fixture(autouse=True, params=["UTC", "America/New_York"])
def zone(request: pytest.FixtureRequest) -> Iterator[ZoneInfo]:
    before = os.environ.get("TZ")
    os.environ["TZ"] = request.param
    time.tzset()
    yield ZoneInfo(request.param)
    os.environ.pop("TZ")
    if before is not None:
        os.environ["TZ"] = before
    time.tzset()


def snapshot(moment: datetime | int, nsec: int = 0, name: str = "") -> Snapshot:
    sec = moment if isinstance(moment, int) else int(moment.timestamp())
    return Snapshot("", name, sec, nsec, 0, 0, 0, None, 0, 0, 0, 0, 0)


def kept(moments: list[datetime], policy: Policy, now: float = NEVER) -> list[datetime]:
    reasons = reasons_to_keep([snapshot(m) for m in moments], policy, now)
    return [m for m, why in zip(moments, reasons, strict=True) if why]


def reasons(moments: list[datetime], policy: Policy) -> list[str]:
    found = reasons_to_keep([snapshot(m) for m in moments], policy, NEVER)
    return [", ".join(why) for why in found]


# --- restic's documentation, "Removing snapshots according to a policy" ---

SUNDAYS = [datetime(2019, 9, 1, 11) + timedelta(weeks=n) for n in range(12)]


def test_the_last_four_days_that_have_one_are_four_sundays() -> None:
    assert kept(SUNDAYS, Policy(daily=4)) == SUNDAYS[-4:]
    assert reasons(SUNDAYS, Policy(daily=4)) == [""] * 8 + ["daily snapshot"] * 4


def test_a_hundred_years_of_days() -> None:
    """``--keep-daily 7 --keep-weekly 5 --keep-monthly 12 --keep-yearly 75`` keeps 7 days, 4 more
    last days of the week, 11 more of the month and 74 more of the year; one is both."""
    last = datetime(2020, 8, 16, 12)  # a Sunday
    days = [last - timedelta(days=n) for n in reversed(range(36525))]
    assert kept(days, Policy(daily=7, weekly=5, monthly=12, yearly=75)) == sorted(
        {
            *days[-7:],
            *(last - timedelta(weeks=n) for n in range(1, 5)),
            *(d for d in days[-366:-16] if (d + timedelta(days=1)).day == 1 and d.year == 2020),
            *(datetime(2019, month, day, 12) for month, day in ((9, 30), (10, 31), (11, 30))),
            *(datetime(year, 12, 31, 12) for year in range(1946, 2020)),
        }
    )


def test_within_counts_from_the_newest() -> None:
    """``2y5m7d3h`` keeps what was made in that time before the newest one."""
    newest = datetime(2020, 8, 20, 15)
    edge = datetime(2018, 3, 13, 12)
    second = timedelta(seconds=1)
    moments = [edge - second, edge, edge + second, newest]
    policy = Policy(within=parse_duration("2y5m7d3h"))
    assert kept(moments, policy) == [edge + second, newest]
    assert reasons(moments, policy)[-1] == "within 2y5m7d3h"


def test_what_is_in_the_future_is_kept_and_is_not_the_newest() -> None:
    moments = [datetime(2020, 1, day) for day in (1, 5, 9, 20)]
    now = datetime(2020, 1, 10).timestamp()
    assert kept(moments, Policy(within=Duration(0, 0, 3, 0)), now) == moments[2:]
    assert kept(moments[3:], Policy(within=Duration(0, 0, 3, 0)), now) == moments[3:]


def test_the_oldest_is_kept_as_well_while_there_is_room() -> None:
    moments = [datetime(2020, 1, 1, hour) for hour in (8, 9, 10)]
    assert reasons(moments, Policy(daily=2)) == ["oldest daily snapshot", "", "daily snapshot"]
    assert reasons(moments, Policy(daily=1)) == ["", "", "daily snapshot"]
    assert reasons(moments, Policy(daily=ALL)) == ["oldest daily snapshot", "", "daily snapshot"]


def test_all_of_a_kind() -> None:
    assert kept(SUNDAYS, Policy(last=ALL)) == SUNDAYS
    assert kept(SUNDAYS, Policy(monthly=ALL)) == [SUNDAYS[n] for n in (0, 4, 8, 11)]


def test_what_any_rule_keeps_is_kept_for_all_its_reasons() -> None:
    assert reasons(SUNDAYS, Policy(last=1, weekly=2, yearly=1, within=Duration(0, 0, 1, 0))) == [
        *[""] * 10,
        "weekly snapshot",
        "within 1d, last snapshot, weekly snapshot, yearly snapshot",
    ]


# --- Calendars ---


def test_weeks_begin_on_mondays_and_have_years_of_their_own() -> None:
    sunday, monday = datetime(2020, 12, 27, 23, 59), datetime(2020, 12, 28)
    new_year = datetime(2021, 1, 3, 23, 59)  # still the week of that Monday
    assert kept([sunday, monday, new_year], Policy(weekly=2)) == [sunday, new_year]


def test_days_are_local(zone: ZoneInfo) -> None:
    before, after = datetime(2020, 6, 1, 23, 30), datetime(2020, 6, 2, 0, 30)
    assert kept([before, after], Policy(daily=2)) == [before, after]
    utc = [datetime(2020, 6, 1, hour, tzinfo=ZoneInfo("UTC")) for hour in (3, 5, 23)]
    one_day = [kept([a, b], Policy(daily=3, last=0)) for a, b in (utc[:2], utc[1:])]
    reasons_ = [reasons([a, b], Policy(daily=3))[0] for a, b in (utc[:2], utc[1:])]
    assert all(one_day)
    expected = {
        "UTC": ["oldest daily snapshot", "oldest daily snapshot"],
        "America/New_York": ["daily snapshot", "oldest daily snapshot"],
    }
    assert reasons_ == expected[zone.key]


def test_the_table_s_order_is_no_order_of_dates() -> None:
    moments = [datetime(2020, 1, day) for day in (3, 1, 2)]
    assert kept(moments, Policy(last=1)) == [moments[0]]
    same = [snapshot(100, 5, name) for name in "ab"] + [snapshot(100, 4, "c")]
    assert reasons_to_keep(same, Policy(last=1), NEVER) == [(), ("last snapshot",), ()]


def test_a_month_back_from_the_end_of_a_longer_one() -> None:
    """The 31st of February is the 2nd or 3rd of March, as in Go, in which restic is written."""
    newest = datetime(2019, 3, 31, 12)
    moments = [datetime(2019, 3, 3, 12), datetime(2019, 3, 3, 13), newest]
    assert kept(moments, Policy(within=Duration(0, 1, 0, 0))) == moments[1:]
    assert kept(moments, Policy(within=Duration(9999, 0, 0, 0))) == moments
    assert kept(moments, Policy(within=Duration(10**8, 10**8, 10**8, 10**8))) == moments


# --- The rules put otherwise ---

moments_ = st.lists(
    st.tuples(
        st.one_of(
            st.integers(1_500_000_000, 1_500_400_000),
            st.integers(1_400_000_000, 1_600_000_000),
            st.integers(0, 2**32 - 1),
        ),
        st.integers(0, 1),
    ),
    min_size=1,
    max_size=25,
)
counts = st.sampled_from([0, 0, 1, 2, 3, 7, ALL])


def period(kind: str, when: datetime, number: int) -> str:
    formats = {"hourly": "%Y-%m-%d %H", "daily": "%Y-%j", "weekly": "%G-%V", "monthly": "%Y-%m"}
    if kind == "last":
        return str(number)
    return when.strftime(formats.get(kind, "%Y"))


def by_sets(table: list[tuple[int, int]], count: int, kind: str, zone: ZoneInfo) -> set[int]:
    """The newest of each of the newest periods, and the oldest of all if there are fewer periods
    than are counted: as sets, without going through anything in order."""
    age = {k: (*table[k], k) for k in range(len(table))}
    group: dict[str, set[int]] = {}
    for k, (sec, _) in enumerate(table):
        when = datetime.fromtimestamp(sec, zone)
        group.setdefault(period(kind, when, k), set()).add(k)
    newest = {max(members, key=age.__getitem__) for members in group.values()}
    wanted = len(table) if count == ALL else count
    chosen = {k for k in newest if sum(age[other] > age[k] for other in newest) < wanted}
    if count == ALL or (count and len(newest) < count):
        chosen.add(min(age, key=age.__getitem__))
    return chosen


@given(table=moments_, policy=st.tuples(*[counts] * 6))
def test_the_rules_as_sets(
    zone: ZoneInfo, table: list[tuple[int, int]], policy: tuple[int, ...]
) -> None:
    expected: set[int] = set()
    for kind, count in zip(KINDS, policy, strict=True):
        expected |= by_sets(table, count, kind, zone)
    found = reasons_to_keep([snapshot(*m) for m in table], Policy(*policy), NEVER)
    assert {k for k, why in enumerate(found) if why} == expected
    if any(policy):
        newest = max(range(len(table)), key=lambda k: (*table[k], k))
        assert found[newest], "the newest is never deleted"


@given(table=moments_, days=st.integers(0, 400), hours=st.integers(0, 50), now=moments_)
def test_within_as_a_difference(
    table: list[tuple[int, int]], days: int, hours: int, now: list[tuple[int, int]]
) -> None:
    """In UTC, where days have 24 hours."""
    if time.tzname[0] != "UTC" or not days + hours:
        return
    present = now[0][0]
    past = [m for m in table if m[0] + m[1] / 10**9 < present]
    length = (days * 24 + hours) * 3600
    expected = [not past or (m[0] + length, m[1]) > max(past) for m in table]
    policy = Policy(within=Duration(0, 0, days, hours))
    found = reasons_to_keep([snapshot(*m) for m in table], policy, present)
    assert [bool(why) for why in found] == expected


# --- Durations ---


@pytest.mark.parametrize(
    ("text", "parsed"),
    [
        ("2y5m7d3h", (2, 5, 7, 3)),
        ("3h", (0, 0, 0, 3)),
        ("1d2y", (2, 0, 1, 0)),
        ("0y1m", (0, 1, 0, 0)),
    ],
)
def test_durations(text: str, parsed: tuple[int, ...]) -> None:
    assert parse_duration(text) == parsed


@pytest.mark.parametrize("text", ["", "2w", "7", "d", "1d 2h", "-1d", "1d1d", "0d", "1.5d", "²d"])
def test_what_is_no_duration(text: str) -> None:
    with pytest.raises(UsageError, match="is no duration: give years, months, days and hours"):
        parse_duration(text)
