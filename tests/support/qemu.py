"""Images made by QEMU's own tools, and QEMU's own answers about them.

Every function runs the real program; nothing here knows the qcow2 format but for :func:`patch`
and :func:`as_active`, which change single fields of an image that QEMU made.
"""

from __future__ import annotations

import json
import random
import shutil
import struct
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qcow2snap_core.format.header import read_header
from qcow2snap_core.format.snapshot_table import read_table
from qcow2snap_core.format.snapshots import Snapshot
from qcow2snap_core.storage.local import open_storage

KiB, MiB, GiB = 1 << 10, 1 << 20, 1 << 30


def measured(
    once: Callable[[], subprocess.CompletedProcess[str]],
) -> subprocess.CompletedProcess[str]:
    """How a tool ended that can be run again.  QEMU 7.2 cannot always measure how fast PBKDF2 is on
    a busy machine; it is tried again a little later each time, since ten tries at once have failed
    together."""
    for attempt in range(10):
        time.sleep(0.1 * attempt)
        done = once()
        if "Unable to get accurate CPU usage" not in done.stderr:
            break
    return done


def run(*command: object, **kwargs: Any) -> str:
    """The standard output of a command that must succeed."""
    done = measured(
        lambda: subprocess.run(
            [str(c) for c in command],
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
            **kwargs,
        )
    )
    assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
    return done.stdout


def create(
    path: Path,
    size: int | None,
    *,
    backing: tuple[object, str] | None = None,
    **options: object,
) -> Path:
    """qemu-img create; options as of ``-o``; ``backing`` is (name, format)."""
    command: list[object] = ["qemu-img", "create", "-q", "-f", "qcow2"]
    if options:
        command += ["-o", ",".join(f"{k}={v}" for k, v in options.items())]
    if backing is not None:
        command += ["-b", backing[0], "-F", backing[1]]
    command.append(path.name)
    if size is not None:
        command.append(size)
    run(*command, cwd=path.parent)
    return path


def io(path: Path, *commands: str, fmt: str = "qcow2") -> str:
    """qemu-io with some commands, which must all succeed."""
    said = run("qemu-io", "-f", fmt, *(x for c in commands for x in ("-c", c)), path)
    assert "failed" not in said, said
    assert "rror" not in said, said
    return said


def take(path: Path, name: str) -> None:
    run("qemu-img", "snapshot", "-c", name, path)


def delete(path: Path, name: str) -> None:
    run("qemu-img", "snapshot", "-d", name, path)


def info(path: Path) -> dict[str, Any]:
    """qemu-img info as it prints it for programs."""
    return json.loads(run("qemu-img", "info", "-U", "--output=json", path))


def content(path: Path, snapshot: str | None = None, *, by: str = "name") -> bytes:
    """The whole content, by qemu-img convert; of an internal snapshot if one is given.

    qemu-img gives a snapshot the active disk's size: use :func:`snapshot_content` when it
    was resized.
    """
    out = path.with_name(path.name + ".oracle")
    pick = [] if snapshot is None else ["-l", f"snapshot.{by}={snapshot}"]
    run("qemu-img", "convert", "-U", "-O", "raw", *pick, path, out)
    try:
        return out.read_bytes()
    finally:
        out.unlink()


def patch(path: Path, offset: int, data: bytes) -> None:
    """Overwrite some bytes of a file."""
    with open(path, "r+b") as f:
        f.seek(offset)
        f.write(data)


def peek(path: Path, offset: int, length: int) -> bytes:
    """Some bytes of a file."""
    with open(path, "rb") as f:
        f.seek(offset)
        return f.read(length)


def field64(path: Path, offset: int) -> int:
    """A big-endian 64-bit field of a file."""
    return int.from_bytes(peek(path, offset, 8), "big")


def snapshots(path: Path) -> dict[str, Snapshot]:
    """The snapshots by name, as our own parser sees them (test_snapshots holds it to QEMU)."""
    storage = open_storage(str(path))
    try:
        return {s.name: s for s in read_table(storage).snapshots}
    finally:
        storage.close()


