"""What the benchmark says of its rounds: a ratio only where they agree, and which goals are met."""

from __future__ import annotations

import sys

import pytest
from support.server import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))

import report
from clients import Figure
from rows import ROWS, Row

ROW = Row("x", "plain", "req/s", lambda kind, image: Figure(1, 1, 1), 1.5, to_file=0.8)


def rounds(*each: tuple[float, float, float], cpu: float = 8) -> list[report.Round]:
    """From the rates of the plugin, qemu-nbd and the file plugin; qemu-nbd takes 8 us."""
    names = ("plugin", "qemu-nbd", "file")
    costs = (cpu, 8, 5)
    return [
        {n: Figure(r, c, 1 << 20) for n, r, c in zip(names, rates, costs, strict=True)}
        for rates in each
    ]


def test_a_ratio_is_the_median_of_the_rounds_whatever_their_rates() -> None:
    busy_for_a_while = rounds((200, 100, 200), (22, 10, 20), (210, 100, 200))
    assert report.ratio(busy_for_a_while, "plugin", "qemu-nbd") == pytest.approx(2.1)
    assert report.settled(busy_for_a_while, ROW, ["plugin"])


def test_rounds_that_differ_by_more_than_a_third_give_no_ratio() -> None:
    apart = rounds((150, 100, 150), (201, 100, 150))
    assert report.ratio(apart, "plugin", "qemu-nbd") is None
    assert not report.settled(apart, ROW, ["plugin"])
    row = report.summary(apart, ROW, ["plugin"])
    assert "| 1.50 to 2.01 | 1.5 |" in report.table({"x": row}, ["plugin"])
    assert any("no ratio" in note for note in report.notes({"x": row}))
    assert report.ratio(rounds((150, 100, 150), (200, 100, 150)), "plugin", "qemu-nbd") == 1.75


@pytest.mark.parametrize(
    ("rates", "cpu", "said"),
    [
        ((150, 100, 187), 8, "yes"),
        ((149, 100, 180), 8, "no: rate"),
        ((150, 100, 188), 8, "no: file"),
        ((150, 100, 187), 8.1, "no: CPU"),
        ((100, 100, 200), 9, "no: rate, file, CPU"),
    ],
)
def test_each_goal_that_is_missed_is_named(rates, cpu: float, said: str) -> None:
    assert report.judge(rounds(rates, rates, cpu=cpu), ROW, "plugin") == said


def test_what_cannot_be_told_is_not_said_to_be_reached() -> None:
    assert report.judge(rounds((140, 100, 150), (250, 100, 150)), ROW, "plugin") == "?"
    assert report.judge(rounds((150, 100, 150), (250, 100, 400)), ROW, "plugin") == "?"


def test_rounds_may_agree_on_a_goal_and_not_on_a_ratio() -> None:
    assert report.judge(rounds((150, 100, 150), (250, 100, 150)), ROW, "plugin") == "yes"
    assert report.judge(rounds((80, 100, 80), (149, 100, 80)), ROW, "plugin") == "no: rate"


def test_every_row_has_a_name_of_its_own_that_a_command_line_can_have() -> None:
    names = [row.name for row in ROWS]
    assert len(set(names)) == len(names)
    assert not any(set(name) & set(" ,") for name in names)
