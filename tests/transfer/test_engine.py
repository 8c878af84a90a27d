"""How ranges are cut into requests, that no two of them meet in one cluster, and that what is read
by several threads comes in order."""

from __future__ import annotations

import random
import threading
from itertools import pairwise

import pytest

from qcow2snap_core.errors import StorageError
from qcow2snap_core.image.extents import ALLOCATED, HOLE_ZERO, Extent, merged
from qcow2snap_core.transfer.mover import PIECE, by_block, cut, ordered

GiB = 1 << 30


def some_extents(seed: int) -> list[Extent]:
    """In order, some of them neighbours, most of them with odd ends."""
    rng = random.Random(seed)
    at = 0
    found = []
    for _ in range(rng.randrange(1, 12)):
        at += rng.choice([0, 512, PIECE, rng.randrange(4 * PIECE)])
        length = rng.choice([512, PIECE, rng.randrange(1, 5 * PIECE), rng.randrange(1, 3 * GiB)])
        found.append(Extent(at, length, rng.choice([ALLOCATED, HOLE_ZERO])))
        at += length
    return found


@pytest.mark.parametrize("seed", range(100))
def test_no_piece_is_lost_or_too_long_for_a_request(seed: int) -> None:
    extents = some_extents(seed)
    pieces = list(cut(extents))
    assert list(merged(pieces)) == list(merged(extents))
    assert all(e.length <= (PIECE if e.type == ALLOCATED else GiB) for e in pieces)


@pytest.mark.parametrize("seed", range(100))
def test_no_cluster_is_touched_by_two_blocks(seed: int) -> None:
    blocks = list(by_block(some_extents(seed)))
    for before, after in pairwise(blocks):
        last = before[-1].offset + before[-1].length - 1
        assert last // PIECE < after[0].offset // PIECE


def test_long_zeros_are_few_requests() -> None:
    assert len(list(cut([Extent(512, 1 << 40, HOLE_ZERO)]))) <= 1026


class Source:
    """Each byte says in which piece it is; the first pieces are the last to be read."""

    def __init__(self, threads: int) -> None:
        self.together = threading.Barrier(threads)
        self.bad: int | None = None

    def pread_into(self, buffer: memoryview, offset: int) -> None:
        if self.bad is not None and offset >= self.bad:
            raise StorageError("bad")
        if offset // PIECE < self.together.parties:
            self.together.wait(60)
        buffer[:] = bytes([offset // PIECE]) * len(buffer)


def test_pieces_come_in_order_whoever_read_them() -> None:
    size = 9 * PIECE + 512
    got = b"".join(bytes(view) for view in ordered(Source(4), lambda: plan(size), 4))
    expected = b"".join(bytes([n]) * PIECE for n in range(8)) + bytes(PIECE + 512)
    assert got == expected


def plan(size: int) -> list[Extent]:
    return [Extent(0, 8 * PIECE, ALLOCATED), Extent(8 * PIECE, size - 8 * PIECE, HOLE_ZERO)]


def test_what_was_read_before_an_error_comes_first() -> None:
    source = Source(2)
    source.bad = 5 * PIECE
    got = []

    def take() -> None:
        for view in ordered(source, lambda: plan(9 * PIECE), 2):
            got.append(len(view))

    with pytest.raises(StorageError):
        take()
    assert got == [PIECE] * 5
