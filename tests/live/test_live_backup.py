"""``qcow2snap backup`` beside a QEMU that writes, and takes and deletes snapshots meanwhile: what
is in the repository is what the guest had at that moment, and nothing else."""

from __future__ import annotations

import json
import random
import signal
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any

import nbd
import pytest
from support import command, qemu
from support.live import running
from support.qemu import KiB, MiB
from support.running import started, until

from qcow2snap_core.transfer.manifest import NAME

SIZE = 8 * MiB
ROUNDS = 12
KEPT = 3  # snapshots at a time: the others are deleted under the backups that go on


def write(guest: nbd.NBD, content: bytearray, rng: random.Random) -> None:
    for _ in range(12):
        at = rng.randrange(SIZE // (64 * KiB)) * 64 * KiB
        length = rng.randrange(1, 128) * KiB
        data = rng.randbytes(1) * min(length, SIZE - at)
        guest.pwrite(data, at)
        content[at : at + len(data)] = data


@pytest.mark.parametrize("which", ["it", "the one below"])
def test_one_is_deleted_while_it_is_read(tmp_path: Path, which: str) -> None:
    """The backup stands still meanwhile, so that it happens."""
    path, repository = qemu.create(tmp_path / "disk.qcow2", 48 * MiB), tmp_path / "repository"
    for byte in (1, 2, 3):
        qemu.io(path, f"write -P {byte} {byte}M 32M")
        qemu.take(path, f"s{byte}")
    contents = {name: qemu.content(path, name) for name in ("s1", "s2", "s3")}

    def second_is_written() -> bool:
        return len(entries(repository)) == 1 and any(
            part.stat().st_size > MiB for part in repository.glob(".*.part")
        )

    with running(path) as vm, started("backup", path, repository) as process:
        until(second_is_written, process)
        process.send_signal(signal.SIGSTOP)
        assert len(entries(repository)) == 1
        vm.delete("s2" if which == "it" else "s1")
        process.send_signal(signal.SIGCONT)
        _, said = process.communicate(timeout=120)
    assert process.returncode == 0, said
    found = {entry["name"]: entry["parent"] for entry in entries(repository)}
    if which == "it":
        assert said == "qcow2snap: warning: snapshot 's2' was deleted meanwhile: it is left out\n"
        assert found == {"s1": None, "s3": "1.qcow2"}
    else:
        assert said == ""
        assert found == {"s1": None, "s2": None, "s3": "2.qcow2"}
    for entry in entries(repository):
        assert qemu.content(repository / entry["disk"]["file"]) == contents[entry["name"]]
    command.here("verify", repository)


def entries(repository: Path) -> list[dict[str, Any]]:
    with suppress(FileNotFoundError):
        return json.loads((repository / NAME).read_text())["snapshots"]
    return []


def test_what_a_guest_had_is_what_is_kept(tmp_path: Path) -> None:
    path, repository = qemu.create(tmp_path / "disk.qcow2", SIZE), tmp_path / "repository"
    rng = random.Random(5)
    content, taken = bytearray(SIZE), dict[str, bytes]()
    stop = threading.Event()
    said: list[str] = []
    statuses: list[int] = []

    def back_up() -> None:
        while not stop.is_set():
            done = command.run("backup", path, repository)
            said.extend(done.stderr.splitlines())
            statuses.append(done.returncode)

    with running(path) as vm, vm.guest() as guest:
        thread = threading.Thread(target=back_up)
        thread.start()
        try:
            for number in range(ROUNDS):
                write(guest, content, rng)
                name = f"s{number}"
                taken[name] = bytes(content)
                vm.take(name)
                write(guest, content, rng)
                if number >= KEPT:
                    vm.delete(f"s{number - KEPT}")
        finally:
            stop.set()
            thread.join(120)
        command.qcow2snap("backup", path, repository)
    assert not any(statuses), said
    assert all("was deleted meanwhile: it is left out" in line for line in said), said
    command.qcow2snap("verify", repository)
    names = [entry["name"] for entry in entries(repository)]
    assert names[-KEPT:] == [f"s{number}" for number in range(ROUNDS - KEPT, ROUNDS)]
    for entry in entries(repository):
        assert qemu.content(repository / entry["disk"]["file"]) == taken[entry["name"]]
    out = tmp_path / "out.qcow2"
    command.run("restore", repository, out)  # it may say that an ID was given again
    assert list(qemu.snapshots(out)) == names
    for name in names:
        assert qemu.content(out, name) == taken[name]
