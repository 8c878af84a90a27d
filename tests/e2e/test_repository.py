"""``qcow2snap backup``, ``restore`` and ``verify``: what QEMU reads of a repository, and of what is
made of it again, is what it reads of the image."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support import command, damage, qemu, secret
from support.qemu import KiB, MiB
from support.running import eventually, started, until
from support.server import ROOT
from support.vm import machine

import qcow2snap_core
from qcow2snap_core.image import guard
from qcow2snap_core.transfer import backup as backups
from qcow2snap_core.transfer.manifest import NAME
from qcow2snap_core.transfer.newimage import NewImage

SIZE = 4 * MiB
FORMATS: dict[str, dict[str, object]] = {
    "512": {"cluster_size": 512},
    "version 2": {"compat": "0.10"},
    "extended L2": {"extended_l2": "on"},
    "zstd": {"compression_type": "zstd"},
    "a disk that ends inside a cluster": {"cluster_size": 64 * KiB},
}


def entries(repository: Path) -> list[dict[str, Any]]:
    return json.loads((repository / NAME).read_text())["snapshots"]


def read_by_qemu(repository: Path, file: str) -> bytes:
    """What the manual page shows."""
    out = repository.parent / "by-qemu.raw"
    qemu.run("qemu-img", "convert", repository / file, out)
    try:
        return out.read_bytes()
    finally:
        out.unlink()


def assert_holds(repository: Path, path: Path, names: list[str] | None = None) -> None:
    """QEMU reads the snapshots of the image in the repository's files."""
    held = {e["name"]: e["disk"]["file"] for e in entries(repository)}
    for name in qemu.snapshots(path) if names is None else names:
        qemu.run("qemu-img", "check", "-q", repository / held[name])
        assert read_by_qemu(repository, held[name]) == qemu.snapshot_content(path, name)
    command.here("verify", repository)


def assert_restored(out: Path, path: Path) -> None:
    """The snapshots are what they are in the image, and the last one is the active disk."""
    qemu.assert_same_snapshots(out, path)
    assert qemu.content(out) == qemu.snapshot_content(out, list(qemu.snapshots(out))[-1])
    command.here("check", out)


HOW: list[tuple[str, list[str]]] = [
    *((kind, []) for kind in FORMATS),
    ("version 2", ["--compress", "zstd"]),
    ("extended L2", ["--compress", "zlib"]),
]


@pytest.mark.parametrize(("kind", "compress"), HOW)
def test_there_and_back(tmp_path: Path, kind: str, compress: list[str]) -> None:
    path, repository = tmp_path / "disk.qcow2", tmp_path / "repository"
    size = SIZE - 5 * 512 if "ends" in kind else SIZE
    packed = kind not in ("extended L2", "a disk that ends inside a cluster")
    image = qemu.RandomImage(path, 21, size, options=FORMATS[kind], compressed=packed)
    image.make(["one", "two"])
    command.here("backup", *compress, path, repository)
    rng = random.Random(3)
    for name in ("three", "four"):
        for i in range(3):
            (tmp_path / f"disk.qcow2.noise{i}").write_bytes(rng.randbytes(5000).hex().encode())
        image.play(rng, 8)
        qemu.take(path, name)
        command.here("backup", *compress, path, repository)
    assert [e["parent"] for e in entries(repository)] == [None, "1.qcow2", "2.qcow2", "3.qcow2"]
    assert_holds(repository, path)
    out = tmp_path / "out.qcow2"
    command.here("restore", repository, out)
    assert_restored(out, path)
    raw = tmp_path / "out.raw"
    command.here("restore", "--snapshot", "two", repository, raw)
    assert raw.read_bytes() == qemu.snapshot_content(path, "two")


def test_only_what_changed_is_stored_and_nothing_twice(tmp_path: Path) -> None:
    path, repository = qemu.create(tmp_path / "disk.qcow2", 64 * MiB), tmp_path / "repository"
    qemu.io(path, "write -P 1 0 16M")
    qemu.take(path, "one")
    assert command.here("backup", path, repository) == "1.qcow2: one, 16.3 MiB, whole\n"
    qemu.io(path, "write -P 2 1M 64k", "write -z -u 2M 8M")
    qemu.take(path, "two")
    said = command.here("backup", path, repository)
    assert said.startswith("2.qcow2: two, ")
    assert said.endswith(", since 1.qcow2\n")
    assert (repository / "2.qcow2").stat().st_size < MiB, "zeros take no space"
    before = sorted((f.name, f.stat().st_mtime_ns) for f in repository.iterdir())
    assert command.here("backup", path, repository) == "nothing new\n"
    assert sorted((f.name, f.stat().st_mtime_ns) for f in repository.iterdir()) == before
    assert_holds(repository, path)


