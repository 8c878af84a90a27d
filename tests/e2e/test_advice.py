"""What an error line says to add can be added: to the command, to the plugin, to the library."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest
from support import damage, qemu
from support.command import fails, run
from support.qemu import MiB
from support.server import ROOT, command, refused

import qcow2snap_core

SECRET = ["--object", "secret,id=s,data=horse"]


def overlay(folder: Path, below: Path, **options: object) -> Path:
    path = qemu.create(folder / "disk.qcow2", MiB, backing=(below, "raw"), **options)
    qemu.take(path, "s")
    return path


def base(folder: Path) -> Path:
    folder.mkdir()
    (folder / "base").write_bytes(b"b" * MiB)
    return folder / "base"


def above(folder: Path) -> Path:
    below = base(folder / "there")
    (folder / "here").mkdir()
    return overlay(folder / "here", below)


def without_format(folder: Path) -> Path:
    path = overlay(folder, base(folder / "there"))
    damage.drop_backing_format(path)
    return path


def encrypted(folder: Path) -> Path:
    path = folder / "disk.qcow2"
    options = "encrypt.format=aes,encrypt.key-secret=s"
    qemu.run("qemu-img", "create", "-q", "-f", "qcow2", *SECRET, "-o", options, path, MiB)
    opened = f"driver=qcow2,encrypt.key-secret=s,file.filename={path}"
    qemu.run("qemu-img", "snapshot", *SECRET, "-c", "s", "--image-opts", opened)
    return path


# The image, and what of the line is followed; + stands for the passphrase's file.
ADVICE: dict[str, tuple[Callable[[Path], Path], str]] = {
    "directory": (above, r"add (.*) if you trust it, or "),
    "file": (above, r"or (.*) for this file alone$"),
    "format": (without_format, r"add (.*) or .*$"),
    "passphrase": (encrypted, r"add (.*)$"),
}


@pytest.fixture(params=ADVICE)
def image(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, str]:
    make, pattern = ADVICE[request.param]
    (tmp_path / "FILE").write_text("horse\n")
    return make(tmp_path), pattern


def advised(line: str, pattern: str) -> str:
    found = re.search(pattern, line)
    assert found is not None, line
    return found[1]


def test_of_the_command(image: tuple[Path, str], tmp_path: Path) -> None:
    path, pattern = image
    words = shlex.split(advised(fails("copy", path, "s", tmp_path / "out"), pattern))
    if words[1] == "+FILE":
        words[1] = f"+{tmp_path}/FILE"
    done = run("copy", path, "s", tmp_path / "out", *words)  # it may warn of the encryption
    assert done.returncode == 0, done


def test_of_the_plugin(image: tuple[Path, str], tmp_path: Path) -> None:
    path, pattern = image
    word = advised(refused(file=path, snapshot="s"), pattern)
    line = command("-U", "-", word, "--run", "true", file=path, snapshot="s")
    qemu.run(*line, cwd=tmp_path)


def test_of_the_library(image: tuple[Path, str]) -> None:
    path, pattern = image
    with pytest.raises(qcow2snap_core.UsageError) as caught:
        qcow2snap_core.open(str(path))
    words = advised(str(caught.value), pattern).replace("SECRET", "'horse'")
    keywords = eval(f"dict({words})")
    with qcow2snap_core.open(str(path), **keywords) as opened:
        assert len(opened.snapshots) == 1


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--allow-dir", "/nowhere"], "--allow-dir /nowhere: no such file or directory: give an"),
        (["--allow-file", "/nowhere"], "--allow-file /nowhere: no such file or directory: give an"),
        (["--passphrase", "+/no/file"], "--passphrase +FILE: cannot open '/no/file'"),
        (["--passphrase.2", "-x"], "--passphrase.2 -FD: give the number of an open descriptor"),
        (
            ["--passphrase=-"],
            "--passphrase - asks on a terminal, there is none: use --pass",
        ),
    ],
)
def test_a_wrong_value_is_told_as_it_was_given(tmp_path: Path, words: list[str], said: str) -> None:
    path = overlay(tmp_path, base(tmp_path / "there"))
    flag = [f"{words[0]}={words[1]}"] if len(words) == 2 else words
    assert fails("mount", path, "s", tmp_path, *flag).startswith(f"qcow2snap: {said}")


# --- Misspelt names ---


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    path = qemu.create(tmp_path / "disk.qcow2", MiB)
    for name in ("weekly", "nightly", "a=b/c", "--help", "file=x"):
        qemu.take(path, name)
    return path


def test_a_misspelt_snapshot_is_guessed(disk: Path) -> None:
    assert "did you mean 'nightly'? it has 1 'weekly'" in fails("map", disk, "nigthly")
    assert "did you mean 'nightly'? it has 1 'weekly'" in fails("map", disk, "NIGHTLY")
    assert "did you mean 'nightly'? it has 1 'weekly'" in refused(file=disk, snapshot="nihtly")
    assert "did you mean" not in fails("map", disk, "xyz")


def test_names_that_would_take_long_to_compare_are_not(tmp_path: Path) -> None:
    path = qemu.create(tmp_path / "disk.qcow2", MiB)
    qemu.take(path, "x" * 255)
    assert "did you mean" not in fails("map", path, "x" * 254)


@pytest.mark.parametrize(
    "uri", ["https://user:horse@example.com/disk.qcow2", "s3://x/y", "ssh://h/f"]
)
def test_a_url_leads_to_the_way_that_works(uri: str) -> None:
    scheme = uri.split(":", maxsplit=1)[0]
    for line in (fails("list", uri), refused(file=uri)):
        assert f"{scheme}:// is no URI of an NBD export: let nbdkit serve it" in line
        assert "docs/remote.md" in line
        assert "horse" not in line
    assert (ROOT / "docs" / "remote.md").exists()


def test_a_file_may_look_like_a_url(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "https:").mkdir()
    overlay(tmp_path / "https:", base(tmp_path / "there"))
    monkeypatch.chdir(tmp_path)
    with qcow2snap_core.open("https://disk.qcow2", allow_dirs=[str(tmp_path)]) as image:
        assert len(image.snapshots) == 1


# --- serve ---


@pytest.mark.parametrize(
    ("words", "name"),
    [
        (["nightly"], "nightly"),
        (["a=b/c"], "a=b/c"),
        (["--", "--help"], "--help"),
        (["--", "a=b/c"], "a=b/c"),
        (["--", "file=x"], "file=x"),
        (["snapshot=--help"], "--help"),
    ],
)
def test_serve_takes_any_snapshot(disk: Path, words: list[str], name: str) -> None:
    done = run("serve", disk, *words, "-U", "-", "--run", "nbdinfo --list --json $uri")
    assert done.returncode == 0, done.stderr
    assert [e["export-name"] for e in json.loads(done.stdout)["exports"]] == [name]


@pytest.mark.parametrize(
    "words",
    [
        ["--help"],
        ["l2-cache-size=1M", "-U", "-", "--run", "true"],
        ["partition=1", "--filter=partition", "-U", "-", "--run", "true"],
        ["-U", "-", "--run", "true"],
    ],
)
def test_what_is_nbdkits_stays_nbdkits(disk: Path, words: list[str]) -> None:
    assert run("serve", disk, *words).returncode == 0


@pytest.mark.parametrize("words", [[], ["--"]])
def test_serve_wants_an_image(words: list[str]) -> None:
    done = run("serve", *words)
    assert (done.returncode, done.stdout) == (2, "")
    assert "required: FILE" in done.stderr


def test_a_misspelt_command_is_guessed() -> None:
    done = run("lsit", "disk.qcow2")
    assert (done.returncode, done.stdout) == (2, "")
    assert "(did you mean list?)" in done.stderr
    assert "lsit" not in done.stderr  # it may be a passphrase that lost its option


# --- What is there already ---


def test_replacing_is_told_as_the_command_spells_it(disk: Path, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("old")
    assert "there already: add --force to replace it" in fails("copy", disk, 1, tmp_path / "out")


def test_replacing_is_told_as_the_library_spells_it(disk: Path, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("old")
    (tmp_path / "chain").mkdir()
    (tmp_path / "chain" / "a.qcow2").write_text("old")
    with qcow2snap_core.open(disk) as image:
        with pytest.raises(qcow2snap_core.UsageError, match="add replace=True to replace it$"):
            qcow2snap_core.copy(image.open("1"), tmp_path / "out")
        with pytest.raises(qcow2snap_core.UsageError, match="or add replace=True to replace the"):
            qcow2snap_core.split(image, tmp_path / "chain")


@pytest.mark.parametrize("command", [["copy"], ["compact"], ["join"]])
@pytest.mark.parametrize("force", [[], ["--force"]])
def test_no_image_is_replaced_by_what_is_made_of_it(
    disk: Path, tmp_path: Path, command: list[str], force: list[str]
) -> None:
    (tmp_path / "link").symlink_to(disk)
    before = disk.read_bytes()
    snapshot = ["1"] if command == ["copy"] else []
    said = fails(*command, *force, disk, *snapshot, tmp_path / "link")
    assert said.endswith(f"is '{disk}', which is being copied: give another target")
    said = fails(*command, *force, disk, *snapshot, disk)
    assert said.endswith("is the source itself, which is being copied: give another target")
    assert disk.read_bytes() == before
