"""``qcow2snap copy`` to a qcow2 file: what QEMU reads in it, and what it is made of."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from support import command, qemu
from support.qemu import GiB, KiB, MiB
from support.server import ROOT

SIZE = 8 * MiB + 1536  # no whole number of clusters


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data and zeros with odd ends, over a backing file."""
    directory = tmp_path_factory.mktemp("copy")
    base = qemu.create(directory / "base", SIZE - MiB)
    qemu.RandomImage(base, seed=3, size=SIZE - MiB).make([])
    path = directory / "disk.qcow2"
    options: dict[str, object] = {"extended_l2": "on"}
    qemu.RandomImage(path, seed=4, size=SIZE, options=options, backing=(base.name, "qcow2")).make(
        ["s"], 30
    )
    qemu.io(path, f"write -P 8 {SIZE - 512} 512")
    qemu.take(path, "t")
    return path


def kinds(path: Path) -> str:
    """How many of its clusters are allocated and compressed, as qemu-img check counts them."""
    return qemu.run("qemu-img", "check", path)


@pytest.mark.parametrize("how", [[], ["--compress"], ["--compress", "zstd"]], ids=str)
@pytest.mark.parametrize("snapshot", ["s", "t"])
def test_it_holds_the_snapshot(image: Path, tmp_path: Path, snapshot: str, how: list[str]) -> None:
    out = tmp_path / "a,b=c.qcow2"  # commas mean something to QEMU
    command.qcow2snap("copy", *how, image, snapshot, out)
    said = qemu.info(out)
    assert said["format"] == "qcow2"
    assert said["virtual-size"] == SIZE
    assert "backing-filename" not in said
    detail = said["format-specific"]["data"]
    assert detail["compression-type"] == ("zstd" if "zstd" in how else "zlib")
    assert detail["extended-l2"] is not bool(how)
    copied = tmp_path / "same.qcow2"
    out.rename(copied)
    assert qemu.content(copied) == qemu.snapshot_content(image, snapshot)
    assert ("100.00% compressed" in kinds(copied)) is bool(how)
    assert os.listdir(tmp_path) == ["same.qcow2"]


def test_zeros_take_no_space(tmp_path: Path) -> None:
    path = qemu.create(tmp_path / "disk.qcow2", "1T")
    qemu.io(path, "write -P 1 5M 64k", "write -z 10M 64k", "write -P 1 999G 64k")
    qemu.take(path, "s")
    for how in ([], ["--compress"]):
        command.qcow2snap("copy", "--force", *how, path, "s", tmp_path / "out.qcow2")
        assert (tmp_path / "out.qcow2").stat().st_size < 2 * MiB


@pytest.mark.parametrize(
    ("name", "options", "form"),
    [
        ("out.qcow2", ["--format", "raw"], "raw"),
        ("out.img", ["--format", "qcow2"], "qcow2"),
        ("out.qcow2.img", [], "raw"),
        ("out.QCOW2", [], "qcow2"),
        ("out.vmdk.raw", [], "raw"),
        ("out.vmdk", ["--format", "raw"], "raw"),
        ("out.VDI", ["--format", "qcow2"], "qcow2"),
    ],
)
def test_the_option_wins_over_the_name(
    image: Path, tmp_path: Path, name: str, options: list[str], form: str
) -> None:
    command.qcow2snap("copy", image, "s", *options, tmp_path / name)
    content = (tmp_path / name).read_bytes()
    if form == "raw":
        assert content == qemu.snapshot_content(image, "s")
    else:
        assert content[:4] == b"QFI\xfb"


@pytest.mark.parametrize(
    ("options", "target", "expected"),
    [
        (["--compress"], "out.raw", "--compress goes with --format qcow2"),
        (["--compress", "--format", "raw"], "out.qcow2", "--compress goes with --format qcow2"),
        (["--compress=lzo"], "out.qcow2", "give one of zlib, zstd"),
        (["--since", "s"], "out.qcow2", "--since updates raw files"),
        (["--since", "s", "--force"], "out.raw", "leave out --force"),
        ([], "out.vmdk", "give another name, or --format raw"),
        ([], "out.VHDX", "name is that of another format than raw and qcow2"),
        (["--salvage", "map"], "out.qed", "name is that of another format"),
    ],
)
def test_what_does_not_go_together_is_a_usage_error(
    image: Path, tmp_path: Path, options: list[str], target: str, expected: str
) -> None:
    done = command.run("copy", image, *options, "t", tmp_path / target)
    assert done.returncode == 2
    assert expected in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_snapshot_of_a_repository_goes_by_the_same_names(image: Path, tmp_path: Path) -> None:
    command.here("backup", image, tmp_path / "repository")
    restore = ("restore", "--snapshot", "s", tmp_path / "repository")
    assert "--format raw" in command.fails_here(*restore, tmp_path / "out.vdi")
    command.here(*restore, "--format", "raw", tmp_path / "out.vdi")
    assert (tmp_path / "out.vdi").read_bytes() == qemu.snapshot_content(image, "s")
    whole = ("restore", "--format", "raw", tmp_path / "repository", tmp_path / "out")
    assert "--format goes with --snapshot" in command.here(*whole, status=2)


def test_only_a_file_can_be_one(image: Path) -> None:
    line = command.fails("copy", "--format", "qcow2", image, "s", "nbd://localhost/x")
    assert "only a file can be written as qcow2" in line


def test_a_size_that_no_qcow2_disk_has_is_refused(tmp_path: Path) -> None:
    path = qemu.create(tmp_path / "disk.qcow2", 4 * KiB)
    qemu.take(path, "s")
    entry = qemu.snapshots(path)["s"].entry_offset
    qemu.patch(path, entry + 48, (4 * KiB - 1).to_bytes(8, "big"))  # the disk's size
    line = command.fails("copy", path, "s", tmp_path / "out.qcow2")
    assert "4095 bytes are no whole number of sectors" in line
    assert os.listdir(tmp_path) == ["disk.qcow2"]


def test_it_can_hold_a_disk_for_which_no_file_is_long_enough(tmp_path: Path) -> None:
    path = qemu.create(tmp_path / "disk.qcow2", GiB)
    qemu.take(path, "s")
    limited = ["prlimit", f"--fsize={GiB - MiB}", sys.executable, "-m", "qcow2snap_core", "copy"]

    def copy(out: Path) -> subprocess.CompletedProcess[str]:
        line = [*limited, str(path), "s", str(out)]
        return subprocess.run(line, cwd=ROOT, capture_output=True, text=True, check=False)

    raw = tmp_path / "out.raw"
    assert copy(raw).stderr == (
        f"qcow2snap: cannot make '{raw}' 1 GiB long: file too large; give a name that ends in "
        f".qcow2, such a file does not need that\n"
    )
    assert copy(tmp_path / "out.qcow2").returncode == 0
