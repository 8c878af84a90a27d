"""The examples in docs/library.md, and in the docstrings of what it names, do what they say."""

from __future__ import annotations

import doctest
import io
import re
import shutil
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from support import qemu
from support.qemu import MiB
from support.server import ROOT
from support.vm import machine

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
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
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
    with machine(qemu.create(here / "machine.qcow2", MiB)) as vm:
        vm.save("running")
    return here


@pytest.fixture
def directory(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current one, with the images; the examples write others beside them."""
    shutil.copytree(images, tmp_path / "here")
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "here"


def run_examples(text: str, name: str) -> int:
    """How many there are; all must give what they say."""
    names = {"qcow2snap_core": qcow2snap_core} | {
        n: getattr(qcow2snap_core, n) for n in qcow2snap_core.__all__
    }
    test = doctest.DocTestParser().get_doctest(text, names, name, name, 0)
    said: list[str] = []
    found = doctest.DocTestRunner().run(test, out=said.append)
    assert not found.failed, "".join(said)
    return found.attempted


@pytest.mark.parametrize("section", SECTIONS)
def test_the_page(directory: Path, section: str) -> None:
    assert run_examples(SECTIONS[section], section)


def docstrings() -> Iterator[tuple[str, str]]:
    yield "qcow2snap_core", qcow2snap_core.__doc__ or ""
    for name in qcow2snap_core.__all__:
        found = getattr(qcow2snap_core, name)
        yield name, found.__doc__ or ""
        if isinstance(found, type) and found.__module__ == "qcow2snap_core":
            for member, value in vars(found).items():
                yield f"{name}.{member}", value.__doc__ or ""


EXAMPLES = {name: text for name, text in docstrings() if ">>>" in text}


def test_what_reads_and_writes_has_an_example() -> None:
    functions = {"backup", "changes", "check", "copy", "exclusive_sizes", "join", "open", "split"}
    assert set(EXAMPLES) >= functions | {"qcow2snap_core"}


@pytest.mark.parametrize("name", EXAMPLES)
def test_the_docstring(directory: Path, name: str) -> None:
    before = {"join": "split", "restore": "backup", "verify": "backup"}.get(name)
    if before:  # its example goes on from that one's
        assert run_examples(EXAMPLES[before], before)
    assert run_examples(EXAMPLES[name], name)
