"""What is made of an image is not for more eyes than the image was, and not silently plain."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
from support import command, qemu, secret
from support.qemu import MiB

from qcow2snap_core import cli
from qcow2snap_core.errors import StorageError
from qcow2snap_core.transfer.newimage import NewImage


@pytest.fixture
def image(tmp_path: Path) -> Path:
    base = qemu.create(tmp_path / "base.qcow2", MiB)
    path = qemu.create(tmp_path / "disk.qcow2", MiB, backing=(base.name, "qcow2"))
    qemu.take(path, "s")
    return path


def mode(path: Path) -> int:
    return path.stat().st_mode & 0o7777


def made_of(image: Path, umask: int) -> dict[str, Path]:
    """One of each output."""
    directory = image.parent
    before = os.umask(umask)
    try:
        for name in ("raw", "qcow2"):
            command.qcow2snap("copy", image, "s", directory / f"out.{name}")
        command.qcow2snap("split", image, directory / "chain")
        # It warns of the snapshots inside.
        assert command.run("join", image, directory / "joined.qcow2").returncode == 0
        command.qcow2snap("compact", image, directory / "compact.qcow2")
        command.qcow2snap("backup", image, directory / "repository")
    finally:
        os.umask(before)
    overlays = ("chain/s.qcow2", "chain/active.qcow2")
    overlays += ("chain/qcow2snap.json", "repository/1.qcow2", "repository/qcow2snap.json")
    names = ("out.raw", "out.qcow2", *overlays, "joined.qcow2", "compact.qcow2")
    return {name: directory / name for name in names}


@pytest.mark.parametrize(
    ("image_mode", "base_mode", "umask", "expected"),
    [
        (0o644, 0o644, 0o022, 0o644),
        (0o666, 0o666, 0o022, 0o644),
        (0o600, 0o644, 0o022, 0o600),
        (0o644, 0o600, 0o022, 0o600),
        (0o640, 0o644, 0o002, 0o640),
        (0o400, 0o644, 0o022, 0o400),
        (0o666, 0o666, 0o077, 0o600),
        (0o777, 0o777, 0o000, 0o666),
    ],
)
def test_no_more_than_the_image_and_its_backing_file_had(
    image: Path, image_mode: int, base_mode: int, umask: int, expected: int
) -> None:
    image.chmod(image_mode)
    (image.parent / "base.qcow2").chmod(base_mode)
    for name, path in made_of(image, umask).items():
        assert mode(path) == expected, name


@pytest.mark.parametrize(("old", "expected"), [(0o666, 0o640), (0o600, 0o600)])
def test_a_file_that_is_replaced_keeps_its_own_as_far_as_the_image_had_them(
    image: Path, tmp_path: Path, old: int, expected: int
) -> None:
    image.chmod(0o640)
    out = tmp_path / "out.raw"
    out.touch()
    out.chmod(old)
    command.qcow2snap("copy", "--force", image, "s", out)
    assert mode(out) == expected


def test_an_updated_copy_keeps_those_that_it_was_given(image: Path, tmp_path: Path) -> None:
    image.chmod(0o600)
    out = tmp_path / "out.raw"
    command.qcow2snap("copy", image, "s", out)
    out.chmod(0o640)
    qemu.take(image, "t")
    command.qcow2snap("copy", image, "--since", "s", "t", out)
    assert mode(out) == 0o640


def test_nobody_else_may_read_it_before_it_is_whole(
    image: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Looked at when qemu-nbd is started to write it, or when the first bytes are."""
    tools = tmp_path / "tools"
    tools.mkdir()
    (tools / "qemu-nbd").write_text(
        f"#!/bin/sh\nfind {tmp_path} -name '*.part' -perm /077 -print >{tmp_path}/seen\n"
        f"find {tmp_path} -path '*.part/*' -perm /077 -print >>{tmp_path}/seen\nexit 1\n"
    )
    (tools / "qemu-nbd").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}:{os.environ['PATH']}")

    def write(self: NewImage, data: bytes, offset: int) -> None:
        subprocess.run(["qemu-nbd"], check=False)
        raise StorageError("that is enough")

    monkeypatch.setattr(NewImage, "write", write)
    for line in (
        ["copy", image, "s", tmp_path / "out.qcow2"],
        ["compact", image, tmp_path / "small.qcow2"],
        ["backup", image, tmp_path / "repository"],
        ["split", image, tmp_path / "chain"],
        ["join", image, tmp_path / "joined.qcow2"],
    ):
        assert cli.main([str(word) for word in line]) == 1
        assert (tmp_path / "seen").read_text() == ""
        (tmp_path / "seen").unlink()


@pytest.mark.parametrize("name", ["out.raw", "out.qcow2", "-"])
def test_that_the_copy_of_an_encrypted_image_is_plain_is_said(tmp_path: Path, name: str) -> None:
    path = tmp_path / "disk.qcow2"
    secret.create(path, MiB, ["x"], **{"encrypt.format": "luks"})
    qemu.run("qemu-img", "snapshot", "-c", "s", *secret.objects(["x"]), *secret.opened(path, ["x"]))
    target = name if name == "-" else tmp_path / name
    done = command.run("copy", path, "s", target, "--passphrase", "x")
    assert done.returncode == 0
    assert done.stderr == (f"qcow2snap: warning: '{path}' is encrypted, the result is not\n")
