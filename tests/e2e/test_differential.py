"""A few seeds of `make differential`, chosen so that each kind of image and comparison is there.

Without one that has join, split or copy write to an image with extended L2 entries.
"""

from __future__ import annotations

import pytest
from differential import judged

SEEDS = (
    47, 56, 59, 95, 102, 126, 149, 156, 186, 195,
    202, 252, 275, 310, 329, 339, 359, 375, 381, 388,
)  # fmt: skip


@pytest.mark.parametrize(
    "seed", [*SEEDS[:8], *(pytest.param(seed, marks=pytest.mark.long) for seed in SEEDS[8:])]
)
def test_everything_said_of_a_random_image_is_what_qemu_says(seed: int) -> None:
    (verdict,) = judged([seed], [], 1)
    assert not verdict.wrong, verdict.kept
    assert verdict.counted
