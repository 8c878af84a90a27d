"""Random images by seed, and all that this program says of them held against QEMU.

    make differential SEEDS=2000 FROM=0
    python3 tests/differential.py --seed 17              one seed, with the comparisons of its turn
    python3 tests/differential.py --seed 17 --all        with every comparison there is
    python3 tests/differential.py --seed 17 --script     the commands that make its image
    python3 tests/differential.py --seed 17 --smallest   as few of them as still fail

Each seed is judged in a process and in a directory of its own ($TMPDIR says where); the directory
of one that failed is kept.  The status is 1 if anything was different.  What is compared, and
how, is in support/differential.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkProcess
from pathlib import Path

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).resolve().parents[1])]

from support.differential import steps
from support.differential.program import Program, generate
from support.differential.seeds import COMPARISONS, Verdict, judge, run, smallest, turn

_PATIENCE = 300  # seconds for a seed
_TRIES = 2  # for what depends on threads
_ALIKE = 24  # characters of the same failure
_FORK = multiprocessing.get_context("fork")


def judged(seeds: Sequence[int], names: Sequence[str], jobs: int) -> Iterator[Verdict]:
    """The verdicts as they come; a seed whose process dies or hangs has one as well."""
    parent = Path(tempfile.gettempdir())
    running: dict[Connection, tuple[int, ForkProcess, float]] = {}
    left = list(seeds)[::-1]
    try:
        while left or running:
            while left and len(running) < jobs:
                seed = left.pop()
                here, there = _FORK.Pipe(duplex=False)
                process = _FORK.Process(target=_child, args=(seed, parent, names, there))
                process.start()
                there.close()
                running[here] = seed, process, time.monotonic()
            for ready in wait(list(running), timeout=1):
                assert isinstance(ready, Connection)
                seed, process, _ = running.pop(ready)
                yield _received(ready, seed, process)
            for pipe, (seed, process, began) in list(running.items()):
                if time.monotonic() - began > _PATIENCE:
                    del running[pipe]
                    _end(process)
                    yield Verdict(seed, [f"it takes more than {_PATIENCE} seconds"])
    finally:
        for _, process, _ in running.values():
            _end(process)


def _child(seed: int, parent: Path, names: Sequence[str], pipe: Connection) -> None:
    os.setsid()  # so that it can be ended with all that it started
    pipe.send(run(seed, parent, names))


def _received(pipe: Connection, seed: int, process: ForkProcess) -> Verdict:
    try:
        verdict: Verdict = pipe.recv()
    except EOFError:
        process.join()
        return Verdict(seed, [f"its process ended with {process.exitcode}"])
    process.join()
    return verdict


def _end(process: ForkProcess) -> None:
    assert process.pid is not None
    os.killpg(process.pid, signal.SIGKILL)
    process.join()


# --- Output ---


def main() -> int:
    args = _arguments()
    if args.do:
        steps.OWN[args.do[0]](*args.do[1:])
        return 0
    names = list(COMPARISONS) if args.all else args.only
    if args.seed is None:
        return _many(range(args.start, args.start + args.seeds), names, args.jobs)
    program = generate(args.seed)
    if args.smallest:
        program = _smallest(program, names or turn(args.seed))
    if args.script or args.smallest:
        print(program.script(), end="")
        return 0
    return _many([args.seed], names, 1)


def _many(seeds: Sequence[int], names: Sequence[str], jobs: int) -> int:
    counted: Counter[str] = Counter()
    wrong = done = 0
    began = time.monotonic()
    try:
        for verdict in judged(seeds, names, jobs):
            done += 1
            if sys.stderr.isatty():
                print(f"{done} of {len(seeds)}", end="\r", file=sys.stderr)
            counted.update(verdict.counted)
            wrong += bool(verdict.wrong)
            for line in verdict.wrong:
                print(f"seed {verdict.seed}: {line}", flush=True)
            if verdict.wrong:
                replay = f"{sys.executable} {__file__} --seed {verdict.seed}"
                print(f"  to replay: {replay}; kept: {verdict.kept}", flush=True)
    except KeyboardInterrupt:
        print("interrupted")
    if len(seeds) > 1:
        print("\nseeds with")
        for name, n in sorted(counted.items()):
            print(f"{n:7}  {name}")
    seconds = time.monotonic() - began
    print(f"{done} seeds in {seconds:.0f} s, {wrong} of them with something different")
    return 1 if wrong or done < len(seeds) else 0


def _smallest(program: Program, names: Sequence[str]) -> Program:
    """Cut down to what still fails in the comparison that fails first."""
    verdict = _judged_apart(program, names)
    if not verdict.wrong:
        sys.exit(f"seed {program.seed}: nothing is different")
    name = verdict.wrong[0].partition(":")[0]

    last = verdict

    def fails(smaller: Program) -> bool:
        nonlocal last
        for _ in range(_TRIES):
            found = _judged_apart(smaller, [name])
            if found.wrong and found.wrong[0][:_ALIKE] == verdict.wrong[0][:_ALIKE]:
                last = found
                return True
        return False

    program = smallest(program, fails)
    print(f"# {last.wrong[0]}")
    return program


def _judged_apart(program: Program, names: Sequence[str]) -> Verdict:
    """In a process of its own."""
    here, there = _FORK.Pipe(duplex=False)
    with tempfile.TemporaryDirectory() as directory:

        def child() -> None:
            there.send(judge(program, names, Path(directory)))

        process = _FORK.Process(target=child)
        process.start()
        there.close()
        return _received(here, program.seed, process)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=_Formatter)
    parser.add_argument("--seeds", type=int, default=2000, help="how many")
    parser.add_argument("--from", type=int, default=0, dest="start", help="the first")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="at a time")
    parser.add_argument("--seed", type=int, help="one alone")
    parser.add_argument("--only", action="append", choices=COMPARISONS, default=[])
    parser.add_argument("--all", action="store_true", help="every comparison for every seed")
    parser.add_argument("--script", action="store_true", help="print the seed's commands")
    parser.add_argument("--do", nargs=4, help=argparse.SUPPRESS)
    parser.add_argument("--smallest", action="store_true", help="print as few as still fail")
    return parser.parse_args()


class _Formatter(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """The text above as it stands."""


if __name__ == "__main__":
    sys.exit(main())
