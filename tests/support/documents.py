"""Runs what a page of the documentation shows, and compares what it prints.

In a block of the language "console" a line after ``$`` is a command, those after ``>`` go on with
it, and the others are its output, in which ``...`` stands for anything within a line.  The blocks
of a section are run by one bash.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from support.server import PLUGIN, ROOT

_END = "\x1e"  # stands between the outputs of two commands


@dataclass
class Section:
    """What stands under one heading."""

    title: str
    needs: list[str] = field(default_factory=list)  # programs and devices
    steps: list[tuple[str, str]] = field(default_factory=list)  # command, output

    def missing(self) -> list[str]:
        """What it needs and this machine has not."""
        return [n for n in self.needs if not (os.path.exists(n) or shutil.which(n))]


def sections(page: Path) -> list[Section]:
    """The sections of a page that have something to run."""
    found = [Section(page.stem)]
    inside = False
    for line in page.read_text().splitlines():
        if line.startswith("```"):
            inside = line == "```console"
        elif line.startswith("## ") and not inside:
            found.append(Section(line[3:]))
        elif needs := re.fullmatch("<!-- needs: (.*) -->", line):
            found[-1].needs += needs[1].split()
        elif inside and line.startswith("$ "):
            found[-1].steps.append((line[2:], ""))
        elif inside:
            command, output = found[-1].steps[-1]
            if line.startswith("> ") and not output:
                found[-1].steps[-1] = f"{command}\n{line[2:]}", ""
            else:
                found[-1].steps[-1] = command, f"{output}{line}\n"
    return [s for s in found if s.steps]


def run(section: Section, directory: Path) -> None:
    """Run a section's commands in ``directory`` as if the plugin and command were installed."""
    programs = directory / ".programs"
    programs.mkdir()
    nbdkit = f"""#!/bin/bash
for word; do
    case $word in
        qcow2snap) words+=(python {shlex.quote(str(PLUGIN))}) ;;
        *) words+=("$word") ;;
    esac
done
exec {shutil.which("nbdkit")} "${{words[@]}}"
"""
    command = f'#!/bin/sh\nexec {sys.executable} -m qcow2snap_core "$@"\n'
    for name, script in {"nbdkit": nbdkit, "qcow2snap": command}.items():
        (programs / name).write_text(script)
        (programs / name).chmod(0o755)
    script = "".join(f"{command}\nprintf '{_END}'\n" for command, _ in section.steps)
    process = subprocess.Popen(
        ["bash", "-c", script],
        cwd=directory,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        env={
            **os.environ,
            "PATH": f"{programs}:{os.environ['PATH']}:/usr/sbin:/sbin",
            "PYTHONPATH": str(ROOT),
            "LC_ALL": "C.UTF-8",
        },
    )
    try:
        said = process.communicate(timeout=120)[0].split(_END)
        _compare(section, said)
    except BaseException:
        _end_what_is_left(process.pid, directory)
        raise


def _compare(section: Section, said: list[str]) -> None:
    for (command, expected), got in zip(section.steps, said, strict=False):
        pattern = ".*".join(map(re.escape, expected.split("...")))
        assert re.fullmatch(pattern, got), f"$ {command}\n{got}\nbut it should print\n{expected}"
    assert len(said) == len(section.steps) + 1, f"bash ended early: {said[-1]}"


def _end_what_is_left(group: int, directory: Path) -> None:
    """A section failed: end its processes, and the servers that it sent to the background."""
    with suppress(ProcessLookupError):
        os.killpg(group, signal.SIGKILL)
    for pid in directory.glob("*.pid"):
        with suppress(ProcessLookupError, ValueError):
            os.kill(int(pid.read_text()), signal.SIGTERM)