def test_compressed_clusters_stay_as_they_are(tmp_path: Path) -> None:
    path, repository = qemu.create(tmp_path / "disk.qcow2", 16 * MiB), tmp_path / "repository"
    qemu.io(path, "write -c -P 1 0 8M")
    qemu.take(path, "one")
    command.here("backup", path, repository)
    assert (repository / "1.qcow2").stat().st_size < MiB
    out = tmp_path / "out.qcow2"
    command.here("restore", repository, out)
    assert out.stat().st_size < MiB
    assert_restored(out, path)


def test_a_backing_file_s_content_is_in_the_repository(tmp_path: Path) -> None:
    base = tmp_path / "base.img"
    qemu.RandomImage(base, 3, SIZE - 64 * KiB).make([])
    path = tmp_path / "disk.qcow2"
    qemu.RandomImage(path, 4, SIZE, backing=(base.name, "qcow2")).make()
    command.here("backup", path, tmp_path / "repository")
    expected = [qemu.content(path, name) for name in ("one", "two", "three")]
    base.unlink()
    for number, content in enumerate(expected, 1):
        assert read_by_qemu(tmp_path / "repository", f"{number}.qcow2") == content


def test_a_backing_file_that_was_changed_is_noticed(tmp_path: Path) -> None:
    """Which changes what the tables do not say, in every snapshot."""
    base = qemu.create(tmp_path / "base.qcow2", MiB)
    qemu.io(base, "write -P 1 0 1M")
    path, repository = tmp_path / "disk.qcow2", tmp_path / "repository"
    qemu.create(path, None, backing=(base.name, "qcow2"))
    qemu.io(path, "write -P 2 0 64k")
    qemu.take(path, "one")
    command.here("backup", path, repository)
    before = read_by_qemu(repository, "1.qcow2")
    os.utime(base)  # its content is the same
    assert command.here("backup", path, repository) == "nothing new\n"
    qemu.io(base, "write -P 3 512k 64k")
    qemu.take(path, "two")
    said = command.here("backup", path, repository).splitlines()
    assert [line.split(",")[2] for line in said] == [" whole", " since 2.qcow2"]
    assert read_by_qemu(repository, "1.qcow2") == before
    for file, name in {"2.qcow2": "one", "3.qcow2": "two"}.items():
        assert read_by_qemu(repository, file) == qemu.content(path, name)


def test_zeros_take_no_more_than_tables(tmp_path: Path) -> None:
    path, repository = qemu.create(tmp_path / "disk.qcow2", "8G"), tmp_path / "repository"
    qemu.io(path, "write -P 1 1G 64k")
    qemu.take(path, "one")
    qemu.io(path, *(f"write -z {n}G 1G" for n in range(8)))
    qemu.take(path, "two")
    command.here("backup", path, repository)
    assert (repository / "2.qcow2").stat().st_size < 2 * MiB
    qemu.run("qemu-img", "check", "-q", repository / "2.qcow2")
    qemu.run("qemu-img", "compare", "-q", repository / "2.qcow2", path)
    command.here("restore", repository, tmp_path / "out.qcow2")
    qemu.run("qemu-img", "compare", "-q", tmp_path / "out.qcow2", path)
    assert (tmp_path / "out.qcow2").stat().st_size < MiB


def test_a_disk_that_was_larger_before_and_after(tmp_path: Path) -> None:
    path, repository = qemu.create(tmp_path / "disk.qcow2", MiB), tmp_path / "repository"
    qemu.io(path, "write -P 7 0 1M")
    qemu.take(path, "large")
    qemu.run("qemu-img", "resize", "-q", "--shrink", "-f", "qcow2", path, 512 * KiB + 512)
    qemu.take(path, "small")
    qemu.run("qemu-img", "resize", "-q", "-f", "qcow2", path, "2M")
    qemu.take(path, "larger")
    qemu.io(path, "write -P 8 1M 512")
    qemu.take(path, "last")
    command.here("backup", path, repository)
    assert_holds(repository, path)
    command.here("restore", repository, tmp_path / "out.qcow2")
    assert_restored(tmp_path / "out.qcow2", path)


def test_a_saved_machine_goes_on_from_what_was_restored(tmp_path: Path) -> None:
    path, repository = qemu.create(tmp_path / "disk.qcow2", 3 * MiB), tmp_path / "repository"
    qemu.io(path, "write -P 5 0 1M")
    with machine(path) as vm:
        vm.run_a_little()
        vm.save("live")
        saved, memory = vm.registers(), vm.memory(tmp_path)
    qemu.take(path, "after")
    command.here("backup", path, repository)
    [live, after] = entries(repository)
    assert live["vm-state"]["size"] == live["vm-state-size"] > 0
    assert after["vm-state"] is None
    out, state = tmp_path / "out.qcow2", tmp_path / "state"
    command.here("restore", repository, out)
    assert_restored(out, path)
    with machine(out, "-loadvm", "live") as vm:
        assert vm.registers() == saved
        assert vm.memory(tmp_path) == memory
    command.here("copy", path, "live/vmstate", state)
    assert (repository / "1.vmstate").read_bytes() == state.read_bytes()


