"""What is no row of the table: how long a start takes, and what the guard costs."""

from __future__ import annotations

import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median, quantiles
from typing import NamedTuple

from images import SNAPSHOT, Image
from servers import PLUGIN, ROOT, arguments, environment

START_GOAL = 2.0  # times the empty plugin, with bytecode
GUARD_GOAL = 1.0  # microseconds


class Start(NamedTuple):
    """Milliseconds of one start, to the first byte or the end of a command; CPU to its end."""

    wall: float
    cpu: float


def starts(engines: list[str], images: list[Image], rounds: int) -> dict[str, list[Start]]:
    """Every start of each server for each image, in turn, and of each command."""
    found: dict[str, list[Start]] = {}

    def note(name: str, kind: str, start: Callable[[], object]) -> None:
        with _environment(environment(kind)):
            found.setdefault(name, []).append(_timed(start))

    with tempfile.TemporaryDirectory() as folder:
        for part in ("plugin", "qcow2snap_core"):
            ignored = shutil.ignore_patterns("__pycache__")
            shutil.copytree(ROOT / part, Path(folder, part), ignore=ignored)
        fresh = Path(folder) / PLUGIN.relative_to(ROOT)
        for number in range(rounds + 1):
            if number == 1:
                found.clear()  # the first one made the bytecode and filled the page cache
            for image in images:
                for kind in ("empty", *engines, "qemu-nbd"):
                    line = arguments(kind, image)
                    note(f"{kind}, {image.path.stem}", kind, lambda x=line: _first_byte(x))
            for kind in engines:
                line = arguments(kind, images[0], fresh)
                without = {**environment(kind), "PYTHONDONTWRITEBYTECODE": "1"}
                with _environment(without):
                    found.setdefault(f"{kind} without bytecode", []).append(
                        _timed(lambda x=line: _first_byte(x))
                    )
            for name, line in _commands(images[0]).items():
                note(name, "plugin", lambda x=line: _quietly(x))
    return found


def _commands(image: Image) -> dict[str, list[str]]:
    python, path = "/usr/bin/python3", str(image.path)
    ours = [python, "-c", f"import sys; sys.path.insert(0, {str(ROOT)!r}); "]
    ours[-1] += "from qcow2snap_core.cli import command; sys.exit(command())"
    return {
        "python3 -c pass": [python, "-c", "pass"],
        "qcow2snap --version": [*ours, "--version"],
        "qcow2snap list": [*ours, "list", path],
        "qemu-img snapshot -l": ["qemu-img", "snapshot", "-l", path],
    }


def _first_byte(line: list[str]) -> object:
    import nbd

    handle = nbd.NBD()
    # The server inherits a socket that listens already: nobody has to wait and try again.
    handle.connect_systemd_socket_activation(line)
    handle.pread(1, 0)
    return handle


def _quietly(line: list[str]) -> None:
    subprocess.run(line, check=True, stdout=subprocess.DEVNULL)


def _timed(start: Callable[[], object]) -> Start:
    cpu, wall = _children(), time.monotonic()
    kept = start()
    wall = time.monotonic() - wall
    del kept  # libnbd ends its server, and waits for it
    return Start(wall * 1000, (_children() - cpu) * 1000)


def _children() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


@contextmanager
def _environment(wanted: dict[str, str]) -> Iterator[None]:
    before = dict(os.environ)
    os.environ.clear()
    os.environ.update(wanted)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


# The same tables, with and without somebody to ask whether they still hold: the active disk has
# no snapshot to lose.  Batches in turn, CPU time, and the least of each: only delays are noise.
_GUARD = """
import random, sys, time
sys.path.insert(0, sys.argv[1])
from qcow2snap_core.image.opener import open_image
with open_image(sys.argv[2]) as image:
    disks = image.snapshot(sys.argv[3]), image.active_disk()
    offsets = [random.randrange(disks[0].size >> 12) << 12 for _ in range(2000)]
    buffer, least = bytearray(4096), [10**9, 10**9]
    for _ in range(60):
        for i, disk in enumerate(disks):
            read, start = disk.pread_into, time.process_time_ns()
            for offset in offsets:
                read(buffer, offset)
            least[i] = min(least[i], time.process_time_ns() - start)
    print((least[0] - least[1]) / len(offsets) / 1000)
"""


def guard(engine: str, image: Image) -> float:
    """Microseconds of CPU for each read of 4 KiB."""
    line = [sys.executable, "-c", _GUARD, str(ROOT), str(image.path), SNAPSHOT]
    done = subprocess.run(line, check=True, capture_output=True, text=True, env=environment(engine))
    return float(done.stdout)


def medians(found: dict[str, list[Start]]) -> dict[str, Start]:
    return {k: Start(*(median(x) for x in zip(*v, strict=True))) for k, v in found.items()}


def quartiles(ours: list[Start], others: list[Start], field: str) -> list[float]:
    """Of the ratios within each round."""
    pairs = zip(ours, others, strict=True)
    return quantiles([getattr(o, field) / max(getattr(e, field), 0.1) for o, e in pairs], n=4)
