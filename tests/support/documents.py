"""Runs what a page of the documentation shows, and compares what it prints.

In a block of the language "console" a line after ``$`` is a command, those after ``>`` go on with
it, and the others are its output, in which ``...`` stands for anything within a line.  The blocks
of a section are run by one bash.  ``<!-- run: ... -->`` is a command that the reader does not see,
and ``<!-- needs: ... -->`` names programs and devices without which the section is left out.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from support.server import PLUGIN, PLUGIN_WORDS, ROOT

_END = "\x1e"  # stands between the outputs of two commands


@dataclass
class Section:
    """What stands under one heading."""

    page: str
    title: str
    needs: list[str] = field(default_factory=list)  # programs and devices
    #: command and output, or None where it must only succeed
    steps: list[tuple[str, str | None]] = field(default_factory=list)

    def missing(self) -> list[str]:
        """What it needs and this machine has not."""
        return [n for n in self.needs if not (os.path.exists(n) or shutil.which(n))]


def sections(page: Path) -> list[Section]:
    """The sections of a page that have something to run."""
    found = [Section(page.stem, "")]
    inside = False
    for line in page.read_text().splitlines():
        if line.startswith("```"):
            inside = line == "```console"
        elif line.startswith("## ") and not inside:
            found.append(Section(page.stem, line[3:]))
        elif needs := re.fullmatch("<!-- needs: (.*) -->", line):
            found[-1].needs += needs[1].split()
        elif hidden := re.fullmatch("<!-- run: (.*) -->", line):
            found[-1].steps.append((hidden[1], None))
        elif inside and line.startswith("$ "):
            found[-1].steps.append((line[2:], ""))
        elif inside:
            command, output = found[-1].steps[-1]
            if line.startswith("> ") and not output:
                found[-1].steps[-1] = f"{command}\n{line[2:]}", ""
            else:
                found[-1].steps[-1] = command, f"{output or ''}{line}\n"
    return [s for s in found if s.steps]


def examples(page: Path) -> list[Section]:
    """The examples of a manual page, which must succeed; what they print is not shown there.

    A verbatim line below a command is another one; items with no text between belong together.
    """
    found: list[Section] = []
    together = False
    for line in page.read_text().split("=head1 EXAMPLES")[1].split("=back")[0].splitlines():
        if line.startswith("=item "):
            if not together:
                found.append(Section(page.stem, line[6:]))
            found[-1].steps.append((line[6:], None))
            together = True
        elif line.startswith(" "):
            found[-1].steps.append((line.strip(), None))
        elif line and not line.startswith("="):
            together = False
    return found


def run(section: Section, directory: Path) -> None:
    """Run a section's commands in ``directory`` as if the plugin and command were installed; or
    with those that are, where the sources are not beside the tests."""
    programs = directory / ".programs"
    programs.mkdir()
    port = _free_port()
    # nbdkit's own port may be taken, and what it leaves in the background is ended by its PID.
    nbdkit = f"""#!/bin/bash
words=(-P "{directory}/.$$.pid")
for word; do
    case $word in
        qcow2snap) words+=({shlex.join(PLUGIN_WORDS)}) ;;
        localhost) words+=(localhost -p {port}) ;;
        *) words+=("$word") ;;
    esac
done
exec {shutil.which("nbdkit")} "${{words[@]}}"
"""
    old = "nbd:\\/\\/localhost"
    client = f'#!/bin/bash\nexec {{}} "${{{{@//{old}/{old}:{port}}}}}"\n'
    # systemd-socket-activate passes no environment on.
    ours = f'PYTHONPATH={shlex.quote(str(ROOT))} exec {sys.executable} -m qcow2snap_core "$@"'
    scripts = {
        "nbdkit": nbdkit,
        "python3": f'#!/bin/sh\nexec {sys.executable} "$@"\n',
        **{name: client.format(shutil.which(name)) for name in ("nbdinfo", "nbdcopy")},
    }
    if PLUGIN.exists():
        scripts["qcow2snap"] = f"#!/bin/sh\n{ours}\n"
    for name, script in scripts.items():
        (programs / name).write_text(script)
        (programs / name).chmod(0o755)
    script = "".join(f"{command}\nprintf '{_END}%s{_END}' $?\n" for command, _ in section.steps)
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
    finally:
        _end_what_is_left(process.pid, directory)


def _compare(section: Section, said: list[str]) -> None:
    steps = zip(section.steps, said[::2], said[1::2], strict=False)
    for (command, expected), got, status in steps:
        if expected is None:
            assert status == "0", f"$ {command}\n{got}\nand it ended with status {status}"
            continue
        pattern = ".*".join(map(re.escape, expected.split("...")))
        assert re.fullmatch(pattern, got), f"$ {command}\n{got}\nbut it should print\n{expected}"
    assert len(said) == 2 * len(section.steps) + 1, f"bash ended early: {said[-1]}"


def _free_port() -> int:
    with socket.create_server(("localhost", 0)) as listening:
        return int(listening.getsockname()[1])


def _end_what_is_left(group: int, directory: Path) -> None:
    """Processes of a section that failed, and servers in the background."""
    with suppress(ProcessLookupError):
        os.killpg(group, signal.SIGKILL)
    for pid in directory.glob("*.pid"):
        with suppress(FileNotFoundError, ProcessLookupError, ValueError):
            number = int(pid.read_text())
            name = Path(f"/proc/{number}/comm").read_text()
            if name.startswith(("nbd", "qemu")):  # and not another that has the number by now
                os.kill(number, signal.SIGTERM)
