"""What a program left behind, as QEMU sees it: the oracle of all comparisons.

``qemu-img convert -l`` gives a snapshot the active disk's size, so each state is made the active
one of a copy: its L1 table and its size are put into the header.  The copies lie beside the image,
where the names of layers below still lead to them.
"""

from __future__ import annotations

import contextlib
import functools
import io
import json
import os
import random
import shutil
import subprocess
from argparse import ArgumentParser
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qcow2snap_core import cli
from qcow2snap_core.cli import copy as cli_copy
from qcow2snap_core.errors import ImageError
from qcow2snap_core.format.snapshots import Snapshot
from qcow2snap_core.image.disk import Disk
from qcow2snap_core.image.image import Image
from qcow2snap_core.image.opener import Options, open_image
from support import command, qemu, secret

from . import steps
from .program import Program, Step

_PATIENCE = 30  # seconds for a command of QEMU's
_INCOMPATIBLE = 72 + 7  # of the header: the low byte of the feature bits
_DIRTY = 1


class Different(Exception):
    """Something that this program says is not what QEMU says."""


class Hung(Exception):
    """QEMU does not come to an end: "amend -o refcount_bits" is one that may not, in 7.2."""


class Unavailable(Exception):
    """This machine, or this image, does not allow a comparison."""


class Unreadable(Unavailable):
    """QEMU has damaged the image so that it cannot read it itself, and neither can we."""


@dataclass(frozen=True)
class State:
    """A snapshot, or the active disk, as QEMU reads it."""

    snapshot: Snapshot | None
    path: Path  # an image whose active disk it is
    content: bytes
    map: list[dict[str, Any]]  # of qemu-img map

    @property
    def name(self) -> str:
        """What our commands are told."""
        return "@active" if self.snapshot is None else self.snapshot.id

    @property
    def size(self) -> int:
        return len(self.content)


