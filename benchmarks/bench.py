"""make bench: the plugin beside qemu-nbd and nbdkit's own file plugin, in one run.

Every row is measured with each server in turn, round after round, so that a machine which is busy
for a while is busy for all of them; the table has the medians over the rounds and of the ratios
within them.  Absolute numbers do not carry over to another machine, ratios nearly do.  Where the
rounds do not agree as many again are measured, and the last ones count; if those do not agree
either there is no ratio.

    /usr/bin/python3 benchmarks/bench.py --rounds 5 --json result.json [ROW …]

A table that takes longer than the machine is quiet can be measured a few rows at a time: what the
file has already of the same machine stays in it, and ``--show`` prints it all.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from datetime import date
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

import report
from images import Image, build
from report import Round
from rows import ROWS, Row
from servers import ENGINES, engine
from singles import GUARD_GOAL, START_GOAL, Start, guard, medians, quartiles, starts

FOLDER = Path(os.environ.get("BENCH_DIR", Path(__file__).resolve().parents[1] / "build" / "bench"))
SINGLES = ("start", "guard")
START_ROUNDS = 20  # of a tenth of a second


def set_caches(image: Image, cold: bool) -> None:
    """Put the image's files, and those below it, out of the page cache or into it."""
    for path in filter(None, (*image.files, image.raw)):
        with open(path, "rb") as f:
            if cold:
                os.fsync(f.fileno())
                os.posix_fadvise(f.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            else:
                while f.read(1 << 20):
                    pass


def measure(row: Row, engines: list[str], rounds: int) -> tuple[dict[str, Any], list[Round]]:
    """The row, and all of its rounds."""
    image = build(FOLDER, row.image)
    who = [*engines, *row.others]
    set_caches(image, row.cold)
    found: list[Round] = []
    while len(found) < rounds or not (
        report.settled(found[-rounds:], row, engines) or len(found) >= 2 * rounds
    ):
        first = len(found) % len(who)  # so that nobody always comes after the same one
        this: Round = {}
        for kind in who[first:] + who[:first]:
            if row.cold:
                set_caches(image, cold=True)
            this[kind] = row.measure(kind, image)
        found.append(this)
    return report.summary(found[-rounds:], row, engines), found


def print_starts(found: dict[str, list[Start]], engines: list[str]) -> None:
    for name, start in medians(found).items():
        print(f"start, {name}: {start.wall:.1f} ms, CPU {start.cpu:.1f} ms")
    for kind in engines:
        for image in (k.partition(", ")[2] for k in found if k.startswith(f"{kind}, ")):
            ours, empty = found[f"{kind}, {image}"], found[f"empty, {image}"]
            low, middle, high = quartiles(ours, empty, "wall")
            cpu = quartiles(ours, empty, "cpu")[1]
            reached = "yes" if middle <= START_GOAL else "no"
            wall = f"{middle:.2f}, goal {START_GOAL}: {reached}"
            if high > low * report.MOST_APART:
                wall = f"{low:.2f} to {high:.2f}, the starts differ by more than a third"
            print(f"start, {kind} to empty, {image}: {wall}; in CPU {cpu:.2f}")


def print_machine(results: dict[str, dict[str, Any]], machine: dict[str, str]) -> None:
    """The machine, and what its qemu-nbd and file plugin do."""
    print(", ".join(f"{k} {v}" for k, v in machine.items()))
    small = results.get("plain/4k-16")
    if small is not None:
        each = [f"{k} {small['rate'][k]:,.0f}, {small['cpu'][k]:.1f} us" for k in small["others"]]
        print(f"reads of 4 KiB a second, CPU of each: {'; '.join(each)}")


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("rows", nargs="*", help="by name or by how names begin; all if none")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--engines", default="plugin", help="native,python for two columns")
    parser.add_argument("--json", type=Path, help="put the results there too, beside other rows'")
    parser.add_argument("--show", action="store_true", help="print what is there, measure nothing")
    args = parser.parse_args()
    args.engines = args.engines.split(",")
    names = [*(row.name for row in ROWS), *SINGLES]
    for wanted in args.rows:
        if not any(name.startswith(wanted) for name in names):
            parser.error(f"no row begins with {wanted}: there are {' '.join(names)}")
    for wanted in args.engines:
        if wanted not in ENGINES:
            parser.error(f"{wanted} is no engine: there are {', '.join(ENGINES)}")
        if wanted != "plugin" and engine(wanted) != wanted:
            parser.error(f"the {wanted} engine is not here: nbdkit --dump-plugin says so too")
    if args.show and (args.json is None or not args.json.exists()):
        parser.error("--show prints what an earlier run has put into --json FILE")
    if args.rounds < 1:
        parser.error("there must be a round")
    return args


def merged(path: Path, found: dict[str, Any]) -> dict[str, Any]:
    """What was found now, and what the file has besides of the same machine and engines."""
    if not path.exists():
        return found
    before = json.loads(path.read_text())
    if any(before[k] != found[k] for k in ("machine", "engines")):
        return found
    rows = before["rows"] | found["rows"]
    order = [row.name for row in ROWS]
    return found | {
        "rows": {name: rows[name] for name in sorted(rows, key=order.index)},
        "start_ms": found["start_ms"] or before["start_ms"],
        "guard_us": found["guard_us"] or before["guard_us"],
    }


def show(everything: dict[str, Any]) -> None:
    """Print the machine, the table, and what is no row of it."""
    results, engines = everything["rows"], list(everything["engines"])
    print_machine(results, everything["machine"])
    print(", ".join(f"{kind}: {which} engine" for kind, which in everything["engines"].items()))
    if results:
        print(report.table(results, engines))
    for line in report.notes(results):
        print(line)
    if everything["start_ms"]:
        found = {k: [Start(**s) for s in each] for k, each in everything["start_ms"].items()}
        print_starts(found, engines)
    for kind, cost in everything["guard_us"].items():
        reached = "yes" if cost <= GUARD_GOAL else "no"
        print(f"guard, {kind}: {cost:.2f} us a read, goal {GUARD_GOAL}: {reached}")


def main() -> int:
    args = parsed()
    if args.show:
        show(json.loads(args.json.read_text()))
        return 0

    def chosen(name: str) -> bool:
        names = [row.name for row in ROWS]
        return not args.rows or any(
            name == x if x in names else name.startswith(x) for x in args.rows
        )

    wanted = [row for row in ROWS if chosen(row.name)]
    results: dict[str, dict[str, Any]] = {}
    everything: dict[str, Any] = {
        "date": date.today().isoformat(),
        "machine": report.machine(),
        "rounds": args.rounds,
        "engines": {kind: engine(kind) for kind in args.engines},
        "native": os.environ.get("QCOW2SNAP_NATIVE"),
        "rows": results,
        "start_ms": {},
        "guard_us": {},
    }

    def keep() -> None:
        if args.json:
            args.json.write_text(json.dumps(merged(args.json, everything), indent=1) + "\n")

    for i, row in enumerate(wanted, 1):
        print(f"\r\033[K{i}/{len(wanted)} {row.name}", end="", file=sys.stderr, flush=True)
        summary, rounds = measure(row, args.engines, args.rounds)
        raw = [{k: f._asdict() for k, f in r.items()} for r in rounds]
        results[row.name] = {**summary, "rounds": raw}
        keep()  # whoever interrupts a long run has the rows that are done
    print("\r\033[K", end="", file=sys.stderr)
    if chosen("start"):
        images = [build(FOLDER, name) for name in ("1-gib-empty", "16-tib-empty")]
        found = starts(args.engines, images, max(START_ROUNDS, args.rounds))
        everything["start_ms"] = {k: [s._asdict() for s in each] for k, each in found.items()}
    if chosen("guard"):
        everything["guard_us"] = {k: guard(k, build(FOLDER, "plain")) for k in args.engines}
    show(everything)
    keep()
    return 0


if __name__ == "__main__":
    sys.exit(main())
