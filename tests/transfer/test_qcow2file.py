"""What QEMU's compress filter is given: whole clusters, each of them once."""

from __future__ import annotations

import random
from itertools import pairwise

import pytest

from qcow2snap_core.image.extents import ALLOCATED, Extent
from qcow2snap_core.transfer.qcow2file import in_clusters

CLUSTER = 4096


@pytest.mark.parametrize("seed", range(50))
def test_every_byte_is_in_one_of_the_clusters_and_no_cluster_comes_twice(seed: int) -> None:
    rng = random.Random(seed)
    extents, at = [], 0
    for _ in range(rng.randrange(1, 40)):
        at += rng.choice([0, 512, CLUSTER, rng.randrange(5 * CLUSTER)])
        length = rng.choice([1, 512, CLUSTER, rng.randrange(1, 5 * CLUSTER)])
        extents.append(Extent(at, length, ALLOCATED))
        at += length
    found = list(in_clusters(extents, CLUSTER))
    touched = {n // CLUSTER for e in extents for n in (e.offset, e.offset + e.length - 1)}
    touched |= {
        n for e in extents for n in range(e.offset // CLUSTER, e.offset + e.length - 1 >> 12)
    }
    clusters = [
        n for e in found for n in range(e.offset // CLUSTER, (e.offset + e.length) // CLUSTER)
    ]
    assert clusters == sorted(touched)
    assert all(e.offset % CLUSTER == e.length % CLUSTER == 0 for e in found)
    assert all(a.offset + a.length < b.offset for a, b in pairwise(found)), "neighbours are one"