def test_odd_names_and_dates_are_kept(tmp_path: Path) -> None:
    path, repository = qemu.create(tmp_path / "disk.qcow2", MiB), tmp_path / "repository"
    for name in "abcdef":
        qemu.take(path, name)
    qemu.patch(path, qemu.snapshots(path)["a"].entry_offset + 16, (10**9).to_bytes(4, "big"))
    names = (b"\xff\n\x1b[31m", b"", b"same", b"same", "ü".encode() * 100, b"../../etc/passwd")
    damage.rename(path, dict(zip("abcdef", names, strict=True)))
    command.here("backup", path, repository)
    assert sorted(os.listdir(repository)) == [*(f"{n}.qcow2" for n in range(1, 7)), NAME]
    out = tmp_path / "out.qcow2"
    command.here("restore", repository, out)
    there, again = (json.loads(command.here("list", "--json", p)) for p in (path, out))
    for one in (*there, *again):  # where the tables lie is another matter
        for key in [key for key in one if key.startswith("exclusive")]:
            del one[key]
    assert again == there
    assert again[0]["date-sec"] == 10**9
    raw = tmp_path / "raw"
    command.here("restore", "--snapshot", "same", repository, raw)
    assert raw.stat().st_size == MiB


# --- What comes and goes ---


def test_what_is_deleted_in_the_image_stays_and_the_newest_of_a_name_counts(tmp_path: Path) -> None:
    path, repository = qemu.create(tmp_path / "disk.qcow2", MiB), tmp_path / "repository"
    for byte in (1, 2, 3):
        qemu.io(path, f"write -P {byte} 0 64k")
        if byte > 1:
            qemu.delete(path, "nightly")
        qemu.take(path, "nightly")
        command.here("backup", path, repository)
    assert [(e["id"], e["parent"]) for e in entries(repository)] == [("1", None)] * 3
    for chosen, byte in {"nightly": 3, "1": 3, "2.qcow2": 2, "1.qcow2": 1}.items():
        raw = tmp_path / f"{chosen}.raw"
        command.here("restore", "--snapshot", chosen, repository, raw)
        assert raw.read_bytes() == bytes([byte]) * 64 * KiB + bytes(MiB - 64 * KiB)
    out = tmp_path / "out.qcow2"
    done = command.run("restore", repository, out)
    assert done.returncode == 0
    assert done.stderr.count("since a newer one has its own") == 2
    found = qemu.info(out)["snapshots"]
    assert [(s["id"], s["name"]) for s in found] == [(i, "nightly") for i in ("3", "2", "1")]
    for id_, byte in {"3": 1, "2": 2, "1": 3}.items():
        assert qemu.content(out, id_, by="id")[:512] == bytes([byte]) * 512


def test_an_image_that_was_restored_goes_on_with_its_repository(tmp_path: Path) -> None:
    path, repository = tmp_path / "disk.qcow2", tmp_path / "repository"
    qemu.RandomImage(path, 8, SIZE).make()
    command.here("backup", path, repository)
    out = tmp_path / "out.qcow2"
    command.here("restore", repository, out)
    assert command.here("backup", out, repository) == "nothing new\n"
    qemu.io(out, "write -P 9 1M 64k")
    qemu.take(out, "new")
    assert command.here("backup", out, repository).endswith(", since 3.qcow2\n")
    assert_holds(repository, out)
    assert command.here("backup", out, repository) == "nothing new\n"


def test_what_only_looks_like_a_known_snapshot_is_another(tmp_path: Path) -> None:
    path, repository = qemu.create(tmp_path / "disk.qcow2", MiB), tmp_path / "repository"
    qemu.io(path, "write -P 1 0 64k", "write -P 1 512k 64k")
    qemu.take(path, "s")
    command.here("backup", path, repository)
    qemu.patch(
        path, qemu.field64(path, damage.l2_entry(path, "s", 512 * KiB)) & damage.OFFSET, b"x"
    )
    shutil.copy(path, tmp_path / "other.qcow2")
    command.here("compact", path, tmp_path / "small.qcow2")
    said = command.here("backup", tmp_path / "small.qcow2", repository)
    assert said.startswith("2.qcow2: s, ")
    assert said.endswith("whole\n")
    assert read_by_qemu(repository, "2.qcow2") == qemu.content(path, "s")


