"""Completion in bash, zsh and fish as somebody types it: a line, Tab, and what the line is then."""

from __future__ import annotations

import os
import pty
import select
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from support import qemu
from support.server import ROOT

SHELLS = ("bash", "zsh", "fish")

# Key Ctrl-X writes the line into a file and ends the shell.
START = {
    "bash": """
source {script}
bind 'set bell-style none'
bind -x '"\\C-x": printf "%s" "$READLINE_LINE" >{out}; exit'
""",
    "zsh": """
fpath=({folder} $fpath)
autoload -Uz compinit && compinit -u -D
zstyle ':completion:*' verbose no
out() {{ zle expand-or-complete; print -rn -- $BUFFER >{out}; exit }}
zle -N out && bindkey '^X' out
unsetopt beep
""",
    "fish": """
source {script}
bind \\cx 'commandline >{out}; exit'
""",
}
ARGUMENTS = {
    "bash": ["bash", "--norc", "--noprofile", "-i"],
    "zsh": ["zsh", "-f", "-i"],
    "fish": ["fish", "--no-config", "-i"],
}


class Shell:
    """A shell on a terminal of its own, for one line."""

    def __init__(self, name: str, folder: Path, home: Path) -> None:
        self.name = name
        self._out = home / "line"
        script = folder / ("_qcow2snap" if name == "zsh" else name)
        start = START[name].format(script=script, folder=folder, out=self._out)
        self._start = home / "start"
        self._start.write_text(start)
        environment = {
            "PATH": f"{folder}:{os.environ['PATH']}",
            "HOME": str(home),
            "TERM": "dumb" if name != "fish" else "xterm",
            "LANG": "C.UTF-8",
        }
        self._terminal, other = pty.openpty()
        self._process = subprocess.Popen(
            ARGUMENTS[name],
            cwd=home,
            env=environment,
            preexec_fn=lambda: os.login_tty(other),  # noqa: PLW1509
        )
        os.close(other)

    def completed(self, typed: str) -> str:
        """The line after Tab."""
        self._type(f"source {shlex.quote(str(self._start))}; echo rea''dy\r")
        self._until(b"ready")
        # What Tab has started reads no key before it has ended; but zsh does less where one waits.
        self._type(typed if self.name == "zsh" else f"{typed}\t")
        self._type("\x18")
        deadline = time.monotonic() + 60
        while self._process.poll() is None and time.monotonic() < deadline:
            self._read()
        return self._out.read_text().removesuffix("\n")

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        os.close(self._terminal)

    def _type(self, keys: str) -> None:
        os.write(self._terminal, keys.encode())

    def _until(self, said: bytes) -> None:
        shown = b""
        deadline = time.monotonic() + 60
        while said not in shown:
            assert time.monotonic() < deadline, shown
            shown += self._read()

    def _read(self) -> bytes:
        if not select.select([self._terminal], [], [], 0.05)[0]:
            return b""
        try:
            return os.read(self._terminal, 1 << 16)
        except OSError:  # it has ended
            return b""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The completions as `make install` writes them, and the command."""
    path = tmp_path_factory.mktemp("completion")
    for shell in SHELLS:
        line = ["/usr/bin/python3", ROOT / "packaging" / "completion.py", shell]
        (path / ("_qcow2snap" if shell == "zsh" else shell)).write_text(qemu.run(*line))
    command = path / "qcow2snap"
    command.write_text(
        f'#!/bin/sh\nPYTHONPATH={ROOT} exec {sys.executable} -m qcow2snap_core "$@"\n'
    )
    command.chmod(0o755)
    return path


NAMES = ("nightly", "weekly", "two words", "$(touch evil)", "at 10:30", "it's", "a=b", "-x")


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = qemu.create(tmp_path_factory.mktemp("image") / "a disk.qcow2", 1 << 20)
    for name in NAMES:
        qemu.take(path, name)
    return path


@pytest.fixture(params=SHELLS)
def shell(
    request: pytest.FixtureRequest, folder: Path, image: Path, tmp_path: Path
) -> Iterator[Shell]:
    (tmp_path / "disk.qcow2").symlink_to(image)
    (tmp_path / "a disk.qcow2").symlink_to(image)
    (tmp_path / "other").mkdir()
    shell = Shell(request.param, folder, tmp_path)
    yield shell
    shell.close()
    assert not (tmp_path / "evil").exists()


# What is typed, and the words of the line after Tab.
LINES: dict[str, list[str]] = {
    "ta": ["take"],
    "take --q": ["take", "--qmp"],
    "list --t": ["list", "--tree"],
    "help che": ["help", "check"],
    "list dis": ["list", "disk.qcow2"],
    "mount disk.qcow2 nightly oth": ["mount", "disk.qcow2", "nightly", "other/"],
    "mount disk.qcow2 oth": ["mount", "disk.qcow2", "other/"],
    "mount disk.qcow2 ni": ["mount", "disk.qcow2", "nightly"],
    "map --backing-format ra": ["map", "--backing-format", "raw"],
    "map disk.qcow2 ni": ["map", "disk.qcow2", "nightly"],
    "map --json a\\ disk.qcow2 ni": ["map", "--json", "a disk.qcow2", "nightly"],
    "map --allow-dir other disk.qcow2 ni": ["map", "--allow-dir", "other", "disk.qcow2", "nightly"],
    "map ~/disk.qcow2 ni": ["map", "HOME/disk.qcow2", "nightly"],
    "diff disk.qcow2 weekly ni": ["diff", "disk.qcow2", "weekly", "nightly"],
    "copy disk.qcow2 --since wee": ["copy", "disk.qcow2", "--since", "weekly"],
    "copy disk.qcow2 --since weekly ni": ["copy", "disk.qcow2", "--since", "weekly", "nightly"],
    "list disk.qcow2 --free tw": ["list", "disk.qcow2", "--free", "two words"],
    "serve disk.qcow2 ni": ["serve", "disk.qcow2", "nightly"],
    "map disk.qcow2 tw": ["map", "disk.qcow2", "two words"],
    "map disk.qcow2 at": ["map", "disk.qcow2", "at 10:30"],
    "map disk.qcow2 at\\ 10:": ["map", "disk.qcow2", "at 10:30"],
    "map disk.qcow2 it": ["map", "disk.qcow2", "it's"],
    "map disk.qcow2 a=": ["map", "disk.qcow2", "a=b"],
    "map disk.qcow2 \\$": ["map", "disk.qcow2", "$(touch evil)"],
    "map disk.qcow2 xyz": ["map", "disk.qcow2", "xyz"],
    "map missing ni": ["map", "missing", "ni"],
    "map disk.qcow2 nightly ni": ["map", "disk.qcow2", "nightly", "ni"],
}


@pytest.mark.parametrize("typed", LINES)
def test_tab_completes(shell: Shell, typed: str, tmp_path: Path) -> None:
    line = shell.completed(f"qcow2snap {typed}").replace("~", "HOME")
    assert shlex.split(line.removesuffix("=")) == ["qcow2snap", *LINES[typed]]


def test_several_snapshots_are_completed_one_after_the_other(shell: Shell) -> None:
    if shell.name == "fish":
        pytest.skip("fish completes whole words only")
    line = shell.completed("qcow2snap list disk.qcow2 --free weekly,ni")
    assert line.strip() == "qcow2snap list disk.qcow2 --free weekly,nightly"
