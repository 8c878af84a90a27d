"""An image in memory that goes on being written between and during the single reads of it."""

from __future__ import annotations

import random
import struct
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from typing import Any, NamedTuple, Protocol

from qcow2snap_core.format.snapshots import Identity
from qcow2snap_core.storage.local import ExpectedBytes

from .writes import Write, start_of_entry

HELD = 2  # pauses of the guard's that half a write is seen for
HEADER = slice(60, 72)  # of the file: count and offset of the snapshot table


class Piece(NamedTuple):
    """A write, or a part of one that is seen before the rest."""

    offset: int
    data: bytes
    write: int  # the number of the write it is from
    operation: int
    listed: frozenset[Identity] | None


class Choices(Protocol):
    """What is left to chance, or tried in all ways."""

    def cuts(self, length: int) -> list[int]:
        """Where a write of so many bytes is cut."""

    def next_of(self, count: int) -> int:
        """Which of so many pieces comes next, none of which has to wait for another."""

    def advance(self, memory: Memory) -> None:
        """Let QEMU go on for a while: called before each read, and in the middle of some."""

    def cut_read(self, length: int) -> int:
        """Where QEMU may go on in the middle of a read; 0 for nowhere."""


class Memory:
    """The protocol of storage.local.Storage, over a list of writes of which some were made."""

    def __init__(
        self,
        start: bytes,
        listed: frozenset[Identity],
        known: Iterable[Identity],
        writes: Sequence[Write],
        choices: Choices,
    ) -> None:
        """``listed``: the snapshots that there are; ``known``: also those that were or will be."""
        self.path = self.absolute = "disk.qcow2"
        self.directory = self.trusted = self.plain_fd = None
        self.inode = 0, 0
        self.closed = False
        self.file = bytearray(start)
        self.choices = choices
        will_be = {identity for w in writes for identity in w.listed or ()}
        self.ended = set(known) - will_be - listed  # snapshots that are deleted, or just being so
        self._over = self.ended.copy()  # those whose clusters may be others' by now
        #: what was listed when; a reader may have seen any of the last ones
        self.lists = [listed]
        self.halves_seen = 0  # reads of a header that was none
        self.steps = 0
        self.epoch = 0  # how many flushes there were
        self.header_was_written = False  # by the last piece
        #: whether half a header that leads to a deleted snapshot may be there for a while
        self.lookalikes = False
        self._hurry = False  # or is whole when somebody looks again
        #: numbers of steps after which there was a flush or half a header
        self.landmarks: list[int] = []
        self._epochs = iter(self._cut(writes))
        self._epoch: list[Piece] = next(self._epochs, [])
        self._torn = False  # whether half a write is in the file,
        self._torn_for = 0  # and how many pauses of the reader's it has been there for
        self._header = self.file[HEADER]  # the last one that was whole

    # --- What QEMU does ---

    def _cut(self, writes: Sequence[Write]) -> Iterator[list[Piece]]:
        epoch: list[Piece] = []
        for number, w in enumerate(writes):
            if not w.data:
                if epoch:
                    yield epoch
                epoch = []
                continue
            cuts = [0, *self.choices.cuts(len(w.data)), len(w.data)]
            epoch += [
                Piece(w.offset + a, w.data[a:b], number, w.operation, w.listed)
                for a, b in pairwise(cuts)
                if a < b
            ]
        if epoch:
            yield epoch

    @property
    def finished(self) -> bool:
        """Whether QEMU has nothing more to do."""
        return not self._epoch

    @property
    def operation(self) -> int:
        """The command that it is at."""
        return self._epoch[0].operation if self._epoch else -1

    @property
    def half_a_header(self) -> bool:
        return self._torn and self.header_was_written

    def step(self) -> None:
        """One piece more is in the file."""
        if not self._epoch:
            self.header_was_written = False
            return
        ready = (
            [
                n
                for n, piece in enumerate(self._epoch)
                if not any(_overlap(piece, before) for before in self._epoch[:n])
            ]
            if len(self._epoch) < 30
            else [0]
        )
        piece = self._epoch.pop(ready[self.choices.next_of(len(ready))])
        self.file.extend(bytes(max(0, piece.offset - len(self.file))))
        self.file[piece.offset : piece.offset + len(piece.data)] = piece.data
        self.steps += 1
        if piece.listed is not None:
            self.ended |= self.lists[-1] - piece.listed
        self.header_was_written = HEADER.start <= piece.offset < HEADER.stop
        self._torn = any(piece.write == other.write for other in self._epoch)
        if piece.listed is not None and not self._torn:
            self.lists.append(piece.listed)
            self._over = self.ended.copy()
            self._header = self.file[HEADER]
        if not self._epoch or self.half_a_header:
            self.landmarks.append(self.steps)
        if not self._epoch:
            self._epoch = next(self._epochs, [])
            self.epoch += 1

    def finish(self) -> None:
        """QEMU does all that is left to do."""
        while not self.finished:
            self.step()

    def sleep(self, seconds: float) -> None:
        """The guard pauses; QEMU never stays in the middle of a write for long."""
        self.choices.advance(self)
        self._torn_for = self._torn_for + 1 if self._torn else 0
        while self._torn and self._torn_for >= HELD:
            self.step()

    # --- What the reader does: each read is a moment, or two if it is cut ---

    def size(self) -> int:
        return len(self.file)

    def read(self, length: int, offset: int) -> bytes:
        while self._hurry and self._torn:
            self.step()
        self._hurry = False
        self.choices.advance(self)
        cut = self.choices.cut_read(length)
        data, header = bytes(self.file[offset : offset + cut]), self._header
        if len(data) == cut:
            if cut:
                self.choices.advance(self)
            data += self.file[offset + cut : offset + length]
        if offset == HEADER.start and length == HEADER.stop - HEADER.start:
            whole = data in (header, self._header)
            self.halves_seen += not whole
            if not whole and not self.lookalikes and self._leads_to_a_deleted_one(data):
                self._hurry = True
        return data

    def _leads_to_a_deleted_one(self, header: bytes) -> bool:
        count, at = struct.unpack(">IQ", header)
        for _ in range(min(count, 16)):
            head = bytes(self.file[at : at + 40])
            if any(head.startswith(start_of_entry(identity)) for identity in self._over):
                return True
            if len(head) < 40:
                break
            id_size, name_size, extra = struct.unpack(">12xHH20xI", head)
            at += -(-(40 + id_size + name_size + extra) // 8) * 8
        return False

    def read_into(self, buffer: Any, offset: int) -> int:
        data = self.read(len(buffer), offset)
        memoryview(buffer)[: len(data)] = data
        return len(data)

    def holds(self, expected: ExpectedBytes) -> bool:
        return all(self.read(len(content), offset) == content for content, offset in expected)

    def holes(self, offset: int, length: int) -> Iterator[tuple[int, int, bool]]:
        yield offset, length, False

    def will_need(self, offset: int, length: int) -> None:
        """Nothing."""

    def close(self) -> None:
        self.closed = True


def _overlap(a: Piece, b: Piece) -> bool:
    return a.offset < b.offset + len(b.data) and b.offset < a.offset + len(a.data)


class AtRandom:
    """Choices from a seed; each seed has habits of its own."""

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng
        self._tears = rng.random() < 0.6
        self._reorders = rng.random() < 0.5
        self._cuts_reads = rng.random() < 0.3
        self._eager = rng.choice((0.05, 0.15, 0.4))

    def cuts(self, length: int) -> list[int]:
        if not self._tears or length < 2 or self._rng.random() < 0.3:
            return []
        if length == HEADER.stop - HEADER.start:
            # Where the count and a line of the cache end; inside the offset; anywhere.
            return [self._rng.choice((4, 4, 4, 10, self._rng.randrange(1, length)))]
        some = range(1, length)
        return sorted(self._rng.sample(some, min(len(some), self._rng.choice((1, 1, 2)))))

    def next_of(self, count: int) -> int:
        return self._rng.randrange(count) if self._reorders else 0

    def cut_read(self, length: int) -> int:
        if not self._cuts_reads or not length:
            return 0
        return 4 if length == 12 else self._rng.randrange(length)

    def advance(self, memory: Memory) -> None:
        if memory.finished or self._rng.random() > self._eager:
            return
        match self._rng.randrange(6):
            case 0:
                memory.step()
            case 4:  # up to half a write of the header
                while not memory.finished and not memory.half_a_header:
                    memory.step()
            case 5:  # up to where a header has just been written
                memory.step()
                while not memory.finished and not memory.header_was_written:
                    memory.step()
            case 1:
                epoch = memory.epoch
                while memory.epoch == epoch and not memory.finished:
                    memory.step()
            case 2:
                operation = memory.operation
                while memory.operation == operation:
                    memory.step()
            case 3:
                for _ in range(self._rng.randrange(60)):
                    memory.step()


class Script:
    """QEMU stops where it is told to: no write is cut but the header's, and none overtakes."""

    def __init__(self, stops: dict[int, int]) -> None:
        """``stops``: how many pieces are written before the read with that number."""
        self._stops = stops
        self.reads = -(10**6)  # none of them counts yet

    def cuts(self, length: int) -> list[int]:
        return [4] if length == HEADER.stop - HEADER.start else []

    def next_of(self, count: int) -> int:
        return 0

    def cut_read(self, length: int) -> int:
        return 4 if length == HEADER.stop - HEADER.start else 0

    def advance(self, memory: Memory) -> None:
        self.reads += 1
        while memory.steps < self._stops.get(self.reads, 0) and not memory.finished:
            memory.step()