def test_a_chain_ends_before_it_is_too_deep(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backups, "DEEPEST", 2)
    path, repository = qemu.create(tmp_path / "disk.qcow2", MiB), tmp_path / "repository"
    for byte in range(1, 6):
        qemu.io(path, f"write -P {byte} {byte * 64}k 64k")
        qemu.take(path, f"s{byte}")
    command.here("backup", path, repository)
    parents = [e["parent"] for e in entries(repository)]
    assert parents == [None, "1.qcow2", None, "3.qcow2", None]
    assert_holds(repository, path)
    command.here("restore", repository, tmp_path / "out.qcow2")
    assert_restored(tmp_path / "out.qcow2", path)


def test_more_files_than_a_program_may_have_open(tmp_path: Path) -> None:
    path, repository = qemu.create(tmp_path / "disk.qcow2", MiB), tmp_path / "repository"
    for number in range(30):
        qemu.take(path, f"s{number}")
    command.here("backup", path, repository)
    line = [sys.executable, "-m", "qcow2snap_core", "restore", repository, tmp_path / "out.qcow2"]
    qemu.run("prlimit", "--nofile=24:1024", *line, cwd=ROOT)
    assert qemu.info(tmp_path / "out.qcow2")["snapshots"] == qemu.info(path)["snapshots"]


def test_nothing_is_laid_on_a_file_that_was_lost(tmp_path: Path) -> None:
    path, repository = qemu.create(tmp_path / "disk.qcow2", MiB), tmp_path / "repository"
    for byte in (1, 2, 3, 4):
        qemu.io(path, f"write -P {byte} {byte * 64}k 64k")
        qemu.take(path, f"s{byte}")
        if byte == 4:
            (repository / "2.qcow2").unlink()
            qemu.delete(path, "s2")
            qemu.delete(path, "s3")
        done = command.run("backup", path, repository)
        assert done.returncode == 0, done.stderr
    assert "2 snapshots in" in done.stderr
    assert "cannot be restored: verify says why" in done.stderr
    assert [e["parent"] for e in entries(repository)] == [None, "1.qcow2", "2.qcow2", "1.qcow2"]
    assert read_by_qemu(repository, "4.qcow2") == qemu.content(path, "s4")


@pytest.mark.parametrize(
    ("lost", "deleted", "again", "parents"),
    {
        "one file": (["2.qcow2"], [], [2], [None, 1, 2, 3]),
        "the base": (["1.qcow2"], [], [1], [None, 1, 2, 3]),
        "all": (["1.qcow2", "2.qcow2", "3.qcow2", "4.qcow2"], [], [1, 2, 3, 4], [None, 1, 2, 3]),
        "a VM state": (["2.vmstate"], [], [2], [None, 1, 2, 3]),
        "one that the image lost as well": (["2.qcow2"], ["s2"], [3], [None, 1, 1, 3]),
        "and its base": (["1.qcow2"], ["s1", "s2"], [3], [None, 1, None, 3]),
    }.values(),
)
def test_what_was_lost_is_written_again(
    tmp_path: Path, lost: list[str], deleted: list[str], again: list[int], parents: list[int | None]
) -> None:
    """What lies on it is as it was, and the next snapshot lies on that."""
    path, repository = qemu.create(tmp_path / "disk.qcow2", MiB), tmp_path / "repository"
    for byte in (1, 2, 3, 4):
        qemu.io(path, f"write -P {byte} {byte * 64}k 64k", f"write -P {byte} 512k 64k")
        if byte == 2:
            with machine(path) as vm:
                vm.save("s2")
        else:
            qemu.take(path, f"s{byte}")
    command.here("backup", path, repository)
    right = {e["name"]: read_by_qemu(repository, e["disk"]["file"]) for e in entries(repository)}
    for number, file in enumerate(lost):
        (repository / file).write_bytes(b"half") if number else (repository / file).unlink()
    for name in deleted:
        qemu.delete(path, name)
    done = command.run("backup", path, repository)
    assert done.returncode == 0, done.stderr
    assert [line.split(":")[0] for line in done.stdout.splitlines()] == [
        f"{number}.qcow2" for number in again
    ]
    assert done.stderr.count("it was written again") == len(again)
    assert ("cannot be restored: verify" in done.stderr) == bool(deleted)
    found = entries(repository)
    assert [e["parent"] for e in found] == [p and f"{p}.qcow2" for p in parents]
    for e in found:
        if e["name"] not in deleted:
            assert read_by_qemu(repository, e["disk"]["file"]) == right[e["name"]]
    assert command.run("verify", repository).returncode == (3 if deleted else 0)
    if not deleted:
        assert command.run("backup", path, repository).stdout == "nothing new\n"
        command.here("restore", repository, tmp_path / "out.qcow2")
        assert_restored(tmp_path / "out.qcow2", path)


