"""One seed: its directory, its program, the comparisons that are its turn, the verdict."""

from __future__ import annotations

import os
import random
import shutil
import tempfile
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from . import judging, reading, serving, writing
from .program import Program, Step, generate
from .world import Different, Hung, Unavailable, Unreadable, World

Comparison = Callable[[World, random.Random], None]

#: Each comparison by its name, and for how many of the seeds it is made.
COMPARISONS: dict[str, tuple[Comparison, float]] = {
    "reads": (reading.reads, 1),
    "extents": (reading.extents, 1),
    "map": (reading.maps, 0.5),
    "diff": (reading.differences, 1),
    "list": (reading.listed, 1),
    "VM state": (reading.vm_states, 1),
    "check": (judging.checks, 1),
    "check of damage": (judging.damages, 0.3),
    "exclusive sizes": (judging.exclusive, 1),
    "copy": (writing.copies, 0.4),
    "copy --since": (writing.updates, 0.5),
    "copy --since by NBD": (writing.updates_by_nbd, 0.2),
    "split": (writing.splits, 0.25),
    "join": (writing.joins, 0.3),
    "nbdkit": (serving.served, 0.15),
    "remote image": (serving.remotely, 0.15),
    "block device": (serving.devices, 0.1),
    "compact": (writing.compacts, 0.4),
    "copy --salvage": (writing.salvages, 0.3),
    "backup": (writing.backs_up, 0.3),
}


@dataclass
class Verdict:
    """What came of a seed."""

    seed: int
    wrong: list[str] = field(default_factory=list)  # "comparison: what"
    counted: list[str] = field(default_factory=list)  # features, comparisons that were made
    kept: Path | None = None  # where its image still is


def turn(seed: int) -> list[str]:
    """The comparisons that are made for a seed."""
    rng = random.Random(f"turn {seed}")
    return [name for name, (_, share) in COMPARISONS.items() if rng.random() < share]


def judge(program: Program, names: Sequence[str], directory: Path) -> Verdict:
    """Run a program in an empty directory, which becomes the working directory, and compare."""
    verdict = Verdict(program.seed)
    # QEMU takes relative names of data files from where it runs.
    os.chdir(directory)
    try:
        world = World(program, directory)
    except Hung:
        verdict.counted.append("left out, since QEMU hung")
        return verdict
    for name in names:
        rng = random.Random(f"{name} {program.seed}")
        try:
            COMPARISONS[name][0](world, rng)
            verdict.counted.append(f"compared: {name}")
        except Unreadable:
            verdict.counted.append(f"not compared, since QEMU cannot read its own image: {name}")
        except Unavailable:
            pass
        except Different as e:
            verdict.wrong.append(f"{name}: {e}")
        except Exception:  # noqa: BLE001 (this too is what it looks for)
            verdict.wrong.append(f"{name}: {traceback.format_exc()}")
    verdict.counted += [*program.features, *world.notes]
    return verdict


def run(seed: int, parent: Path, names: Sequence[str] = ()) -> Verdict:
    """Judge a seed in a directory of its own, which is removed if nothing is wrong."""
    directory = Path(tempfile.mkdtemp(prefix=f"differential-{seed}-", dir=parent))
    verdict = judge(generate(seed), names or turn(seed), directory)
    os.chdir("/")
    if verdict.wrong:
        verdict.kept = directory
    else:
        shutil.rmtree(directory)
    return verdict


# --- Cutting a failing one down ---


def smallest(program: Program, fails: Callable[[Program], bool]) -> Program:
    """A program that still fails, and of which no step can be left out."""
    tried = True
    while tried:
        tried = False
        for steps in _smaller(program.steps):
            if fails(program.with_steps(steps)):
                program, tried = program.with_steps(steps), True
                break
    return program


def _smaller(steps: Sequence[Step]) -> Iterator[list[Step]]:
    """Without half of them, a quarter ... one, the last ones first; then without single commands of
    qemu-io."""
    size = len(steps) // 2
    while size:
        for end in range(len(steps), 0, -size):
            yield [*steps[: max(0, end - size)], *steps[end:]]
        size //= 2
    for n, step in enumerate(steps):
        for at, word in enumerate(step):
            if word == "-c" and step[0] == "qemu-io" and step.count("-c") > 1:
                yield [*steps[:n], (*step[:at], *step[at + 2 :]), *steps[n + 1 :]]
