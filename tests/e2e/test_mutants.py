"""Whole images with random changes in their structures: QEMU's bytes, or an error of ours.

`make mutants` does the same for 20,000 of them.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
from support.mutants import KINDS, judge, mutants

EACH = 60


@pytest.mark.parametrize("part", range(2))
@pytest.mark.parametrize("kind", KINDS)
def test_mutants_give_qemus_bytes_or_an_error(tmp_path: Path, kind: str, part: int) -> None:
    outcomes: Counter[str] = Counter()
    for path, what in mutants(tmp_path, kind, range(part * EACH // 2, (part + 1) * EACH // 2)):
        try:
            outcomes[judge(path)] += 1
        except Exception as e:
            raise AssertionError(what) from e
    assert outcomes["refused"] < EACH // 3, "most should get as far as being read"
    assert outcomes["part"] > 0
    assert outcomes["served"] > 0
