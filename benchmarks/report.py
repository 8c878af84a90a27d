"""From the rounds to what is printed: ratios, or that the rounds do not agree on one."""

from __future__ import annotations

import os
import platform
import subprocess
from pathlib import Path
from statistics import median
from typing import Any

from clients import Figure
from images import MiB
from rows import Row

#: {who: figure}
Round = dict[str, Figure]

# Rounds whose ratios are further apart were measured on another machine each, in effect.
MOST_APART = 4 / 3


def spread(rounds: list[Round], one: str, other: str) -> tuple[float, float]:
    """The lowest and the highest ratio of two rates within a round."""
    ratios = [r[one].rate / r[other].rate for r in rounds]
    return min(ratios), max(ratios)


def ratio(rounds: list[Round], one: str, other: str) -> float | None:
    """The median of the ratios, or None where they differ by more than a third."""
    low, high = spread(rounds, one, other)
    if high > low * MOST_APART:
        return None
    return median(r[one].rate / r[other].rate for r in rounds)


def settled(rounds: list[Round], row: Row, engines: list[str]) -> bool:
    """Whether every ratio that has a goal can be given."""
    others = row.others if row.to_file is not None else row.others[:1]
    return all(ratio(rounds, e, o) is not None for e in engines for o in others)


def reaches(rounds: list[Round], one: str, other: str, goal: float) -> bool | None:
    """Whether the ratio is at least the goal; None where the rounds do not agree on that.  They may
    on that though they do not on a ratio."""
    found = ratio(rounds, one, other)
    if found is not None:
        return found >= goal
    low, high = spread(rounds, one, other)
    return None if low < goal <= high else low >= goal


def judge(rounds: list[Round], row: Row, engine: str) -> str:
    """Whether the goals of a row are reached: ``yes``, what is not, or ``?``."""
    beside = row.others[0]
    goals = {"rate": reaches(rounds, engine, beside, row.goal)}
    if row.to_file is not None:
        goals["file"] = reaches(rounds, engine, "file", row.to_file)
    goals["CPU"] = cpu(rounds, engine) <= cpu(rounds, beside)
    missed = [name for name, reached in goals.items() if reached is False]
    if missed:
        return "no: " + ", ".join(missed)
    return "?" if None in goals.values() else "yes"


def rate(rounds: list[Round], who: str) -> float:
    return median(r[who].rate for r in rounds)


def cpu(rounds: list[Round], who: str) -> float:
    return median(r[who].cpu for r in rounds)


def summary(rounds: list[Round], row: Row, engines: list[str]) -> dict[str, Any]:
    """A row for JSON and for the table, from those of its rounds that count."""
    who = [*engines, *row.others]
    pairs = [(e, o) for e in engines for o in row.others]
    return {
        "unit": row.unit,
        "goal": row.goal,
        "goal_to_file": row.to_file,
        "others": row.others,
        "rate": {w: rate(rounds, w) for w in who},
        "cpu": {w: cpu(rounds, w) for w in who},
        "peak_memory": {w: max(r[w].memory for r in rounds) for w in who},
        "ratio": {e: {o: ratio(rounds, e, o) for o in row.others} for e in engines},
        "spread": {f"{e} to {o}": spread(rounds, e, o) for e, o in pairs},
        "reached": {e: judge(rounds, row, e) for e in engines},
    }


def table(results: dict[str, dict[str, Any]], engines: list[str]) -> str:
    """Markdown; "CPU" is in microseconds of the server for each request, MiB or map."""
    head = [x for e in engines for x in (e, "CPU")] + ["qemu", "CPU", "file", "CPU"]
    head += [f"{e} : qemu" if len(engines) > 1 else "to qemu" for e in engines] + ["goal"]
    head += [f"{e} : file" if len(engines) > 1 else "to file" for e in engines] + ["goal"]
    head += ["peak MiB"] + [f"{e} reached" if len(engines) > 1 else "reached" for e in engines]
    lines = ["| row | " + " | ".join(head) + " |", "| --- |" + " ---: |" * len(head)]
    for name, r in results.items():
        others = [*r["others"], None][:2]
        cells = []
        for who in (*engines, *others):
            cells += ["-", "-"] if who is None else [f"{r['rate'][who]:,.4g}", _us(r["cpu"][who])]
        for other, goal in zip(others, (r["goal"], r["goal_to_file"]), strict=True):
            cells += ["-" if other is None else _ratio(r, e, other) for e in engines]
            cells.append("-" if goal is None else f"{goal}")
        cells.append(" ".join(f"{r['peak_memory'][e] / MiB:.0f}" for e in engines))
        cells += [r["reached"][e] for e in engines]
        lines.append(f"| {name} ({r['unit']}) | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _us(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}"


def _ratio(row: dict[str, Any], engine: str, other: str) -> str:
    found = row["ratio"][engine][other]
    if found is not None:
        return f"{found:.2f}"
    low, high = row["spread"][f"{engine} to {other}"]
    return f"{low:.2f} to {high:.2f}"


def notes(results: dict[str, dict[str, Any]]) -> list[str]:
    """What a reader of the table has to know of this run."""
    said = []
    if any(None in of.values() for r in results.values() for of in r["ratio"].values()):
        said.append(
            "Where two numbers stand for a ratio the rounds differ by more than a third: the "
            "machine was too busy, and there is no ratio."
        )
    if "to-file/copy" in results:
        said.append(
            "to-file/copy: qemu is qemu-img convert -l and a sync, file is nbdcopy from the plugin."
        )
    return said


def machine() -> dict[str, str]:
    """What the figures were measured on."""
    model = [x for x in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in x]
    return {
        "cores": str(os.cpu_count()),
        "processor": model[0].partition(":")[2].strip() if model else platform.machine(),
        "kernel": platform.release(),
        "nbdkit": _version("nbdkit"),
        "qemu": _version("qemu-nbd"),
        "python": _version("/usr/bin/python3"),
        "libnbd": _version("nbdcopy"),
        "fio": _version("fio"),
    }


def _version(program: str) -> str:
    said = subprocess.run([program, "--version"], check=True, capture_output=True, text=True).stdout
    words = said.splitlines()[0].replace("fio-", "fio ").split()
    return next(w for w in words if w[0].isdigit())