def test_what_is_there_is_known_without_parsing_the_table_for_each(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else thousands of snapshots of which none is new take minutes."""
    path, repository = qemu.create(tmp_path / "disk.qcow2", MiB), tmp_path / "repository"
    for number in range(12):
        qemu.take(path, f"s{number}")
    command.here("backup", path, repository)
    parsed = []
    read = guard.read_table_once

    def counted(*arguments: Any) -> Any:
        parsed.append(arguments)
        return read(*arguments)

    monkeypatch.setattr(guard, "read_table_once", counted)
    with qcow2snap_core.open(path) as image:
        assert qcow2snap_core.backup(image, repository) == []
    assert len(parsed) == 1


def test_an_encrypted_image_becomes_plain_and_that_is_said(tmp_path: Path) -> None:
    path, repository = tmp_path / "disk.qcow2", tmp_path / "repository"
    secret.create(path, SIZE, ["pass"], **{"encrypt.format": "luks"})
    secret.play(path, ["pass"], 1, SIZE)
    secret.take(path, ["pass"], "one")
    done = command.run("backup", path, repository, "--passphrase", "pass")
    assert done.returncode == 0
    assert "is encrypted, the result is not" in done.stderr
    assert read_by_qemu(repository, "1.qcow2") == secret.content(path, ["pass"], "one")


def test_a_damaged_snapshot_does_not_keep_the_others_out(tmp_path: Path) -> None:
    path, repository = qemu.create(tmp_path / "disk.qcow2", MiB), tmp_path / "repository"
    for byte, name in enumerate(("one", "bad", "two"), 1):
        qemu.io(path, f"write -P {byte} 0 1M")
        qemu.take(path, name)
    damage.put64(path, damage.l2_entry(path, "bad", 0), damage.END_OF_FILE)
    said = command.fails_here("backup", path, repository)
    assert "lies past the end of the file" in said
    assert "all that can be read is in the repository" in said
    assert [e["name"] for e in entries(repository)] == ["one", "two"]
    assert_holds(repository, path, ["one", "two"])


# --- Looking at it ---


def test_it_is_listed(tmp_path: Path) -> None:
    path, repository = qemu.create(tmp_path / "disk.qcow2", MiB), tmp_path / "repository"
    qemu.take(path, "one")
    qemu.io(path, "write -P 1 0 64k")
    qemu.take(path, "two")
    added = json.loads(command.here("backup", "--json", path, repository))
    assert json.loads(command.here("list", "--json", repository)) == added == entries(repository)
    said = qemu.info(path)["snapshots"]
    keys = ("id", "name", "vm-state-size", "date-sec", "date-nsec", "vm-clock-sec", "vm-clock-nsec")
    assert [{k: e[k] for k in keys} for e in added] == [{k: s[k] for k in keys} for s in said]
    lines = command.here("list", repository).splitlines()
    assert [line.split()[:3] for line in lines[1:]] == [
        ["1.qcow2", "1", "one"],
        ["2.qcow2", "2", "two"],
    ]
    verdicts = json.loads(command.here("verify", "--json", repository))
    assert verdicts == [{**e, "problem": None} for e in added]
    assert "all is as it was written" in command.here("verify", repository)


# --- Interrupted, and at the same time ---


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = qemu.create(tmp_path_factory.mktemp("large") / "disk.qcow2", 24 * MiB)
    for byte in (1, 2, 3):
        qemu.io(path, f"write -P {byte} {byte}M 16M")
        qemu.take(path, f"s{byte}")
    return path


@pytest.mark.parametrize("moment", range(6))
def test_killed_at_a_random_moment_it_goes_on_where_it_was(
    large: Path, tmp_path: Path, moment: int
) -> None:
    rng = random.Random(moment)
    number = rng.choice([signal.SIGKILL, signal.SIGKILL, signal.SIGTERM])
    repository = tmp_path / "repository"
    with started("backup", large, repository) as process:
        eventually(lambda: process.poll() is not None or repository.exists())
        time.sleep(rng.uniform(0, 0.5))  # the one place where a sleep is what is tested
        process.send_signal(number)
        process.communicate(timeout=60)
    before: list[dict[str, Any]] = []
    if (repository / NAME).exists():
        before = entries(repository)
    if before:
        command.here("verify", repository)
    command.here("backup", large, repository)
    assert entries(repository)[: len(before)] == before
    assert [e["name"] for e in entries(repository)] == ["s1", "s2", "s3"]
    assert sorted(os.listdir(repository)) == ["1.qcow2", "2.qcow2", "3.qcow2", NAME]
    command.here("verify", repository)
    qemu.run("qemu-img", "compare", "-q", repository / "3.qcow2", large)


def test_a_file_that_the_manifest_does_not_name_is_replaced(large: Path, tmp_path: Path) -> None:
    repository = tmp_path / "repository"
    command.here("backup", large, repository)
    known = json.loads((repository / NAME).read_text())
    known["snapshots"].pop()  # as if it had been killed before the manifest
    (repository / NAME).write_text(json.dumps(known))
    (repository / "3.qcow2").write_bytes(b"half of it")
    assert command.here("backup", large, repository).startswith("3.qcow2: s3")
    command.here("verify", repository)
    qemu.run("qemu-img", "compare", "-q", repository / "3.qcow2", large)


def test_two_backups_do_not_meet(large: Path, tmp_path: Path) -> None:
    repository = tmp_path / "repository"
    with started("backup", large, repository) as process:
        until(lambda: (repository / NAME).exists(), process)
        process.send_signal(signal.SIGSTOP)
        assert "is being written by another command" in command.fails_here(
            "backup", large, repository
        )
        process.send_signal(signal.SIGCONT)
        assert process.wait(60) == 0
    command.here("verify", repository)


# --- What is written wrong, or was damaged ---


def a_byte_of_data(data: bytearray) -> None:
    if data[:1] == b"\7":
        data[-1] ^= 1


def a_refcount(data: bytearray) -> None:
    if data[:4] in (b"\0\1\0\1", b"\0\1\0\2"):  # of the header, and of what comes after it
        data[3] -= 1


@pytest.mark.parametrize("kind", ["backup", "restore"])
@pytest.mark.parametrize("spoil", [a_byte_of_data, a_refcount])
def test_what_was_written_wrong_does_not_count(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    spoil: Callable[[bytearray], None],
    kind: str,
) -> None:
    """A disk that changes a byte of what it is given."""
    path, repository = qemu.create(tmp_path / "disk.qcow2", MiB), tmp_path / "repository"
    qemu.io(path, "write -P 7 0 64k")
    qemu.take(path, "s")
    line = ["backup", path, repository]
    if kind == "restore":
        command.here(*line)
        line = ["restore", repository, tmp_path / "out.qcow2"]
    before = sorted(os.listdir(tmp_path))
    real = NewImage.write

    def write(self: NewImage, data: bytes, offset: int) -> None:
        changed = bytearray(data)
        spoil(changed)
        real(self, changed, offset)

    monkeypatch.setattr(NewImage, "write", write)
    said = command.fails_here(*line)
    assert "differs from its source" in said or "was written wrong" in said
    if kind == "backup":
        assert entries(repository) == []
        assert os.listdir(repository) == [NAME]
    else:
        assert sorted(os.listdir(tmp_path)) == before


def test_a_flipped_byte_is_found_wherever_it_is(tmp_path: Path) -> None:
    path, repository = qemu.create(tmp_path / "disk.qcow2", MiB), tmp_path / "repository"
    for name in ("one", "two", "three"):
        qemu.io(path, f"write -P {len(name)} 0 128k")
        qemu.take(path, name)
    command.here("backup", path, repository)
    file = repository / "2.qcow2"
    whole = file.read_bytes()
    rng = random.Random(1)
    for at in [0, len(whole) - 1, *(rng.randrange(len(whole)) for _ in range(3))]:
        qemu.patch(file, at, bytes([whole[at] ^ 1 << rng.randrange(8)]))
        lines = command.here("verify", repository, status=3).splitlines()
        assert [line.split(":")[0] for line in lines] == ["2.qcow2 two", "3.qcow2 three"]
        assert "is damaged: its SHA-256 is another one" in lines[0]
        assert "lies on 2.qcow2" in lines[1]
        qemu.patch(file, at, whole[at : at + 1])
    command.here("verify", repository)
    os.truncate(file, len(whole) - 512)
    said = command.fails_here("restore", repository, tmp_path / "out")
    assert "bytes and not" in said
    assert said.endswith(
        ": --snapshot NAME restores one that does not need it, --skip-damaged all of these"
    )
    assert "bytes and not" in command.fails_here(
        "restore", "--snapshot", "three", repository, tmp_path / "out"
    )
    command.here("restore", "--snapshot", "one", repository, tmp_path / "out")
    assert (tmp_path / "out").read_bytes() == qemu.content(path, "one")
    file.unlink()
    found = json.loads(command.here("verify", "--json", repository, status=3))
    assert [bool(each["problem"]) for each in found] == [False, True, True]


@pytest.mark.parametrize(("lost", "left"), [(2, ["one", "four"]), (4, ["one", "two", "three"])])
def test_what_is_damaged_can_be_left_out(tmp_path: Path, lost: int, left: list[str]) -> None:
    path, repository = qemu.create(tmp_path / "disk.qcow2", MiB), tmp_path / "repository"
    for byte, name in enumerate(("one", "two", "three"), 1):
        qemu.io(path, f"write -P {byte} {byte * 256 - 256}k 256k")
        qemu.take(path, name)
    command.here("backup", path, repository)
    qemu.run("qemu-img", "snapshot", "-a", "one", path)
    qemu.io(path, "write -P 4 0 64k")
    qemu.take(path, "four")
    whole = shutil.copy(path, tmp_path / "whole.qcow2")
    for name in ("two", "three"):  # so that it is laid on the first one
        qemu.run("qemu-img", "snapshot", "-d", name, path)
    assert command.run("backup", path, repository).returncode == 0
    parents = [entry["parent"] for entry in entries(repository)]
    assert parents == [None, "1.qcow2", "2.qcow2", "1.qcow2"]
    file, out = repository / f"{lost}.qcow2", tmp_path / "out.qcow2"
    qemu.patch(file, 100_000, bytes([qemu.peek(file, 100_000, 1)[0] ^ 1]))
    done = command.run("restore", "--skip-damaged", repository, out)
    assert (done.returncode, done.stdout) == (3, f"{out}: {', '.join(left)}\n")
    said = done.stderr.splitlines()
    assert len(said) == 4 - len(left)
    assert f"is left out: '{file}' is damaged: its SHA-256 is another one" in said[0]
    assert all(" is left out: " in line for line in said)
    qemu.run("qemu-img", "check", "-q", out)
    found = {s["name"]: s for s in qemu.info(out)["snapshots"]}
    assert list(found) == left
    assert found == {s["name"]: s for s in qemu.info(whole)["snapshots"] if s["name"] in left}
    for name in left:
        assert qemu.content(out, name) == qemu.content(whole, name)
    assert qemu.content(out) == qemu.content(whole, left[-1])


def test_with_nothing_left_there_is_no_image(good: Path, tmp_path: Path) -> None:
    repository = tmp_path / "repository"
    shutil.copytree(good, repository)
    command.here("restore", "--skip-damaged", repository, tmp_path / "whole.qcow2")
    (repository / "1.qcow2").unlink()
    skipping = ("restore", "--skip-damaged", repository, tmp_path / "out")
    done = command.run(*skipping)
    assert done.returncode == 1
    assert done.stderr.endswith(f"'{repository}' has no snapshot that can be restored\n")
    assert not (tmp_path / "out").exists()
    assert "goes without --snapshot" in command.here(*skipping, "--snapshot", "one", status=2)


# --- Hostile ones ---


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With two snapshots, of which one has a VM state that another program has made."""
    here = tmp_path_factory.mktemp("good")
    path = qemu.create(here / "disk.qcow2", MiB)
    qemu.io(path, "write -P 1 0 64k")
    qemu.take(path, "one")
    qemu.io(path, "write -P 2 0 64k")
    qemu.take(path, "two")
    command.here("backup", path, here / "repository")
    return here / "repository"


def other_files(one: dict[str, Any], two: dict[str, Any]) -> None:
    one["disk"], two["disk"] = two["disk"], one["disk"]
    two["parent"] = one["disk"]["file"]


# What a manifest can say and be wrong, beside what tests/transfer/test_manifest.py has.
LIES: dict[str, tuple[Callable[[dict[str, Any], dict[str, Any]], object], str]] = {
    "another parent": (lambda one, two: two.update(parent=None), "is another image than"),
    "other files": (other_files, "is another image than"),
    "another disk size": (lambda one, two: one.update({"disk-size": 512}), "is another image than"),
    "another checksum": (lambda one, two: one["disk"].update(sha256="0" * 64), "is damaged"),
    "another size": (lambda one, two: one["disk"].update(size=1 << 40), "bytes and not"),
    "a file elsewhere": (lambda one, two: one["disk"].update(file="../x"), "a file's name is none"),
    "a file that is missing": (lambda one, two: two["disk"].update(file="9"), "cannot open"),
}


@pytest.mark.parametrize("what", LIES)
def test_a_manifest_is_not_believed(good: Path, tmp_path: Path, what: str) -> None:
    lie, expected = LIES[what]
    repository = tmp_path / "repository"
    shutil.copytree(good, repository)
    manifest = json.loads((repository / NAME).read_text())
    lie(*manifest["snapshots"])
    (repository / NAME).write_text(json.dumps(manifest))
    for line in (["restore"], ["restore", "--snapshot", "two"]):
        assert expected in command.fails_here(*line, repository, tmp_path / "out")
    assert expected in command.here("verify", repository, status=1 if "elsewhere" in what else 3)
    assert sorted(os.listdir(tmp_path)) == ["repository"]


def test_no_id_is_given_twice(good: Path, tmp_path: Path) -> None:
    """Where the next free number is the ID of 20 digits that another has."""
    repository = tmp_path / "repository"
    shutil.copytree(good, repository)
    manifest = json.loads((repository / NAME).read_text())
    one, two = manifest["snapshots"]
    one["id"] = two["id"] = "9" * 19
    third = two | {"id": str(10**19), "name": "three", "disk": two["disk"] | {"file": "3.qcow2"}}
    manifest["snapshots"].append(third)
    shutil.copy(repository / two["disk"]["file"], repository / "3.qcow2")
    (repository / NAME).write_text(json.dumps(manifest))
    done = command.run("restore", repository, tmp_path / "again.qcow2")
    assert done.returncode == 0
    assert "gets the ID 10000000000000000001, since a newer one has its own" in done.stderr
    ids = [s["id"] for s in qemu.info(tmp_path / "again.qcow2")["snapshots"]]
    assert ids == [str(10**19 + 1), "9" * 19, str(10**19)]


@pytest.mark.parametrize("length", [0, 100])
def test_of_a_manifest_that_was_cut_off_it_is_said_what_is_left(
    good: Path, tmp_path: Path, length: int
) -> None:
    repository = tmp_path / "repository"
    shutil.copytree(good, repository)
    os.truncate(repository / NAME, length)
    for line in (["restore"], ["restore", "--snapshot", "two"], ["backup"]):
        arguments = [repository, tmp_path / "out"]
        if line == ["backup"]:
            arguments = [good.parent / "disk.qcow2", repository]
        assert command.fails_here(*line, *arguments) == (
            f"qcow2snap: '{repository / NAME}' cannot be believed: it is no JSON, or only a part "
            f"of it; qemu-img reads the qcow2 files beside it as they are"
        )


@pytest.mark.parametrize("name", ["1.qcow2", NAME])
@pytest.mark.parametrize("kind", ["symlink", "FIFO"])
def test_what_is_no_file_in_it_is_not_opened(
    good: Path, tmp_path: Path, kind: str, name: str
) -> None:
    repository = tmp_path / "repository"
    shutil.copytree(good, repository)
    if kind == "symlink":
        (repository / name).rename(tmp_path / "elsewhere")
        (repository / name).symlink_to(tmp_path / "elsewhere")
    else:
        (repository / name).unlink()
        os.mkfifo(repository / name)
    said = command.fails_here("restore", repository, tmp_path / "out")
    assert "is no regular file" in said or "is a FIFO" in said
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("backing", ["/etc/passwd", "json:{}", "3.qcow2"])
def test_a_file_that_lies_on_another_than_the_manifest_says(
    good: Path, tmp_path: Path, backing: str
) -> None:
    """Whoever can write the repository can make the checksum right."""
    repository = tmp_path / "repository"
    shutil.copytree(good, repository)
    shutil.copy(repository / "1.qcow2", repository / "3.qcow2")
    qemu.run("qemu-img", "rebase", "-u", "-F", "qcow2", "-b", backing, repository / "2.qcow2")
    manifest = json.loads((repository / NAME).read_text())
    digest = qemu.run("sha256sum", repository / "2.qcow2").split()[0]
    manifest["snapshots"][1]["disk"].update(
        sha256=digest, size=(repository / "2.qcow2").stat().st_size
    )
    (repository / NAME).write_text(json.dumps(manifest))
    for line in (["restore", repository], ["restore", "--snapshot", "two", repository]):
        assert "is another image than" in command.fails_here(*line, tmp_path / "out")
    assert "is another image than" in command.here("verify", repository, status=3)


def test_what_may_be_a_repository(good: Path, tmp_path: Path) -> None:
    path = good.parent / "disk.qcow2"
    (tmp_path / "file").write_text("kept")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes").write_text("kept")
    command.here("split", path, tmp_path / "chain")
    (tmp_path / "empty").mkdir()
    for name, expected in {
        "file": "is a regular file: give a directory",
        "full": "is not empty, and no repository",
        "chain": "is a chain that split has made",
        "missing/deep": "make it first",
    }.items():
        assert expected in command.fails_here("backup", path, tmp_path / name)
    os.mkdir(tmp_path / "bare")
    for name, expected in {
        "file": "is no directory",
        "full": "is no repository",
        "bare": "is no repository",
        "missing": "is no directory",
    }.items():
        assert expected in command.fails_here("verify", tmp_path / name)
        assert expected in command.fails_here("restore", tmp_path / name, tmp_path / "out")
    command.here("backup", path, tmp_path / "empty")
    assert "no snapshot 'x' in" in command.fails_here(
        "restore", "--snapshot", "x", tmp_path / "empty", tmp_path / "out"
    )
    assert "did you mean 'one'?" in command.fails_here(
        "restore", "--snapshot", "oen", good, tmp_path / "out"
    )
    assert "add --snapshot" in command.here("restore", good, "-", status=2)
    line = command.fails_here("restore", "--force", good, good / "1.qcow2")
    assert "is being copied" in line
    nothing = qemu.create(tmp_path / "nothing.qcow2", MiB)
    assert command.here("backup", nothing, tmp_path / "none") == "nothing new\n"
    assert "has no snapshots yet" in command.fails_here(
        "restore", tmp_path / "none", tmp_path / "out"
    )
    assert "has no snapshots yet" in command.fails_here("verify", tmp_path / "none")