def as_active(path: Path, snapshot: str, *, vm_state: bool = False) -> Path:
    """A copy whose active disk is the snapshot: its L1 and its size put into the header.

    This is the oracle for a snapshot that was taken before a resize, and for VM state.
    """
    copy = path.with_name(f"{path.name}.{snapshot}.active".replace("/", "_"))
    shutil.copyfile(path, copy)
    s = snapshots(path)[snapshot]
    size = s.disk_size
    if vm_state:
        storage = open_storage(str(path))
        header = read_header(storage)
        storage.close()
        per_l1 = header.cluster_size * (header.cluster_size // (16 if header.extended_l2 else 8))
        size = -(-size // per_l1) * per_l1 + -(-s.vm_state_size // 512) * 512
    activate(copy, s, size)
    return copy


def activate(path: Path, s: Snapshot, size: int) -> None:
    """Make a snapshot the active disk, of that size, by changing the header alone."""
    patch(path, 24, struct.pack(">Q", size))
    patch(path, 36, struct.pack(">IQ", s.l1_size, s.l1_table_offset))


def snapshot_content(path: Path, snapshot: str) -> bytes:
    """The content of a snapshot at its own size, by qemu-img."""
    copy = as_active(path, snapshot)
    try:
        return content(copy)
    finally:
        copy.unlink()


def extents(path: Path) -> list[tuple[int, int, int]]:
    """qemu-img map as (offset, length, type), with the types of base:allocation, merged."""
    found: list[tuple[int, int, int]] = []
    for e in json.loads(run("qemu-img", "map", "-U", "--output=json", path)):
        kind = allocation(e)
        if found and found[-1][2] == kind:
            found[-1] = (found[-1][0], found[-1][1] + e["length"], kind)
        else:
            found.append((e["start"], e["length"], kind))
    return found


def allocation(e: dict[str, Any]) -> int:
    """The type of an entry of qemu-img map.  A data cluster that is a hole in the file is both data
    and zero, if QEMU takes the image for a preallocated one; tmpfs makes such files."""
    return 3 if e["zero"] and not e["data"] else 0


@dataclass
class RandomImage:
    """Seeded random writes, zero-writes and discards, with snapshots in between.

    Half of the data is noise from files, so that no two bytes of a cluster can be exchanged
    unseen; it is made of 16 values, and so compresses to about half.
    """

    path: Path
    seed: int
    size: int = 4 * MiB
    grain: int = 512
    options: dict[str, object] = field(default_factory=dict)
    backing: tuple[object, str] | None = None
    compressed: bool = False
    fmt: str = "qcow2"

    def make(self, names: list[str] | None = None, operations: int = 12) -> list[str]:
        """Create the image; returns the names of its snapshots, oldest first."""
        rng = random.Random(self.seed)
        names = ["one", "two", "three"] if names is None else names
        if self.fmt == "raw":
            with open(self.path, "wb") as f:
                f.truncate(self.size)
        else:
            create(self.path, self.size, backing=self.backing, **self.options)
        for i in range(self._NOISES):
            length = 1 + rng.randrange(256 * KiB)  # odd, mostly: io repeats it at any offset
            self._noise(i).write_bytes(rng.randbytes(length).hex().encode()[:length])
        for name in names:
            self.play(rng, operations)
            take(self.path, name)
        self.play(rng, operations)
        for i in range(self._NOISES):
            self._noise(i).unlink()
        return names

    def play(self, rng: random.Random, operations: int) -> None:
        """One round of random changes to the active disk."""
        count = operations // 2 if self.compressed else 0
        # QEMU compresses over unallocated clusters only.  And it packs streams into a cluster
        # even after that was freed meanwhile (7.2), so nothing else happens between them.
        clusters = {self._whole_cluster(rng) for _ in range(count)}
        commands = [f"discard {c}" for c in sorted(clusters)]
        commands += [f"write -c {self._data(rng)} {c}" for c in sorted(clusters)]
        commands += [self._command(rng) for _ in range(operations - count)]
        io(self.path, *commands, fmt=self.fmt)

    _NOISES = 3

    def _noise(self, i: int) -> Path:
        return self.path.with_name(f"{self.path.name}.noise{i}")

    def _command(self, rng: random.Random) -> str:
        grains = self.size // self.grain
        start = rng.randrange(grains)
        count = min(grains - start, 1 + int(rng.expovariate(1 / (64 * KiB / self.grain))))
        where = f"{start * self.grain} {count * self.grain}"
        kind = rng.random()
        if kind < 0.65:
            return f"write {self._data(rng)} {where}"
        if kind < 0.7:
            return f"write -z -u {self._whole_cluster(rng)}"
        if kind < 0.8:
            return f"write -z {where}"
        if kind < 0.9:
            return f"write -z -u {where}"
        return f"discard {where}"

    def _data(self, rng: random.Random) -> str:
        if rng.random() < 0.5:
            return f"-P {rng.randrange(1, 256)}"
        return f"-s {self._noise(rng.randrange(self._NOISES))}"

    def _whole_cluster(self, rng: random.Random) -> str:
        """One cluster, or what the disk's end leaves of it."""
        cluster = int(str(self.options.get("cluster_size", 64 * KiB)))
        start = rng.randrange(-(-self.size // cluster)) * cluster
        return f"{start} {min(cluster, self.size - start)}"


def assert_same_snapshots(path: Path, other: Path) -> None:
    """An image is without damage, and has the snapshots of the other: all that QEMU says of them,
    and every byte."""
    run("qemu-img", "check", "-q", path)
    assert info(path)["snapshots"] == info(other)["snapshots"]
    ours, theirs = snapshots(path), snapshots(other)
    assert [s.disk_size for s in ours.values()] == [s.disk_size for s in theirs.values()]
    for name in theirs:
        assert snapshot_content(path, name) == snapshot_content(other, name)
