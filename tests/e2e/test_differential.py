"""A few seeds of `make differential`, chosen so that each kind of image and comparison is there.

Without one that has join, split or copy write to an image with extended L2 entries.
"""

from __future__ import annotations

import pytest
from differential import judged

SEEDS = (6, 47, 56, 67)


@pytest.mark.parametrize("seed", SEEDS)
def test_everything_said_of_a_random_image_is_what_qemu_says(seed: int) -> None:
    (verdict,) = judged([seed], [], 1)
    assert not verdict.wrong, verdict.kept
    assert verdict.counted
