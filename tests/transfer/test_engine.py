"""How ranges are cut into requests, and that no two of them meet in one cluster."""

from __future__ import annotations

import random
from itertools import pairwise

import pytest

from qcow2snap_core.image.extents import ALLOCATED, HOLE_ZERO, Extent, merged
from qcow2snap_core.transfer.engine import PIECE, _blocks, cut

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
    blocks = list(_blocks(some_extents(seed)))
    for before, after in pairwise(blocks):
        last = before[-1].offset + before[-1].length - 1
        assert last // PIECE < after[0].offset // PIECE


def test_long_zeros_are_few_requests() -> None:
    assert len(list(cut([Extent(512, 1 << 40, HOLE_ZERO)]))) <= 1026
