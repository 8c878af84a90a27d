"""The nbdkit command line that serves an image with the plugin of this package."""

from __future__ import annotations

import fcntl
import os
import subprocess
from pathlib import Path

from ..errors import UsageError, escaped
from ..format.snapshots import Snapshot
from ..image.image import Image
from ..image.opener import Options

# Servers are handed their sockets as descriptors from 3 on; a passphrase has to stay clear of them.
_FIRST_DESCRIPTOR = 10


_IN_CHECKOUT = Path(__file__).resolve().parents[2] / "plugin" / "qcow2snap.py"
_INSTALLED = "nbdkit-qcow2snap-plugin"


def nbdkit(*options: str) -> list[str]:
    """The command up to the plugin: by its path in a checkout, by its name when installed."""
    return _with(_IN_CHECKOUT if _IN_CHECKOUT.exists() else None, options)


def nbdkit_to_run(*options: str) -> list[str]:
    """The same, but always by its path.

    Where it was installed without a compiler it is a script.  For one nbdkit starts itself anew,
    and forgets a socket that it was handed (systemd's, nbdfuse's), unless its Python plugin is
    told which script to run.  Raises UsageError when there is no nbdkit.
    """
    return _with(_IN_CHECKOUT if _IN_CHECKOUT.exists() else _installed(), options)


def _with(plugin: Path | None, options: tuple[str, ...]) -> list[str]:
    if plugin is None:
        return ["nbdkit", *options, "qcow2snap"]
    python = [] if plugin.suffix == ".so" else ["python"]
    return ["nbdkit", *options, *python, str(plugin)]


def _installed() -> Path | None:
    """Where ``make install`` or a package put it; without either nbdkit says what it misses."""
    for line in _says("--dump-config"):
        key, _, value = line.partition("=")
        if key == "plugindir":
            for name in (f"{_INSTALLED}.so", _INSTALLED):
                if (found := Path(value, name)).exists():
                    return found
    return None


def _says(option: str) -> list[str]:
    """The lines that nbdkit prints about itself; none if it does not know the option.  Raises
    UsageError when there is no nbdkit."""
    try:
        done = subprocess.run(["nbdkit", option], capture_output=True, check=False)
    except FileNotFoundError:
        raise _no_nbdkit() from None
    return [] if done.returncode else os.fsdecode(done.stdout).splitlines()


def keys(image: Image, snapshot: Snapshot, descriptors: list[int]) -> list[str]:
    """The plugin's keys for a snapshot of an open image.

    Its passphrases go into files without a name, where ``ps`` does not show them; the descriptors
    to inherit are appended to ``descriptors``, and whoever calls closes them.
    Raises UsageError for a passphrase that cannot be handed over.
    """
    options = image.options
    found = [f"file={image.storage.absolute}"]
    # Of a word with a NUL it cannot be told; the other one is what the user chose it by.
    words = {"snapshot-id": snapshot.id, "snapshot-name": snapshot.name}
    found += [f"{key}={word}" for key, word in words.items() if word and "\0" not in word]
    found += [f"allow-dir={os.path.abspath(d)}" for d in options.allow_dirs]
    found += [f"allow-file={os.path.abspath(f)}" for f in options.allow_files]
    if options.backing_format is not None:
        found.append(f"backing-format={options.backing_format}")
    if options.remote_timeout != Options().remote_timeout:
        found.append(f"remote-timeout={options.remote_timeout:g}")
    for layer, passphrase in options.passphrases.items():
        key = f"passphrase.{layer}" if layer else "passphrase"
        if b"\n" in passphrase:
            raise UsageError(f"--{key} holds a line feed: nbdkit reads one line only")
        descriptors.append(_file_with(passphrase))
        found.append(f"{key}=-{descriptors[-1]}")
    return found


def check_options(arguments: list[str]) -> None:
    """Raises UsageError for a long option that nbdkit does not have.

    It would print a page, and the option whole: of --passphrase=SECRET the secret as well.
    """
    given = [a.partition("=")[0] for a in arguments if a.startswith("--") and a != "--"]
    known = _says("--long-options") if given else []
    for name in given:
        if known and not any(option.startswith(name) for option in known):
            raise UsageError(
                f"nbdkit has no option {escaped(name)}: what the plugin is told is KEY=VALUE, "
                f"such as passphrase=+FILE"
            )


def execute(arguments: list[str]) -> None:
    """Become nbdkit.  Raises UsageError when there is none."""
    try:
        os.execvp(arguments[0], arguments)
    except FileNotFoundError:
        raise _no_nbdkit() from None


def _no_nbdkit() -> UsageError:
    return missing("nbdkit", "nbdkit and nbdkit-plugin-python")


def missing(tool: str, packages: str) -> UsageError:
    return UsageError(f"{tool} is missing: install {packages}")


def _file_with(content: bytes) -> int:
    """A descriptor of a file in memory.  A pipe takes no more than its capacity before somebody
    reads, and may be given a part of it only when a signal comes."""
    fd = os.memfd_create("qcow2snap")
    with open(fd, "wb") as f:
        f.write(content)
        f.seek(0)
        return fcntl.fcntl(fd, fcntl.F_DUPFD, _FIRST_DESCRIPTOR)
