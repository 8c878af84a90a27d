"""Histories by seed, as many as wanted.

    make simulation SEEDS=100000 FROM=0
    python3 tests/simulation --seed 17      one of them, with the traceback of what it violates

A line for each seed that violates something; the status is 1 if there is any.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).resolve().parents[n]) for n in (1, 2)]

from simulation.reader import Violation, simulate


def judge(seed: int) -> tuple[int, str | None]:
    try:
        simulate(seed)
    except Violation as e:
        return seed, str(e)
    return seed, None


def main() -> int:
    parser = argparse.ArgumentParser(description="Try the guard against QEMU's writes in any order")
    parser.add_argument("--seeds", type=int, default=20000)
    parser.add_argument("--from", type=int, default=0, dest="first")
    parser.add_argument("--seed", type=int)
    args = parser.parse_args()
    if args.seed is not None:
        simulate(args.seed)
        return 0
    bad = 0
    with multiprocessing.get_context("fork").Pool(os.cpu_count()) as pool:
        seeds = range(args.first, args.first + args.seeds)
        for seed, why in pool.imap_unordered(judge, seeds, chunksize=50):
            if why is not None:
                bad += 1
                print(f"seed {seed}: {why[:200]}", flush=True)
    print(f"{args.seeds} histories, {bad} with a violation")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
