"""The examples in docs/library.md, and in the package's docstring, do what they say."""

from __future__ import annotations

import doctest
import io
import re
import tarfile
from pathlib import Path

import pytest
from support import qemu
from support.qemu import MiB
from support.server import ROOT

import qcow2snap_core

PAGE = (ROOT / "docs" / "library.md").read_text()
SECTIONS = dict(re.findall(r"^## (.*)\n((?:(?!## ).*\n)*)", PAGE, re.MULTILINE))


def archive(content: bytes) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        info = tarfile.TarInfo("notes.txt")
        info.size = len(content)
        tar.addfile(info, io.BytesIO(content))
    return out.getvalue()


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The images that the examples name."""
    here = tmp_path_factory.mktemp("library")
    disk = qemu.create(here / "disk.qcow2", 4 * MiB)
    for snapshot, content in {"weekly": b"of last week", "nightly": b"of last night"}.items():
        (here / "tar").write_bytes(archive(content))
        qemu.io(disk, f"write -s {here}/tar 0 10k")
        if snapshot == "nightly":
            qemu.run("qemu-img", "resize", "-q", disk, 8 * MiB)
            qemu.io(disk, "write 4M 64k")
        qemu.take(disk, snapshot)
    (here / "base").mkdir()
    (here / "base/disk.raw").write_bytes(b"base" * 1024)
    overlay = qemu.create(here / "overlay.qcow2", None, backing=("base/disk.raw", "raw"))
    qemu.take(overlay, "nightly")
    return here


def run_examples(text: str, name: str) -> int:
    """How many there are; all must give what they say."""
    test = doctest.DocTestParser().get_doctest(text, {}, name, name, 0)
    said: list[str] = []
    found = doctest.DocTestRunner().run(test, out=said.append)
    assert not found.failed, "".join(said)
    return found.attempted


@pytest.mark.parametrize("section", SECTIONS)
def test_the_page(directory: Path, monkeypatch: pytest.MonkeyPatch, section: str) -> None:
    monkeypatch.chdir(directory)
    if "import pytsk3" in SECTIONS[section]:
        pytest.importorskip("pytsk3")
        ext4(directory)
    assert run_examples(SECTIONS[section], section)


def ext4(directory: Path) -> None:
    files = directory / "files"
    files.mkdir()
    (files / "notes.txt").write_text("of last night")
    qemu.run("/usr/sbin/mke2fs", "-q", "-t", "ext4", "-d", files, directory / "raw", "8M")
    path = directory / "ext4.qcow2"
    qemu.run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", directory / "raw", path)
    qemu.take(path, "nightly")


def test_the_docstring(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(directory)
    assert qcow2snap_core.__doc__
    assert run_examples(qcow2snap_core.__doc__, "qcow2snap_core")
