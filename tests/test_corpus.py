"""What fuzzing found worth keeping does no harm to the parsers, without a fuzzer too."""

from __future__ import annotations

import fuzz
import pytest

from qcow2snap_core.decode import luks


@pytest.mark.parametrize("target", fuzz.TARGETS)
def test_the_kept_inputs_do_no_harm(target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(luks, "MAX_LUKS_ITERATIONS", 100)  # the target sets it, for good
    inputs = fuzz.corpus_of(target)
    assert len(inputs) > 3
    for data in inputs:
        fuzz.TARGETS[target](data)
