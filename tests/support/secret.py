"""QEMU's tools on images that may be encrypted, and whose layers may be.

As in :mod:`.qemu`, every answer is the real program's; ``secrets`` are the passphrases of an
image and of the layers below it, from the top down, None for one that has none.
"""

from __future__ import annotations

import hashlib
import json
import random
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from . import qemu
from .server import ROOT

Secrets = Sequence[str | None]

NOT_ENCRYPTED: Secrets = ()

IMAGES = ROOT / "build" / "images"


def objects(secrets: Secrets) -> list[str]:
    """The options that tell a tool the secrets; they are called s0, s1 ..."""
    given = [(i, s) for i, s in enumerate(secrets) if s is not None]
    return [x for i, s in given for x in ("--object", f"secret,id=s{i},data={s}")]


def opened(path: Path, secrets: Secrets) -> list[str]:
    """The arguments that open an image with its secrets."""
    where = f"driver=qcow2,file.filename={path}"
    for i, secret in enumerate(secrets):
        if secret is not None:
            where += f",{'backing.' * i}encrypt.key-secret=s{i}"
    return ["--image-opts", where]


def create(
    path: Path,
    size: int | None,
    secrets: Secrets,
    *,
    backing: tuple[object, str] | None = None,
    **options: object,
) -> None:
    """qemu-img create; of LUKS images a copy of one that it made with the same words before."""
    if options.get("encrypt.format"):
        options = {**options, "encrypt.key-secret": "s0"}
        if options["encrypt.format"] == "luks":
            options["encrypt.iter-time"] = 10
    pairs = ",".join(f"{k}={v}" for k, v in options.items())
    command = ["qemu-img", "create", "-q", *objects(secrets), "-f", "qcow2"]
    command += ["-o", pairs] if pairs else []
    if backing is not None:
        # -u: the format is known, and a layer with a secret could not be opened.
        command += ["-u", "-b", str(backing[0]), "-F", backing[1]]
    end = [] if size is None else [str(size)]
    if options.get("encrypt.format") == "luks" and "data_file" not in options:
        shutil.copyfile(_made(command, end), path)
    else:
        _run([*command, str(path), *end])


def _made(command: list[str], end: list[str]) -> Path:
    """An empty LUKS image, which is never written to.  QEMU measures for two seconds how fast
    PBKDF2 is, whatever is asked of it; so they are kept, for all processes and runs in this
    checkout."""
    words = "\0".join([_version(), *command, *end])
    made = IMAGES / f"{hashlib.sha256(words.encode()).hexdigest()}.qcow2"
    if not made.exists():
        IMAGES.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=IMAGES) as folder:
            part = Path(folder, made.name)
            _run([*command, str(part), *end])
            part.rename(made)
    return made


@cache
def _version() -> str:
    return qemu.run("qemu-img", "--version")


def _run(command: list[str]) -> None:
    done = qemu.measured(
        lambda: subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    )
    if done.returncode:
        raise Refused(done.stderr.strip())


class Refused(Exception):
    """What QEMU said when it would not make an image."""


def io(path: Path, secrets: Secrets, *commands: str) -> None:
    said = qemu.run(
        "qemu-io",
        *objects(secrets),
        *(x for c in commands for x in ("-c", c)),
        *opened(path, secrets),
    )
    assert "failed" not in said, said
    assert "rror" not in said, said


def take(path: Path, secrets: Secrets, name: str) -> None:
    qemu.run("qemu-img", "snapshot", *objects(secrets), "-c", name, *opened(path, secrets))


def content(path: Path, secrets: Secrets, snapshot: str | None = None) -> bytes:
    """The whole content of a snapshot or of the active disk, by qemu-img convert."""
    out = path.with_name(path.name + ".oracle")
    pick = [] if snapshot is None else ["-l", f"snapshot.name={snapshot}"]
    where = opened(path, secrets)
    qemu.run("qemu-img", "convert", *objects(secrets), *pick, "-O", "raw", *where, out)
    try:
        return out.read_bytes()
    finally:
        out.unlink()


def extents(path: Path, secrets: Secrets) -> list[tuple[int, int, int]]:
    """qemu-img map of the active disk, as :func:`.qemu.extents`."""
    where = opened(path, secrets)
    said = qemu.run("qemu-img", "map", *objects(secrets), "--output=json", *where)
    return merged((e["start"], e["length"], qemu.allocation(e)) for e in json.loads(said))


def snapshot_extents(path: Path, secrets: Secrets, snapshot: str) -> list[tuple[int, int, int]]:
    """The same of a snapshot."""
    copy = qemu.as_active(path, snapshot)
    try:
        return extents(copy, secrets)
    finally:
        copy.unlink()


def merged(pieces: object) -> list[tuple[int, int, int]]:
    found: list[tuple[int, int, int]] = []
    for start, length, kind in pieces:  # type: ignore[attr-defined]
        if found and found[-1][2] == kind:
            found[-1] = (found[-1][0], found[-1][1] + length, kind)
        else:
            found.append((start, length, kind))
    return found


def play(
    path: Path,
    secrets: Secrets,
    seed: int,
    size: int,
    *,
    cluster: int = 65536,
    compressed: bool = False,
) -> None:
    """One round of seeded changes: data, zeros with and without unmap, discards; before them
    compressed clusters, if nothing was written yet (QEMU compresses over unallocated ones only).
    """
    rng = random.Random(seed)
    noise = path.with_name(path.name + ".noise")
    noise.write_bytes(rng.randbytes(100_003).hex().encode()[:100_003])  # half of it compresses

    def some(grain: int = 512) -> str:
        start = rng.randrange(-(-size // grain)) * grain
        most = max(grain, 96 << 10)
        return f"{start} {min(size - start, rng.randrange(grain, most + 1, grain))}"

    commands = [f"write -P {rng.randrange(1, 256)} {some()}" for _ in range(5)]
    commands += [f"write -s {noise} {some()}" for _ in range(4)]
    commands += [f"write -z {some()}", f"write -z -u {some(cluster)}", f"discard {some(cluster)}"]
    rng.shuffle(commands)
    if compressed:
        starts = {rng.randrange(size // cluster) * cluster for _ in range(8)}
        commands[:0] = [f"write -c -s {noise} {start} {cluster}" for start in sorted(starts)]
    io(path, secrets, *commands)
    noise.unlink()
