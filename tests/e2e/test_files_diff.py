"""qcow2snap diff --files: which files differ, held against the trees that were put in."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from support import filesystems, qemu
from support.command import fails, qcow2snap, qcow2snap_json, run
from support.filesystems import make_filesystem, needs
from support.qemu import MiB


@pytest.fixture(params=["tsk", "dissect"])
def image(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[Path, str]:
    """The snapshots ``old`` and ``new``, and the library to read them with."""
    filesystems.use_dissect(monkeypatch)
    needs("ext4", request.param)
    old, new = tmp_path / "old", tmp_path / "new"
    (old / "etc").mkdir(parents=True)
    for name in ("same", "mode", "etc/content", "longer", "gone", "touched", "kind"):
        (old / name).write_bytes(os.urandom(5000))
    os.symlink("same", old / "link")
    for path in (old / "etc", old, *old.glob("*")):
        os.utime(path, (10**9, 10**9), follow_symlinks=False)
    shutil.copytree(old, new, symlinks=True)
    (new / "mode").chmod(0o600)
    data = bytearray((new / "etc/content").read_bytes())
    data[4999] ^= 1
    (new / "etc/content").write_bytes(data)
    os.utime(new / "etc/content", (10**9 + 1, 10**9 + 1))
    (new / "longer").write_bytes(b"x" * 6000)
    (new / "gone").unlink()
    os.utime(new / "touched")
    (new / "kind").unlink()
    (new / "kind").mkdir()
    (new / "kind" / "below").touch()
    (new / "link").unlink()
    os.symlink("mode", new / "link")
    path = qemu.create(tmp_path / "disk.qcow2", 48 * MiB)
    for name in ("old", "new"):
        raw = make_filesystem("ext4", tmp_path / name, tmp_path / f"{name}.raw")
        qemu.run("qemu-img", "convert", "-n", "-f", "raw", "-O", "qcow2", raw, path)
        qemu.take(path, name)
    return path, request.param


def test_each_kind_of_change(image: tuple[Path, str]) -> None:
    path, backend = image
    found = qcow2snap_json("diff", "--files", "--backend", backend, path, "old", "new")
    kinds = {e["path"]: (e["change"], e["type"]) for e in found}
    assert {p: k for p, k in kinds.items() if k[0] != "metadata"} == {
        "/etc/content": ("content", "file"),
        "/longer": ("content", "file"),
        "/gone": ("removed", "file"),
        "/kind": ("content", "directory"),
        "/kind/below": ("added", "file"),
        "/link": ("content", "link"),
    }
    fields = {e["path"]: set(e["fields"]) - {"ctime"} for e in found}
    assert fields["/mode"] == {"mode"}
    assert fields["/touched"] == {"mtime"}
    assert fields["/longer"] == {"size", "mtime"}
    assert fields.get("/same", set()) == set()
    said = qcow2snap("diff", "--files", "--backend", backend, path, "old", "new").splitlines()
    assert "D /gone" in said
    assert "A /kind/below" in said
    assert any(line.startswith("M /etc/content") for line in said)
    assert any(line.startswith("m /touched  (mtime") for line in said)


def test_nothing_changed(image: tuple[Path, str]) -> None:
    path, backend = image
    for more in ([], ["--content"]):
        how = ["--files", "--backend", backend, *more]
        assert qcow2snap_json("diff", *how, path, "new", "new") == []


def test_content_that_changed_behind_the_metadata(image: tuple[Path, str]) -> None:
    path, backend = image
    raw = path.with_name("new.raw")
    block = int(qemu.run("debugfs", "-R", "blocks /same", raw).split()[0])
    qemu.io(path, f"write -P 9 {block * 1024} 512")
    qemu.take(path, "later")
    how = ["--files", "--backend", backend]
    assert qcow2snap("diff", *how, path, "new", "later") == ""
    assert qcow2snap("diff", *how, "--content", path, "new", "later") == "M /same\n"


def test_options_of_files_want_files(image: tuple[Path, str]) -> None:
    path, _ = image
    assert run("diff", "--content", path, "old", "new").returncode == 2
    assert "no snapshot 'older'" in fails("diff", "--files", path, "older", "new")
