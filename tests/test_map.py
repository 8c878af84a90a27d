"""CONTRIBUTING's map has every module, and what the documents name and link to is there."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import pytest
from support.server import ROOT

CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text()
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob(".github/*/*.md")])


def block(start: str) -> list[str]:
    """The lines of the map after this one and deeper, without its indentation."""
    lines = CONTRIBUTING.split(f"    {start}\n")[1].split("\n\n")[0].splitlines()
    return [line[6:] for line in lines]


def names(line: str) -> list[str]:
    """What stands before a description, which is two spaces away."""
    return re.split("  +", line.strip())[0].split()


def modules_on_the_map() -> Counter[str]:
    found: Counter[str] = Counter()
    room = ""
    for line in block("qcow2snap_core/"):
        if line.startswith("  "):
            found.update(f"{room}{name}" for name in names(line))
        elif names(line)[0].endswith("/"):
            room = names(line)[0]
        else:
            found.update(names(line))
    return found


def test_the_map_has_every_module_once() -> None:
    package = ROOT / "qcow2snap_core"
    there = (f.relative_to(package).with_suffix("") for f in package.rglob("*.py"))
    expected = {str(path) for path in there if not path.name.startswith("__")}
    assert modules_on_the_map() == Counter(expected)


def test_the_map_has_every_folder_of_tests() -> None:
    named = [names(line)[0] for line in block("tests/")]
    rooms = {f.name for f in (ROOT / "qcow2snap_core").iterdir() if f.is_dir()}
    for folder in (ROOT / "tests").iterdir():
        if folder.is_dir() and not folder.name.startswith("_"):
            assert f"{folder.name}/" in named or folder.name in rooms, folder
    for name in named:
        assert name == "ROOM/" or (ROOT / "tests" / name).exists(), name


def test_the_linters_have_one_version() -> None:
    pinned = (ROOT / "packaging" / "requirements-lint.txt").read_text()
    for hook in re.findall(r"ruff==[\d.]+", (ROOT / ".pre-commit-config.yaml").read_text()):
        assert hook in pinned.split()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_leads_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        path, _, anchor = link.partition("#")
        if not re.match("https?:", link):
            target = page.parent / path if path else page
            assert target.exists(), link
            assert not anchor or anchor in anchors(target), link


def anchors(page: Path) -> set[str]:
    headings = re.findall("^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_file_that_is_named_is_there(page: Path) -> None:
    for path in re.findall(
        r"`((?:tests|docs|packaging|plugin|qcow2snap_core)/[\w./*-]+)`", page.read_text()
    ):
        assert list(ROOT.glob(path.rstrip("/"))), path


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_target_of_make_that_is_named_is_there(page: Path) -> None:
    targets = re.findall(r"^([\w -]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    known = {target for line in targets for target in line.split()}
    for words in re.findall(r"`make ([^`]*)`", page.read_text()):
        named = [word for word in words.split() if "=" not in word]
        assert known.issuperset(named), words


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_test_that_is_named_is_there(page: Path) -> None:
    for path in re.findall(r"`((?:\w+/)*test_\w+\.py)`", page.read_text()):
        assert (ROOT / "tests" / path).exists() or (ROOT / path).exists(), path
