"""Images of which a few fields were changed at random, and QEMU's word on each.

What is changed is known by its structure: a header field, a field of the snapshot's entry, an L1
or L2 entry, a compressed stream, the file's length.  Random bytes anywhere would nearly all land
in data.  The judgement: where we give bytes and QEMU can read them as well, they are the same;
everything else is one of our errors.

    python3 tests/support/mutants.py 20000      as many, with a report at the end
"""

from __future__ import annotations

import random
import struct
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).resolve().parents[n]) for n in (1, 2)]

from qcow2snap_core.errors import Error, ImageError, StorageError
from qcow2snap_core.image.disk import Disk
from qcow2snap_core.image.opener import open_image
from support import catalogue, damage, qemu

KINDS = ("plain", "v2", "zstd", "extl2", "overlay")
STEP = 1024  # read at a time
MOST = 1 << 18  # bytes of a disk that are compared


class Wrong(Exception):
    """A mutant that gave other bytes than QEMU, or extents that its bytes belie."""


@dataclass
class Seed:
    """An image to make mutants of, and where its structures are."""

    path: Path
    content: bytes
    fields: list[tuple[str, int, int]]  # (what, offset, width in bytes)

    @classmethod
    def make(cls, directory: Path, kind: str) -> Seed:
        path = catalogue.make(directory, kind)
        snapshot = qemu.snapshots(path)["BAD"]
        fields = [("header", at, 4) for at in range(4, 112, 4)]
        fields += [("header", at, 1) for at in (72, 79, 104)]
        fields += [("extension", at, 4) for at in range(104, 256, 4)]
        entry = snapshot.entry_offset
        fields += [("entry", entry + at, 4) for at in range(0, 64, 4)]
        l1 = snapshot.l1_table_offset
        fields += [("l1", l1 + 8 * n, 8) for n in range(snapshot.l1_size)] * 10
        for n in range(snapshot.l1_size):
            table = qemu.field64(path, l1 + 8 * n) & damage.OFFSET
            fields += [("l2", table + 8 * m, 8) for m in range(128)]
        if kind != "extl2":
            for cluster in range(8):
                at, sectors = damage.stream(path, "BAD", cluster * catalogue.CLUSTER)
                fields += [("stream", at + n, 1) for n in range(0, sectors * 512, 16)]
        return cls(path, path.read_bytes(), fields)

    def mutant(self, rng: random.Random) -> tuple[bytes, str]:
        """One to three changes, and what they were."""
        data = bytearray(self.content)
        said = []
        for _ in range(rng.choice((1, 1, 1, 2, 3))):
            kinds = [*sorted({what for what, _, _ in self.fields}), "length"]
            kind = rng.choice(kinds)
            if kind == "length":
                keep = rng.randrange(512, len(self.content))
                del data[keep:]
                said.append(f"cut to {keep}")
                continue
            _, at, width = rng.choice([f for f in self.fields if f[0] == kind])
            if at + width > len(data):
                continue
            old = int.from_bytes(data[at : at + width], "big")
            new = self._value(rng, old, width) & (1 << 8 * width) - 1
            data[at : at + width] = new.to_bytes(width, "big")
            said.append(f"{kind} at {at:#x}: {old:#x} -> {new:#x}")
        return bytes(data), "; ".join(said)

    def _value(self, rng: random.Random, old: int, width: int) -> int:
        top = 1 << 8 * width
        another = rng.choice(self.fields)
        choices = (
            *(0, 1, top - 1, top >> 1, old + 1, old - 1),
            old ^ 1 << rng.randrange(8 * width),
            old ^ 1 << rng.randrange(8 * width),
            rng.randrange(top),
            rng.randrange(len(self.content)) & -1024,
            len(self.content) & -1024,
            int.from_bytes(self.content[another[1] : another[1] + width], "big"),
        )
        return rng.choice(choices)


