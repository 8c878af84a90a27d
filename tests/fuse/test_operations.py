"""What is told to the kernel, by pyfuse3's own types."""

from __future__ import annotations

import pytest

pyfuse3 = pytest.importorskip("pyfuse3")

SECOND = 10**9


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("bits", [0, 31, 33, 50, 62, 63, 64, 100])
def test_any_time_that_a_guest_may_have_can_be_told(bits: int, sign: int) -> None:
    from qcow2snap_core.fuse.operations import _time

    for seconds in (sign * ((1 << bits) + near) for near in (-1, 0, 1)):
        told = pyfuse3.EntryAttributes()
        told.st_mtime_ns = _time(seconds * SECOND + SECOND - 1)
        found = told.st_mtime_ns // SECOND
        if bits < 62:
            assert found == seconds
        else:  # a time that no host has, but of the same side of 1970
            assert found * sign > 1 << 61
