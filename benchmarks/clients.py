"""What is done to a server, or instead of one, while it is measured."""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from images import SNAPSHOT, Image, MiB
from servers import ROOT, arguments, environment, serve


class Figure(NamedTuple):
    """What one round says of one of those that are compared."""

    rate: float  # in the row's unit; more is better
    cpu: float  # microseconds of the server for each request, MiB or map
    memory: int  # peak resident bytes of the server


#: (what is served, image) to its figure
Measure = Callable[[str, Image], Figure]
#: (URI, image) to (rate, how many requests, MiB or maps that was)
Client = Callable[[str, Image], tuple[float, float]]


def run(line: list[str]) -> str:
    return subprocess.run(line, check=True, capture_output=True, text=True).stdout


def served(client: Client, warm: Client | None = None) -> Measure:
    """The client's rate, and what it costs the server; ``warm`` goes before it, uncounted."""

    def measure(kind: str, image: Image) -> Figure:
        with serve(kind, image) as server:
            if warm is not None:
                warm(server.uri, image)
            before = server.cpu()
            rate, amount = client(server.uri, image)
            return Figure(rate, (server.cpu() - before) / amount * 1e6, server.peak_memory())

    return measure


def fio(
    rw: str, block: str, depth: int, jobs: int = 1, span: int | None = None, seconds: float = 1
) -> Client:
    """Requests a second."""

    def client(uri: str, image: Image) -> tuple[float, float]:
        line = ["fio", "--name=x", "--ioengine=nbd", f"--uri={uri}", f"--rw={rw}", f"--bs={block}"]
        line += [f"--iodepth={depth}", f"--numjobs={jobs}", f"--size={span or image.size}"]
        line += ["--time_based", f"--runtime={seconds}", "--group_reporting"]
        said = run([*line, "--output-format=json"])
        result = json.loads(said[said.index("{") :])  # a line of text comes first
        read = result["jobs"][0]["read"]
        return float(read["iops"]), float(read["total_ios"])

    return client


def copy(uri: str, image: Image) -> tuple[float, float]:
    """MiB a second of nbdcopy over the whole disk."""
    amount = image.size / MiB
    start = time.monotonic()
    run(["nbdcopy", uri, "null:"])
    return amount / (time.monotonic() - start), amount


def extents(uri: str, image: Image) -> tuple[float, float]:
    """Whole maps a second."""
    start = time.monotonic()
    run(["nbdinfo", "--map", "--totals", uri])
    return 1 / (time.monotonic() - start), 1


def to_file(kind: str, image: Image) -> Figure:
    """MiB a second from the image to a new raw file that is on the disk: by ``qcow2snap copy``, by
    qemu-img convert and by nbdcopy from the plugin.  CPU is that of all processes."""
    target = image.path.with_suffix(".copy")
    target.unlink(missing_ok=True)
    os.sync()  # what others have left to write
    if kind == "qemu-img":
        line = ["qemu-img", "convert", "-f", "qcow2", "-O", "raw", "-l", SNAPSHOT]
        line += [str(image.path), str(target)]
        after = ["sync", str(target)]
    elif kind == "nbdcopy":
        program, *rest = arguments("plugin", image)
        line = [program, "-U", "-", *rest, "--run", f'nbdcopy --flush "$uri" "{target}"']
        after = ["true"]
    else:
        line = ["/usr/bin/python3", "-m", "qcow2snap_core", "copy"]
        line += [str(image.path), SNAPSHOT, str(target)]
        after = ["true"]
    start = time.monotonic()
    cpu = memory = 0
    try:
        for command in (line, after):
            seconds, peak = _finish(command, {**environment(kind), "PYTHONPATH": str(ROOT)})
            cpu, memory = cpu + seconds, max(memory, peak)
        amount = image.size / MiB
        return Figure(amount / (time.monotonic() - start), cpu / amount * 1e6, memory)
    finally:
        target.unlink(missing_ok=True)


def _finish(line: list[str], env: dict[str, str]) -> tuple[float, int]:
    """(seconds of CPU, peak resident bytes) of a program that succeeds."""
    process = subprocess.Popen(
        line, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, env=env, text=True
    )
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{Path(line[0]).name} failed")
    return used.ru_utime + used.ru_stime, used.ru_maxrss << 10
