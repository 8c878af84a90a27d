"""Killed or interrupted at any moment, a command leaves its output whole or not at all."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import time
from pathlib import Path

import pytest
from support import command, qemu
from support.qemu import MiB
from support.running import eventually, started, until

SIZE = 24 * MiB
MOMENTS = [
    *range(5),
    *(pytest.param(n, marks=pytest.mark.long) for n in range(5, 20)),
]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """An image, and what an undisturbed run makes of it."""
    directory = tmp_path_factory.mktemp("killed")
    path = qemu.create(directory / "disk.qcow2", SIZE)
    for byte in (1, 2, 3):
        qemu.io(path, f"write -P {byte} {byte}M 16M")
        qemu.take(path, f"s{byte}")
    for name in ("s1", "s2"):
        command.qcow2snap("copy", path, name, directory / name)
        assert (directory / name).read_bytes() == qemu.content(path, name)
    command.qcow2snap("split", path, directory / "chain")
    return {name: directory / name for name in ("disk.qcow2", "s1", "s2", "chain")}


def check_whole(kind: str, made: dict[str, Path], out: Path) -> None:
    """Fails when the output is there and not what it should be."""
    if kind == "update":  # of a file that was there
        assert out.read_bytes() in (made["s1"].read_bytes(), made["s2"].read_bytes())
    elif not out.exists():
        return
    elif kind == "copy":
        assert out.read_bytes() == made["s2"].read_bytes()
    elif kind == "split":
        assert sorted(os.listdir(out)) == sorted(os.listdir(made["chain"]))
        qemu.run("qemu-img", "compare", "-q", out / "active.qcow2", made["disk.qcow2"])
    else:
        assert list(qemu.snapshots(out)) == ["s1", "s2", "s3"]
        qemu.run("qemu-img", "compare", "-q", out, made["disk.qcow2"])


def arguments(kind: str, made: dict[str, Path], out: Path) -> list[object]:
    disk = made["disk.qcow2"]
    if kind == "copy":
        return ["copy", disk, "s2", out]
    if kind == "update":
        shutil.copy2(made["s1"], out)  # with the record of what it holds
        return ["copy", disk, "--since", "s1", "s2", out]
    if kind in ("compact", "split"):
        return [kind, disk, out]
    return ["join", made["chain"] / "active.qcow2", out]


@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("kind", ["copy", "update", "compact", "split", "join"])
def test_killed_at_a_random_moment(
    made: dict[str, Path], tmp_path: Path, kind: str, moment: int
) -> None:
    rng = random.Random(f"{kind}{moment}")
    number = rng.choice([signal.SIGKILL, signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
    out = tmp_path / "out"
    with started(*arguments(kind, made, out)) as process:
        early = moment % 4 == 0  # perhaps before Python has started, which has its own ways to end
        if not early:
            eventually(lambda: process.poll() is not None or parts(tmp_path))
        time.sleep(rng.uniform(0, 0.4))  # the one place where a sleep is what is tested
        process.send_signal(number)
        _, err = process.communicate(timeout=60)
    check_whole(kind, made, out)
    if number != signal.SIGKILL:
        assert parts(tmp_path) == []
        # By the signal itself: when Python is ending, and the work is done.
        assert early or (process.returncode in (0, 128 + number, -number) and not err)


@pytest.mark.parametrize("kind", ["copy", "update", "compact", "split", "join"])
def test_the_next_run_removes_what_a_killed_one_left(
    made: dict[str, Path], tmp_path: Path, kind: str
) -> None:
    line = arguments(kind, made, tmp_path / "out")
    with started(*line) as process:
        until(lambda: parts(tmp_path), process)
        process.kill()
        process.wait(60)
    assert parts(tmp_path)
    others = [".qcow2snap-01234567-0123456789abcdef.part", f"{parts(tmp_path)[0]}.part"]
    for name in others:
        (tmp_path / name).touch()
    command.qcow2snap(*line)
    assert sorted(parts(tmp_path)) == sorted(others)
    assert (tmp_path / "out").exists()
    check_whole(kind, made, tmp_path / "out")


@pytest.mark.parametrize("moment", MOMENTS)
def test_an_update_in_place_is_completed_by_repeating_it(
    made: dict[str, Path], tmp_path: Path, moment: int
) -> None:
    """It never says that it holds what it does not, and needs no --trust-base."""
    rng = random.Random(moment)
    out = tmp_path / "out"
    shutil.copy2(made["s1"], out)
    line = ["copy", made["disk.qcow2"], "--in-place", "--since", "s1", "s2", out]
    with started(*line) as process:
        began = made["s1"].stat().st_mtime_ns
        eventually(lambda: process.poll() is not None or out.stat().st_mtime_ns != began)
        time.sleep(rng.uniform(0, 0.1))  # the one place where a sleep is what is tested
        process.send_signal(rng.choice([signal.SIGKILL, signal.SIGINT, signal.SIGTERM]))
        process.communicate(timeout=60)
    record = json.loads(os.getxattr(out, "user.qcow2snap.copy"))
    if record["state"] == "between":
        line_back = ["copy", made["disk.qcow2"], "--in-place", "--since", "s2", "s1", out]
        assert "an update was interrupted" in command.fails(*line_back)
        command.qcow2snap(*line)
        record = json.loads(os.getxattr(out, "user.qcow2snap.copy"))
    assert record["state"] == "whole"
    assert out.read_bytes() == made[record["holds"]["name"]].read_bytes()


def test_what_a_running_one_writes_is_left_alone(made: dict[str, Path], tmp_path: Path) -> None:
    with started("copy", made["disk.qcow2"], "s1", tmp_path / "one") as process:
        until(lambda: parts(tmp_path), process)
        process.send_signal(signal.SIGSTOP)
        command.qcow2snap("copy", made["disk.qcow2"], "s2", tmp_path / "two")
        process.send_signal(signal.SIGCONT)
        assert process.wait(60) == 0
    assert (tmp_path / "one").read_bytes() == made["s1"].read_bytes()


def parts(directory: Path) -> list[str]:
    """The temporary names that are there."""
    return [name for name in os.listdir(directory) if name.endswith(".part")]


@pytest.mark.parametrize("kind", ["copy", "split"])
def test_a_signal_that_comes_twice_at_once_is_one(
    made: dict[str, Path], tmp_path: Path, kind: str
) -> None:
    """timeout(1) sends its child one, and then its whole group."""
    out = tmp_path / "out"
    with started(*arguments(kind, made, out)) as process:
        eventually(lambda: process.poll() is not None or parts(tmp_path))
        for _ in range(20):  # while it comes to an end
            process.send_signal(signal.SIGTERM)
            time.sleep(0.002)
        _, err = process.communicate(timeout=60)
    assert parts(tmp_path) == []
    assert process.returncode in (0, 143, -15)  # the last: when Python is ending
    assert not err
    check_whole(kind, made, out)