def judge(path: Path) -> str:
    """What came of a mutant: "refused", "closed", "served" or "part".  Raises Wrong, or whatever
    our code should not have raised."""
    try:
        image = open_image(str(path))
    except Error as e:
        return check_line(e, "refused")
    with image:
        try:
            snapshot = next((s for s in image.snapshots if s.name == "BAD"), None)
            if snapshot is None:
                return "closed"
            disk = image.disk(snapshot)
        except Error as e:
            return check_line(e, "closed")
        chunks = list(read(disk))
    if not chunks:
        return "served"
    said = qemus(path, snapshot, sum(n for n, _ in chunks))
    at = 0
    for length, ours in chunks:
        if ours is not None and said is not None and ours != said[at : at + length]:
            sure = qemus(path, snapshot, length, at, salvage=False)
            if sure is not None and sure != ours:
                raise Wrong(f"other bytes than QEMU's at {at:#x}")
        at += length
    return "part" if any(ours is None for _, ours in chunks) else "served"


def check_line(error: Error, outcome: str) -> str:
    line = str(error)
    if not line.isprintable() or len(line) > 20_000:
        raise Wrong(f"not a line: {line[:500]!r}")
    return outcome


def read(disk: Disk) -> Iterator[tuple[int, bytes | None]]:
    """The start of the disk in pieces; None for one that could not be read."""
    for at in range(0, min(disk.size, MOST), STEP):
        length = min(STEP, disk.size - at)
        try:
            data = disk.pread(length, at)
        except (ImageError, StorageError) as e:
            check_line(e, "")
            yield length, None
            continue
        end = at
        for extent in disk.extents(at, length):  # what can be read has extents
            if extent.offset != end:
                raise Wrong(f"extents with a gap at {end:#x}")
            end += extent.length
            if extent.type and any(data[extent.offset - at : end - at]):
                raise Wrong(f"data in a hole at {extent.offset:#x}")
        yield length, data


def qemus(path: Path, snapshot, length: int, offset: int = 0, *, salvage: bool = True):
    """The bytes that QEMU reads, zeros where it cannot; None if it cannot open it at all."""
    copy = path.with_name("active.qcow2")
    copy.write_bytes(path.read_bytes())
    qemu.patch(copy, 24, struct.pack(">Q", snapshot.disk_size))
    qemu.patch(copy, 36, struct.pack(">IQ", snapshot.l1_size, snapshot.l1_table_offset))
    out = path.with_name("oracle")
    source = (
        f"driver=raw,offset={offset},size={length},file.driver=qcow2,"
        f"file.file.driver=file,file.file.filename={copy}"
    )
    command = ["qemu-img", "convert", "-O", "raw", *["--salvage"] * salvage, "--image-opts"]
    try:
        done = subprocess.run(
            [*command, source, str(out)], capture_output=True, timeout=20, check=False
        )
    except subprocess.TimeoutExpired:
        return None
    if done.returncode:
        return None
    return out.read_bytes().ljust(length, b"\0")


def mutants(directory: Path, kind: str, numbers: range) -> Iterator[tuple[Path, str]]:
    """The mutants of a kind with these numbers, one at a time, always the same ones."""
    seed = Seed.make(directory, kind)
    path = directory / "mutant.qcow2"
    for number in numbers:
        data, what = seed.mutant(random.Random(f"{kind} {number}"))
        path.write_bytes(data)
        yield path, f"{kind} {number}: {what}"


def main(count: int) -> int:
    outcomes: Counter[str] = Counter()
    slowest = (0.0, "")
    for kind in KINDS:
        with tempfile.TemporaryDirectory() as directory:
            for path, what in mutants(Path(directory), kind, range(count // len(KINDS))):
                start = time.thread_time()
                try:
                    outcome = judge(path)
                except Wrong as e:
                    outcome = "WRONG"
                    print(f"{what}: {e}", flush=True)
                except Exception:  # noqa: BLE001 (this is what it looks for)
                    outcome = "CRASH"
                    print(f"{what}: {traceback.format_exc()}", flush=True)
                slowest = max(slowest, (time.thread_time() - start, what))
                outcomes[outcome] += 1
    print(", ".join(f"{n} {outcome}" for outcome, n in outcomes.most_common()))
    print(f"the slowest took {slowest[0]:.2f} s of CPU: {slowest[1]}")
    return 1 if outcomes["WRONG"] or outcomes["CRASH"] else 0


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1])))
