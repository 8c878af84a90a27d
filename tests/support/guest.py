"""A guest whose every block tells where and when it was written, and readers that look.

A block of 4 KiB repeats its offset and a generation, a number that grows with every write; zeros
are generation 0.  So any block of another place or another time is seen for what it is.
"""

from __future__ import annotations

import errno
import random
import struct
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass, field
from itertools import count

import nbd

from support.live import Qemu
from support.server import block_status

BLOCK = 4096
_HEAD = struct.Struct(">QQ")
_ZEROS = bytes(BLOCK)


def block(number: int, generation: int) -> bytes:
    """The content of one block."""
    if not generation:
        return _ZEROS
    return _HEAD.pack(number * BLOCK, generation) * (BLOCK // _HEAD.size)


class Expected:
    """What a snapshot holds: of each block a generation, or a span where a write was under way.

    Whichever of a span is seen first must be seen ever after.
    """

    def __init__(self, low: list[int], high: list[int]) -> None:
        self.low, self.high = low, high
        self._seen = {n: g for n, (g, h) in enumerate(zip(low, high, strict=True)) if g == h}

    def wrong(self, data: bytes, offset: int) -> int:
        """How many bytes lie in blocks that are not the snapshot's.

        A block that was being written must be read as a whole the first time.
        """
        wrong = at = 0
        while at < len(data):
            number, within = divmod(offset + at, BLOCK)
            piece = data[at : at + BLOCK - within]
            generation = self._seen.get(number)
            if generation is None:
                generation = self._first_sight(number, piece)
            if piece != block(number, generation)[within : within + len(piece)]:
                wrong += len(piece)
            at += len(piece)
        return wrong

    def _first_sight(self, number: int, piece: bytes) -> int:
        _, generation = _HEAD.unpack(piece[: _HEAD.size])
        if self.low[number] <= generation <= self.high[number]:
            return self._seen.setdefault(number, generation)
        return self.low[number]

    def wrong_extents(self, found: list[tuple[int, int, int]]) -> int:
        """How many blocks that hold data are said to be holes."""
        return sum(
            self.low[number] > 0
            for offset, length, kind in found
            if kind
            for number in range(offset // BLOCK, (offset + length) // BLOCK)
        )


class Guest:
    """The only writer of a disk, whose generations it remembers."""

    def __init__(self, blocks: int, generation: int = 0) -> None:
        """Every block is of that generation to begin with."""
        self.blocks = blocks
        self._started = [generation] * blocks
        self._finished = [generation] * blocks
        self._generations = count(generation + 1)

    def write(self, disk: nbd.NBD, first: int, length: int) -> None:
        """Write some blocks anew."""
        generation = next(self._generations)
        numbers = range(first, first + length)
        data = b"".join(block(n, generation) for n in numbers)
        self._started[first : first + length] = [generation] * length
        disk.pwrite(data, first * BLOCK)
        self._finished[first : first + length] = [generation] * length

    def write_all(self, disk: nbd.NBD, blocks: int, step: int = 64) -> None:
        """Write the first ``blocks`` anew."""
        for first in range(0, blocks, step):
            self.write(disk, first, min(step, blocks - first))

    def work(
        self, qemu: Qemu, blocks: int, connected: threading.Event, stop: threading.Event
    ) -> None:
        """Write here and there in the first ``blocks`` until told to stop or QEMU dies.

        Only once it is connected may a snapshot be taken: QEMU's NBD server does not hold back
        a client that comes while the others are drained, and QEMU 10.0.13 aborts when it writes
        then.
        """
        rng = random.Random(0)
        with qemu.guest() as disk, suppress(nbd.Error):
            connected.set()
            while not stop.is_set():
                first = rng.randrange(blocks)
                self.write(disk, first, min(blocks - first, 1 + rng.randrange(64)))

    def take(self, qemu: Qemu, name: str) -> Expected:
        """A snapshot; the guest may go on writing meanwhile."""
        low = self._finished[:]
        qemu.take(name)
        return Expected(low, self._started[:])


class Life:
    """When a snapshot was deleted: on the way from before QEMU was asked until it answered."""

    def __init__(self) -> None:
        self.deleting, self.deleted = threading.Event(), threading.Event()

    def end(self, delete: Callable[[], None]) -> None:
        self.deleting.set()
        delete()
        self.deleted.set()


@dataclass
class Tally:
    """What readers saw.  All but the first two must stay zero or empty."""

    reads: int = 0
    failed: int = 0  # with EIO
    wrong: int = 0  # bytes that are not the snapshot's
    late: int = 0  # reads that worked though issued after the delete had returned
    false: int = 0  # EIO from a snapshot that nobody had begun to delete
    other: list[str] = field(default_factory=list)  # errors that are not EIO

    @property
    def bad(self) -> dict[str, object]:
        """What must not be, empty if all is well."""
        bad = {"wrong": self.wrong, "late": self.late, "false": self.false, "other": self.other}
        return {k: v for k, v in bad.items() if v}

    def add(self, other: Tally) -> None:
        for name in ("reads", "failed", "wrong", "late", "false"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.other += other.other


class Reader(threading.Thread):
    """One client that reads a snapshot until it is told to stop, and judges each answer."""

    LENGTHS = (BLOCK, BLOCK, 16 * BLOCK, 256 * BLOCK)

    def __init__(
        self,
        connect: Callable[[], AbstractContextManager[nbd.NBD]],
        expected: Expected,
        life: Life,
        seed: int,
        extents: bool = True,
    ) -> None:
        super().__init__(daemon=True)
        self.tally = Tally()
        self._connect, self._expected, self._life = connect, expected, life
        self._rng = random.Random(seed)
        self._extents = extents
        self._stop_now = threading.Event()
        self._moved = threading.Condition()
        self.start()

    def wait(self, reads: int = 0, failed: int = 0) -> None:
        """Until it has so many reads that worked, and so many that failed, more than now."""
        reads, failed = self.tally.reads + reads, self.tally.failed + failed

        def there() -> bool:
            t = self.tally
            enough = t.reads >= reads and t.failed >= failed
            return enough or bool(t.bad) or not self.is_alive()

        with self._moved:
            assert self._moved.wait_for(there, 600), f"the reader hangs: {self.tally}"
        assert not self.tally.bad, self.tally
        assert self.is_alive(), self.tally

    def finish(self) -> Tally:
        self._stop_now.set()
        self.join(600)
        assert not self.is_alive(), f"the reader hangs: {self.tally}"
        return self.tally

    def run(self) -> None:
        try:
            with self._connect() as handle:
                blocks = handle.get_size() // BLOCK
                while not self._stop_now.is_set():
                    self._ask(handle, blocks)
                    with self._moved:
                        self._moved.notify_all()
        except Exception as e:  # noqa: BLE001 (whatever it is, the test has to see it)
            self.tally.other.append(repr(e))
        with self._moved:
            self._moved.notify_all()

    def _ask(self, handle: nbd.NBD, blocks: int) -> None:
        tally, rng, life = self.tally, self._rng, self._life
        first = rng.randrange(blocks)
        length = min((blocks - first) * BLOCK, rng.choice(self.LENGTHS))
        late = life.deleted.is_set()
        try:
            if self._extents and not rng.randrange(8):
                found = block_status(handle, first * BLOCK, length)
                wrong = self._expected.wrong_extents(found) * BLOCK
            else:
                data = handle.pread(length, first * BLOCK)
                wrong = self._expected.wrong(bytes(data), first * BLOCK)
        except nbd.Error as e:
            if e.errnum != errno.EIO:
                raise
            tally.failed += 1
            tally.false += not life.deleting.is_set()
            return
        tally.reads += 1
        tally.late += late or tally.failed > 0
        tally.wrong += wrong


class Salvo:
    """Many reads on many connections at once: all on their way, none answered to anybody yet."""

    READS, LENGTH = 10, 4 * BLOCK  # so that a socket's buffer holds all of a connection's answers

    def __init__(self, handles: list[nbd.NBD], expected: Expected, rng: random.Random) -> None:
        self._expected = expected
        self._asked = []
        for _ in range(self.READS):
            for handle in handles:
                offset = rng.randrange(handle.get_size() // self.LENGTH) * self.LENGTH
                buffer = nbd.Buffer(self.LENGTH)
                self._asked.append((handle, handle.aio_pread(buffer, offset), buffer, offset))

    def collect(self) -> Tally:
        """Wait for the answers, and judge them."""
        tally = Tally()
        for handle, cookie, buffer, offset in self._asked:
            try:
                while not handle.aio_command_completed(cookie):
                    handle.poll(-1)
            except nbd.Error as e:
                if e.errnum != errno.EIO:
                    raise
                tally.failed += 1
            else:
                tally.reads += 1
                tally.wrong += self._expected.wrong(bytes(buffer.to_bytearray()), offset)
        return tally