class World:
    """A directory in which a program has run."""

    def __init__(self, program: Program, directory: Path) -> None:
        self.program = program
        self.directory = directory
        self.path = directory / "disk.qcow2"
        self.notes: Counter[str] = Counter()  # what is counted beside the program's features
        for step in program.steps:
            self._play(step)

    # --- Making it ---

    def _play(self, step: Step) -> None:
        if step[0] in steps.OWN:
            # QEMU may have refused to take the snapshot, or to make the image.
            with contextlib.suppress(KeyError, FileNotFoundError):
                steps.OWN[step[0]](*step[1:])
            return
        try:
            done = qemu.measured(lambda: self.run(*step))
        except subprocess.TimeoutExpired as e:
            raise Hung(str(e)) from e
        if done.returncode < 0:
            self.notes["steps that ended a tool of QEMU's by a signal"] += 1
        elif done.returncode:
            self.notes["steps that QEMU refused"] += 1

    def run(self, *line: object) -> subprocess.CompletedProcess[str]:
        """A tool, in the directory."""
        return subprocess.run(
            [str(x) for x in line],
            cwd=self.directory,
            capture_output=True,
            text=True,
            timeout=_PATIENCE,
            check=False,
            stdin=subprocess.DEVNULL,
        )

    # --- QEMU's answers ---

    @functools.cached_property
    def states(self) -> list[State]:
        """The snapshots in the table's order, then the active disk."""
        with self.open() as image:
            snapshots: list[Snapshot | None] = list(image.snapshots)
        return [self._state(s) for s in [*snapshots, None]]

    def _state(self, snapshot: Snapshot | None) -> State:
        name = "active" if snapshot is None else snapshot.id
        copy = self.directory / f"state-{name}"
        shutil.copyfile(self.path, copy)
        if snapshot is not None:
            qemu.activate(copy, snapshot, snapshot.disk_size)
        try:
            content = self.original(copy)
        except Unreadable:
            self._read_in_vain(snapshot)
            raise
        return State(snapshot, copy, content, self.map(copy))

    def _read_in_vain(self, snapshot: Snapshot | None) -> None:
        """Raises Different when we read what QEMU cannot."""
        with self.open() as image:
            disk = image.active_disk() if snapshot is None else image.disk(snapshot)
            try:
                disk.pread(disk.size, 0)
            except ImageError:
                return
        raise Different("QEMU cannot read all of a state, and we can")

    @functools.cached_property
    def secrets(self) -> list[str | None]:
        return self.program.secrets

    def content(self, path: Path, secrets: secret.Secrets | None = None) -> bytes:
        """What qemu-img reads."""
        return secret.content(path, self.secrets if secrets is None else secrets)

    def original(self, path: Path, secrets: secret.Secrets | None = None) -> bytes:
        """The same of an image that QEMU itself made.  Raises Unreadable."""
        try:
            return self.content(path, secrets)
        except AssertionError as e:
            if "Input/output error" in str(e):
                raise Unreadable(str(e)) from e
            raise

    def vm_state(self, path: Path, s: Snapshot, secrets: secret.Secrets | None = None) -> bytes:
        """What QEMU reads behind the disk when it is made larger."""
        copy = self.directory / "vm-state"
        with open_image(str(path), Options(data=False, layers=False)) as image:
            per_l1_entry = image.disk(s).tables.bytes_per_l1_entry
        base = -(-s.disk_size // per_l1_entry) * per_l1_entry
        shutil.copyfile(path, copy)
        qemu.activate(copy, s, base + s.vm_state_size)
        found = self.part(copy, base, s.vm_state_size, secrets)
        copy.unlink()
        return found

    def part(
        self, path: Path, offset: int, length: int, secrets: secret.Secrets | None = None
    ) -> bytes:
        """What qemu-img reads there; the rest may be too large to be read."""
        secrets = self.secrets if secrets is None else secrets
        where = f"driver=raw,offset={offset},size={length},file.driver=qcow2,"
        where += f"file.file.driver=file,file.file.filename={path}"
        for n, s in enumerate(secrets):
            if s is not None:
                where += f",file.{'backing.' * n}encrypt.key-secret=s{n}"
        out = path.with_name("part")
        objects = secret.objects(secrets)
        qemu.run("qemu-img", "convert", *objects, "-O", "raw", "--image-opts", where, out)
        return out.read_bytes()

    def map(self, path: Path) -> list[dict[str, Any]]:
        return json.loads(self.qemu_img(path, "map", "--output=json"))

    def qemu_img(self, path: Path, *arguments: str) -> str:
        """qemu-img on an image of the chain's kind, which must succeed."""
        opened = [*secret.objects(self.secrets), *secret.opened(path, self.secrets)]
        return qemu.run("qemu-img", *arguments, *opened)

    def check(self, path: Path, *repair: str) -> dict[str, Any]:
        """qemu-img check: how many "corruptions", "leaks" and "check-errors"."""
        line = ["qemu-img", "check", *repair, "--output=json", *secret.objects(self.secrets)]
        done = self.run(*line, *secret.opened(path, self.secrets))
        if done.returncode not in (0, 2, 3):
            raise Unavailable(f"qemu-img check: {done.stderr}")
        found = {"corruptions": 0, "leaks": 0, "check-errors": 0, **json.loads(done.stdout)}
        return {**found, "said": done.stderr}

    @functools.cached_property
    def chain(self) -> list[tuple[Path, str]]:
        """The layers' files and formats, from the top down, as the images name them now."""
        found = [(self.path, "qcow2")]
        while found[-1][1] == "qcow2":
            said = qemu.info(found[-1][0])
            if "backing-filename" not in said:
                break
            path = self.directory / said["backing-filename"]
            found.append((path, said["backing-filename-format"]))
        return found

    @property
    def alone(self) -> bool:
        """Whether the image needs no other file."""
        return len(self.chain) == 1 and not self.program.layers[0].has_data_file

    @property
    def encrypted(self) -> bool:
        return any(self.secrets[: len(self.chain)])

    @functools.cached_property
    def dirty(self) -> bool:
        """Whether QEMU was killed with refcounts that it had not written."""
        return bool(qemu.peek(self.path, _INCOMPATIBLE, 1)[0] & _DIRTY)

    # --- Ours ---

    def options(self, rng: random.Random | None = None) -> Options:
        cache = {} if rng is None else {"l2_cache_size": rng.choice((4096, 100_000, 32 << 20))}
        secrets = enumerate(self.secrets[: len(self.chain)])
        return Options(
            allow_dirs=(str(self.directory),),
            passphrases={n: s.encode() for n, s in secrets if s is not None},
            **cache,
        )

    def open(self, path: object = None, rng: random.Random | None = None) -> Image:
        return open_image(str(path or self.path), self.options(rng))

    def disk(self, image: Image, state: State) -> Disk:
        if state.snapshot is None:
            return image.active_disk()
        return image.snapshot(state.snapshot.id)

    @property
    def keys(self) -> list[str]:
        """The options with which our commands open the image."""
        found = ["--allow-dir", str(self.directory)]
        for n, s in enumerate(self.secrets[: len(self.chain)]):
            if s is not None:
                found += [f"--passphrase.{n}" if n else "--passphrase", s]
        return found

    def command(self, *arguments: object, statuses: tuple[int, ...] = (0,)) -> tuple[int, str]:
        """One of our commands: its status, one of those, and what it printed."""
        line = [str(a) for a in arguments]
        if self.program.seed % 10 == 0:
            self.notes["commands in processes of their own"] += 1
            done = command.run(*line)
            status, out, err = done.returncode, done.stdout, done.stderr
        else:
            with (
                contextlib.redirect_stdout(io.StringIO()) as stdout,
                contextlib.redirect_stderr(io.StringIO()) as stderr,
            ):
                status = cli.main(line)
            out, err = stdout.getvalue(), stderr.getvalue()
        if status not in statuses:
            raise Different(f"qcow2snap {' '.join(line)} ends with {status}: {err.strip()}")
        return status, out

    def json(self, *arguments: object) -> list[dict[str, Any]]:
        return json.loads(self.command(*arguments, "--json", *self.keys)[1])


def same(what: str, ours: bytes, theirs: bytes) -> None:
    """Raises Different that names the first byte."""
    if ours == theirs:
        return
    if len(ours) != len(theirs):
        raise Different(f"{what}: {len(ours)} bytes, and {len(theirs)} by QEMU")
    at = next(i for i, (a, b) in enumerate(zip(ours, theirs, strict=True)) if a != b)
    wrong = sum(a != b for a, b in zip(ours, theirs, strict=True))
    raise Different(
        f"{what}: byte {at:#x} is {ours[at]:#04x}, and {theirs[at]:#04x} by QEMU ({wrong} differ)"
    )


@functools.cache
def trust_base() -> list[str]:
    """What ``copy --since`` wants for a target that it did not write itself."""
    parser = ArgumentParser()
    cli_copy.arguments(parser)
    return ["--trust-base"] if "--trust-base" in parser.format_help() else []


def remove(path: Path) -> None:
    """A file or a directory, or nothing."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)
