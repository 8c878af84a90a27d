"""Our own classes as readers of such an image, and what must be true of whatever they say."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from itertools import combinations
from types import SimpleNamespace
from typing import Final, NamedTuple
from unittest.mock import patch

from qcow2snap_core.errors import Error, SnapshotGone
from qcow2snap_core.format import snapshot_table
from qcow2snap_core.format.snapshots import Identity, Snapshot
from qcow2snap_core.image import guard, opener
from qcow2snap_core.image.disk import Disk
from qcow2snap_core.image.extents import HOLE_ZERO

from .memory import AtRandom, Memory, Script
from .writes import CLUSTER, GUEST, NAMES, SIZE, Command, Qemu, Write, do, some

MOST_READS = 60


class Violation(Exception):
    """Wrong bytes, or a snapshot that is there and was not read."""


def identity(s: Snapshot) -> Identity:
    """Whatever a guard with something left out takes for it."""
    times = s.date_sec, s.date_nsec, s.vm_clock_nsec
    return Identity(s.id, s.name, *times, s.l1_table_offset, s.l1_size)


@contextmanager
def installed(memory: Memory) -> Iterator[None]:
    """The image opens as a file, and a pause of ours is one in which QEMU goes on."""
    clock = SimpleNamespace(**vars(time) | {"sleep": memory.sleep, "thread_time": lambda: 0.0})
    with ExitStack() as stack:
        for module in (guard, snapshot_table):
            stack.enter_context(patch.object(module, "time", clock))
        stack.enter_context(patch.object(opener, "open_storage", lambda *_: memory))
        yield


class Reader:
    """One that has opened an image, and judges all that it is given."""

    def __init__(self, memory: Memory, known: dict, rng: random.Random) -> None:
        self._memory, self._known, self._rng = memory, known, rng
        self._image = opener.open_image("disk.qcow2")
        self._disks: list[tuple[Identity, Disk]] = []

    def open(self, named: str | None = None) -> None:
        """One of the snapshots that are listed now."""
        there = [s for s in self._listed() if identity(s) in self._known]
        there = [s for s in there if named in (None, s.name)]
        if there:
            snapshot = self._rng.choice(there)
            with self._judged(identity(snapshot)):
                self._disks.append((identity(snapshot), self._image.disk(snapshot)))

    def _listed(self) -> tuple[Snapshot, ...]:
        memory = self._memory
        before, halves = len(memory.lists) - 1, memory.halves_seen
        found = self._image.snapshots
        said = {identity(s) for s in found}
        # One that is deleted and taken again meanwhile leaves the header as it was: whoever wants
        # more of a list than names asks the guard, for them all.
        sure = memory.halves_seen == halves and len(memory.lists) - before <= 2
        if sure and said not in memory.lists[before:]:
            raise Violation(f"a list that never was: {found}")
        return found

    def ask(self) -> None:
        """Read some of a snapshot's bytes or extents."""
        if not self._disks:
            self.open()
            return
        which, disk = entry = self._rng.choice(self._disks)
        cluster = self._rng.choice((*GUEST, 5))
        length = self._rng.choice((1, 1, 2, 4))
        with self._judged(which):
            if self._rng.random() < 0.2:
                self._extents(which, disk)
            else:
                self._bytes(which, disk, cluster, length)
            return
        if self._rng.random() < 0.7:  # it is gone; more is to be learnt from another
            self._disks.remove(entry)

    def read_one(self) -> None:
        """The guest's first cluster, of what is open."""
        for which, disk in self._disks:
            with self._judged(which):
                self._bytes(which, disk, 0, 1)

    def ask_all(self) -> None:
        """When QEMU has done all: each snapshot gives what it should, and nothing if it is gone.

        One that was renamed, and has its name again by now, may stay gone.
        """
        listed = self._memory.lists[-1]
        for which, disk in self._disks:
            with self._judged(which):
                self._bytes(which, disk, GUEST[0], GUEST[-1] + 2)
                if which not in listed:
                    raise Violation(f"{disk.name} is gone, and gave bytes")

    @contextmanager
    def _judged(self, which: Identity) -> Iterator[None]:
        try:
            yield
        except SnapshotGone as e:
            if which not in self._memory.ended:
                raise Violation(f"it is still there: {e}") from e
        except Error as e:
            raise Violation(f"needless: {e}") from e

    def _bytes(self, which: Identity, disk: Disk, cluster: int, length: int) -> None:
        content = self._known[which]
        got = disk.pread(length * CLUSTER, cluster * CLUSTER)
        for n in range(length):
            right = content.get(cluster + n, bytes(CLUSTER))
            if got[n * CLUSTER : (n + 1) * CLUSTER] != right:
                raise Violation(f"{disk.name}: wrong bytes in guest cluster {cluster + n}")

    def _extents(self, which: Identity, disk: Disk) -> None:
        content = self._known[which]
        for extent in disk.extents(0, SIZE):
            for n in range(extent.offset // CLUSTER, (extent.offset + extent.length) // CLUSTER):
                if (extent.type == HOLE_ZERO) == (n in content):
                    raise Violation(f"{disk.name}: wrong extent at guest cluster {n}")


class History(NamedTuple):
    """An image, and what becomes of it."""

    start: bytes
    listed: frozenset[Identity]
    known: dict[Identity, dict[int, bytes]]  # what they hold that are there at any time
    writes: list[Write]

    @classmethod
    def of(cls, qemu: Qemu, before: Callable[[], object], then: Callable[[], object]) -> History:
        """What QEMU does ``before`` makes the image."""
        before()
        start, listed = bytes(qemu.file), frozenset(s.identity for s in qemu.snapshots)
        qemu.writes.clear()
        then()
        return cls(start, listed, qemu.known, qemu.writes)


def simulate(seed: int, lookalikes: bool = False) -> None:
    """One history and one reader, all by chance.  Raises Violation."""
    rng = random.Random(seed)
    habits = rng.choice((NAMES[:1], NAMES[:2], NAMES)), rng.choice((1, 2, 4))
    first = rng.choice(
        (0, rng.randrange(116, 126))
    )  # where an offset that is half written is another's
    qemu = Qemu(rng, rng.random() < 0.4, rng.random() < 0.8, first)
    history = History.of(
        qemu,
        lambda: (some(qemu, rng, rng.randrange(8), *habits), qemu.snapshots or qemu.take("a")),
        lambda: some(qemu, rng, rng.randrange(1, 20), *habits),
    )
    memory = Memory(*history, AtRandom(rng))
    memory.lookalikes = lookalikes
    with installed(memory):
        reader = Reader(memory, history.known, rng)
        for _ in range(2):
            reader.open()
        for _ in range(MOST_READS):
            if memory.finished:
                break
            if rng.random() < 0.05:
                reader.open()
            reader.ask()
        memory.finish()
        reader.ask_all()


#: What a reader finds that opens the snapshot "a", and what QEMU does then.
SHORT: dict[str, tuple[list[Command], list[Command]]] = {
    "deleted, and its clusters used": (
        [("write", 0), ("take", "a"), ("write", 0)],
        [("delete", 0), ("write", 1), ("write", 2), ("write", 64)],
    ),
    "deleted, used, and taken again": (
        [("write", 0), ("take", "a"), ("write", 0)],
        [("delete", 0), ("write", 1), ("take", "a"), ("write", 0)],
    ),
    "deleted, used, and taken again in its place": (
        [("write", 0), ("take", "a"), ("write", 0)],
        [("delete", 0), ("write", 1), ("write", 2), ("take", "a")],
    ),
    "left standing behind a shorter table": (
        [("take", NAMES[2]), ("write", 0), ("take", "a"), ("write", 0)],
        [("delete", 0), ("delete", 0), ("write", 1), ("take", "b"), ("take", "b")],
    ),
    # One more in the table, and the count is what it was.
    "its old entry behind a shorter table": (
        [("take", "b"), ("write", 0), ("take", "a"), ("write", 0)],
        [("delete", 1), ("write", 1), ("take", "b"), ("delete", 1), ("take", "b")],
    ),
    "another one is deleted, and again taken": (
        [("take", "b"), ("write", 0), ("take", "a"), ("write", 0)],
        [("delete", 0), ("take", "b"), ("write", 0)],
    ),
    "reverted to, then deleted": (
        [("write", 0), ("take", "a"), ("write", 0)],
        [("apply", 0), ("write", 0), ("delete", 0), ("write", 1)],
    ),
}


LOOKALIKE: Final = "its old entry behind a shorter table"


def simulate_all(before: list[Command], then: list[Command], lookalikes: bool = False) -> int:
    """One reader of a cluster, while QEMU goes on before any two of its reads, each time to any
    flush or half header.  Returns how many ways there were.  Raises Violation."""
    rng = random.Random(1)
    qemu = Qemu(rng)
    history = History.of(qemu, partial(do, qemu, rng, before), partial(do, qemu, rng, then))
    reads, landmarks = _reads_once(history, {}, lookalikes)
    ways = 0
    for i, j in combinations(range(1, reads + 1), 2):
        for a, b in combinations(landmarks, 2):
            _reads_once(history, {i: a, j: b}, lookalikes)
            ways += 1
    return ways


def _reads_once(history: History, stops: dict[int, int], lookalikes: bool) -> tuple[int, list[int]]:
    """How many reads it took, and where QEMU could have stopped."""
    script = Script(stops)
    memory = Memory(*history, script)
    memory.lookalikes = lookalikes
    with installed(memory):
        reader = Reader(memory, history.known, random.Random(1))
        reader.open(named="a")
        script.reads = 0  # from here on
        reader.read_one()
        reads = script.reads
        memory.finish()
        reader.ask_all()
    return reads, memory.landmarks
