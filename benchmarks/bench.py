"""make bench: the plugin beside qemu-nbd and nbdkit's own file plugin, in one run.

Every workload is measured with each server in turn, round after round, so that a machine which
is busy for a while is busy for all of them; the table has the medians over the rounds and their
ratios.  Absolute numbers do not carry over to another machine, ratios nearly do.

    /usr/bin/python3 benchmarks/bench.py --rounds 5 --json result.json [WORKLOAD …]
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).resolve().parent))

from images import Image, MiB, build
from servers import SERVERS, command, serve

FOLDER = Path(os.environ.get("BENCH_DIR", Path(__file__).resolve().parents[1] / "build" / "bench"))
Measure = Callable[[str, Image], float]  # (URI, image) to something of which more is better


@dataclass(frozen=True)
class Workload:
    """One row of the table."""

    image: str
    unit: str
    measure: Measure
    goal: float | None  # the least ratio to qemu-nbd that we want
    cold: bool = False
    servers: tuple[str, ...] = SERVERS


def fio(
    rw: str, block: str, depth: int, jobs: int = 1, span: int | None = None, seconds: float = 2
) -> Measure:
    """Requests per second."""

    def measure(uri: str, image: Image) -> float:
        line = ["fio", "--name=x", "--ioengine=nbd", f"--uri={uri}", f"--rw={rw}", f"--bs={block}"]
        line += [f"--iodepth={depth}", f"--numjobs={jobs}", f"--size={span or image.size}"]
        line += ["--time_based", f"--runtime={seconds}", "--group_reporting"]
        said = run([*line, "--output-format=json"])
        result = json.loads(said[said.index("{") :])  # a line of text comes first
        return float(result["jobs"][0]["read"]["iops"])

    return measure


def copy(uri: str, image: Image) -> float:
    """Megabytes per second of nbdcopy over the whole disk."""
    start = time.monotonic()
    run(["nbdcopy", uri, "null:"])
    return image.size / (time.monotonic() - start) / 1e6


def extents(uri: str, image: Image) -> float:
    """Whole maps per second."""
    start = time.monotonic()
    run(["nbdinfo", "--map", "--totals", uri])
    return 1 / (time.monotonic() - start)


def run(line: list[str]) -> str:
    return subprocess.run(line, check=True, capture_output=True, text=True).stdout


def _suite(image: str, prefix: str, goal: float) -> dict[str, Workload]:
    return {
        f"{prefix}4k random, depth 1": Workload(image, "req/s", fio("randread", "4k", 1), goal),
        f"{prefix}4k random, depth 16": Workload(image, "req/s", fio("randread", "4k", 16), goal),
        f"{prefix}4k random, 16 x 4": Workload(image, "req/s", fio("randread", "4k", 16, 4), goal),
        f"{prefix}64k random": Workload(image, "req/s", fio("randread", "64k", 16), goal),
        f"{prefix}1M sequential": Workload(image, "req/s", fio("read", "1M", 16), goal),
        f"{prefix}nbdcopy": Workload(image, "MB/s", copy, goal),
    }


def _compressed(image: str, copy_goal: float) -> dict[str, Workload]:
    # The default cache holds 64 MiB of decoded clusters.
    fits, four_times = 48 * MiB, 256 * MiB
    row = Workload
    return {
        f"{image}: nbdcopy": row(image, "MB/s", copy, copy_goal),
        f"{image}: 4k sequential": row(image, "req/s", fio("read", "4k", 16), 5),
        f"{image}: 4k random, cached": row(
            image, "req/s", fio("randread", "4k", 16, span=fits, seconds=4), 5
        ),
        f"{image}: 4k random, 4 x cache": row(
            image, "req/s", fio("randread", "4k", 16, span=four_times), 1.5
        ),
    }


WORKLOADS: dict[str, Workload] = {
    **_suite("plain", "", 1.5),
    **_suite("4k-clusters", "4k clusters: ", 1.5),
    **_suite("fragmented", "fragmented: ", 1.5),
    **_suite("chain-of-5", "chain of 5: ", 1.5),
    **_compressed("zlib", 2.5),
    **_compressed("zstd", 1.5),
    "luks: nbdcopy": Workload("luks", "MB/s", copy, 1.2),
    "luks: 4k random, depth 16": Workload("luks", "req/s", fio("randread", "4k", 16), 1.0),
    "cold: 4k random": Workload("plain", "req/s", fio("randread", "4k", 16), 0.9, cold=True),
    "cold: nbdcopy": Workload("plain", "MB/s", copy, 0.9, cold=True),
    "nbdinfo --map of 1 TiB": Workload(
        "1-tib", "1/s", extents, 1.5, servers=("plugin", "qemu-nbd")
    ),
}


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


def measure(workload: Workload, rounds: int) -> dict[str, object]:
    image = build(FOLDER, workload.image)
    figures: dict[str, list[float]] = {kind: [] for kind in workload.servers}
    memory: dict[str, int] = dict.fromkeys(workload.servers, 0)
    set_caches(image, workload.cold)
    for _ in range(rounds):
        for kind in workload.servers:
            if workload.cold:
                set_caches(image, cold=True)
            with serve(kind, image) as server:
                figures[kind].append(workload.measure(server.uri, image))
                memory[kind] = max(memory[kind], server.peak_memory())
    medians = {kind: median(values) for kind, values in figures.items()}
    ratios = {
        kind: median(p / o for p, o in zip(figures["plugin"], figures[kind], strict=True))
        for kind in workload.servers
        if kind != "plugin"
    }
    return {
        "unit": workload.unit,
        "median": medians,
        "ratio": ratios,
        "goal": workload.goal,
        "peak_memory": memory,
    }


def starts(rounds: int) -> dict[str, float]:
    """Median seconds from start to first byte, by server and image."""
    found: dict[str, float] = {}
    for name in ("1-gib-empty", "64-gib-empty", "1-tib-empty", "16-tib-empty"):
        image = build(FOLDER, name)
        for kind in ("empty", "plugin", "qemu-nbd"):
            found[f"{kind}, {name}"] = median(_first_byte(kind, image) for _ in range(rounds))
    return found


def _first_byte(kind: str, image: Image) -> float:
    socket = FOLDER / "start.sock"
    socket.unlink(missing_ok=True)
    read = "import nbd,sys,time\nh=nbd.NBD()\nwhile 1:\n try: h.connect_unix(sys.argv[1]); break\n"
    read += " except nbd.Error: time.sleep(.001); h=nbd.NBD()\n"
    read += "h.pread(1,0); print(time.monotonic())"
    client = subprocess.Popen(
        [sys.executable, "-c", read, str(socket)], stdout=subprocess.PIPE, text=True
    )
    time.sleep(0.3)  # the client's own start is no part of it
    start = time.monotonic()
    server = subprocess.Popen(command(kind, image, socket), stderr=subprocess.DEVNULL)
    try:
        out, _ = client.communicate(timeout=30)
        return float(out) - start
    finally:
        server.terminate()
        server.wait()


def table(results: dict[str, dict[str, object]]) -> str:
    lines = ["| workload | plugin | qemu-nbd | file | to qemu-nbd | goal | to file | peak MiB |"]
    lines.append("| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
    for name, r in results.items():
        medians, ratios, memory = r["median"], r["ratio"], r["peak_memory"]
        assert isinstance(medians, dict)
        assert isinstance(ratios, dict)
        assert isinstance(memory, dict)
        cells = [f"{medians[k]:,.4g}" if k in medians else "-" for k in SERVERS]
        to_file = f"{ratios['file']:.2f}" if "file" in ratios else "-"
        cells += [f"{ratios['qemu-nbd']:.2f}", f"{r['goal']}", to_file]
        cells.append(f"{memory['plugin'] / MiB:.0f}")
        lines.append(f"| {name} ({r['unit']}) | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("workloads", nargs="*", help="those whose name begins so; all if none")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, help="write the results there too")
    args = parser.parse_args()
    # An installed package has its bytecode: do not measure servers that compile it anew.
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    wanted = {
        name: w
        for name, w in WORKLOADS.items()
        if not args.workloads or any(name.startswith(x) for x in args.workloads)
    }
    results = {}
    for i, (name, workload) in enumerate(wanted.items(), 1):
        print(f"\r\033[K{i}/{len(wanted)} {name}", end="", file=sys.stderr, flush=True)
        results[name] = measure(workload, args.rounds)
    print("\r\033[K", end="", file=sys.stderr)
    print(table(results))
    seconds = {} if args.workloads else starts(max(5, args.rounds))
    for name, value in seconds.items():
        print(f"start to first byte, {name}: {value * 1000:.0f} ms")
    if args.json:
        kernel = platform.release().split("-")[0]
        machine = f"{os.cpu_count()} cores, {platform.machine()}, Linux {kernel}"
        everything = {
            "date": date.today().isoformat(),
            "machine": machine,
            "rounds": args.rounds,
            "workloads": results,
            "start": seconds,
        }
        args.json.write_text(json.dumps(everything, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
