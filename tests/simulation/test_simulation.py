"""No order of reads and writes gives wrong bytes, or hides a snapshot that is there."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from support import qemu

from simulation.left_out import LEFT_OUT
from simulation.reader import LOOKALIKE, SHORT, Violation, simulate, simulate_all
from simulation.writes import CLUSTER, NAMES, SIZE, Qemu, some

SEEDS = 400


@pytest.mark.parametrize("history", SHORT)
def test_every_order_of_a_short_history(history: str) -> None:
    assert simulate_all(*SHORT[history]) > 50


def test_histories_by_chance() -> None:
    for seed in range(SEEDS):
        try:
            simulate(seed)
        except Violation as e:
            raise AssertionError(f"make simulation FROM={seed} SEEDS=1") from e


def look_for_holes() -> None:
    for seed in range(50):  # most show at once
        simulate(seed)
    for history in SHORT.values():
        simulate_all(*history)
    for seed in range(50, 1000):
        simulate(seed)


@pytest.mark.parametrize("part", LEFT_OUT)
def test_each_part_of_the_guard_is_missed(part: str) -> None:
    with LEFT_OUT[part](), pytest.raises(Violation):
        look_for_holes()


@pytest.mark.xfail(raises=Violation, strict=True, reason="docs/live.md, What is not covered")
def test_half_a_header_that_looks_like_that_of_a_deleted_snapshot() -> None:
    simulate_all(*SHORT[LOOKALIKE], lookalikes=True)


@pytest.mark.parametrize("seed", range(12))
def test_what_the_simulated_qemu_writes_is_an_image(tmp_path: Path, seed: int) -> None:
    """QEMU finds nothing wrong with it, and in its snapshots what the simulation does."""
    rng = random.Random(seed)
    simulated = Qemu(rng, discard=bool(seed % 2), first_fit=seed % 3 > 0)
    some(simulated, rng, 20, NAMES, most=4)
    simulated.take("last")  # which completes the entries of the others
    path = tmp_path / "disk.qcow2"
    path.write_bytes(simulated.image())
    qemu.run("qemu-img", "check", path)
    for snapshot in simulated.snapshots:
        right = bytearray(SIZE)
        for cluster, content in snapshot.content.items():
            right[cluster * CLUSTER : (cluster + 1) * CLUSTER] = content
        raw = tmp_path / "raw"
        choice = f"snapshot.id={snapshot.id}"
        qemu.run("qemu-img", "convert", "-l", choice, "-O", "raw", path, raw)
        assert raw.read_bytes() == right, snapshot.identity
