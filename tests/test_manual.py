"""The manual pages name every key, command and option that there is, and no other."""

from __future__ import annotations

import argparse
import re
import subprocess
from pathlib import Path

import pytest
from support.server import ROOT

from qcow2snap_core import __version__, cli
from qcow2snap_core.serve import settings

PLUGIN_PAGE = (ROOT / "docs" / "nbdkit-qcow2snap-plugin.pod").read_text()
COMMAND_PAGE = (ROOT / "docs" / "qcow2snap.pod").read_text()

# nbdkit's own pages have these, in this order; a page's further sections stand among them.
ORDER = [
    *("NAME", "SYNOPSIS", "DESCRIPTION", "EXAMPLES", "PARAMETERS", "COMMANDS", "OPTIONS"),
    *("FILES", "VERSION", "SEE ALSO", "AUTHORS", "COPYRIGHT", "LICENSE"),
]


def sections(page: str, level: int = 1) -> dict[str, str]:
    """The text of each section by its heading."""
    parts = re.split(rf"^=head{level} (.*)$", page, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def keys(text: str) -> set[str]:
    return set(re.findall(r"^=item B<([a-z][a-z0-9.-]*(?:\.N)?)=", text, re.MULTILINE))


def options(text: str) -> set[str]:
    return set(re.findall(r"^=item B<(-[^>]+)>", text, re.MULTILINE))


def parsers() -> dict[str, argparse.ArgumentParser]:
    actions = cli.whole_parser()._actions
    [commands] = [a for a in actions if isinstance(a, argparse._SubParsersAction)]
    return dict(commands.choices)


DESCRIBED = sections(sections(COMMAND_PAGE)["COMMANDS"], 2)


def test_every_key_of_the_plugin_is_described_and_no_other() -> None:
    there = {*settings.KEYS, *settings.ALIASES}
    assert keys(sections(PLUGIN_PAGE)["PARAMETERS"]) == there


def test_every_key_is_in_the_synopsis() -> None:
    synopsis = sections(PLUGIN_PAGE)["SYNOPSIS"]
    assert set(re.findall(r"([a-z][a-z0-9.-]*(?:\.N)?)=", synopsis)) == set(settings.KEYS)


def test_every_field_of_dump_plugin_is_described_and_no_other() -> None:
    command = ["nbdkit", "python", ROOT / "plugin" / "qcow2snap.py", "--dump-plugin"]
    said = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
    described = re.findall(r"^=item C<(qcow2snap_\w+)=", PLUGIN_PAGE, re.MULTILINE)
    assert described == re.findall(r"^(qcow2snap_\w+)=", said, re.MULTILINE)


def test_every_command_is_described_and_no_other() -> None:
    assert set(DESCRIBED) == set(cli.COMMANDS)
    synopsis = sections(COMMAND_PAGE)["SYNOPSIS"]
    assert set(re.findall(r"^ qcow2snap (\w+)", synopsis, re.MULTILINE)) == set(DESCRIBED)


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_argument_of_a_command_is_described_and_no_other(name: str) -> None:
    text = DESCRIBED[name]
    described = options(text)
    if "L</IMAGE OPTIONS>" in text:
        described |= options(sections(COMMAND_PAGE)["IMAGE OPTIONS"]) - {"--passphrase.N"}
    there: set[str] = set()
    for action in parsers()[name]._actions:
        if action.option_strings and action.help is not argparse.SUPPRESS:
            there |= set(action.option_strings)
        elif not action.option_strings:
            usage = next(line for line in text.splitlines() if line.startswith(" "))
            assert set(re.findall("[A-Z]+", str(action.metavar))) <= set(
                re.findall("[A-Z]+", usage)
            )
    assert described | {"-h", "--help"} == there


def test_the_options_of_the_command_itself_are_described_and_no_other() -> None:
    there = {o for a in cli.whole_parser()._actions for o in a.option_strings}
    assert options(sections(COMMAND_PAGE)["OPTIONS"]) == there


def test_the_newest_changes_are_those_of_this_version() -> None:
    changes = (ROOT / "CHANGELOG.md").read_text()
    newest = re.search(r"^## (\S+) \(\d{4}-\d\d-\d\d\)$", changes, re.MULTILINE)
    assert newest is not None
    assert newest[1] == __version__


@pytest.mark.parametrize("page", [PLUGIN_PAGE, COMMAND_PAGE], ids=["plugin", "command"])
def test_the_sections_are_in_the_order_of_nbdkit(page: str) -> None:
    known = [heading for heading in sections(page) if heading in ORDER]
    assert known == sorted(known, key=ORDER.index)
    assert known[:3] + known[-4:] == ORDER[:3] + ORDER[-4:]


@pytest.mark.parametrize("name", ["nbdkit-qcow2snap-plugin", "qcow2snap"])
def test_the_source_of_a_page_is_valid(name: str, tmp_path: Path) -> None:
    page = ROOT / "docs" / f"{name}.pod"
    command = ["pod2man", "--errors=die", "--utf8", page, tmp_path / "page"]
    subprocess.run(command, check=True, timeout=60)
    assert f"{name} " in (tmp_path / "page").read_text().split("SYNOPSIS")[0].replace("\\", "")
