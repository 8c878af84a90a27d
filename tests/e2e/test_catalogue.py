"""The catalogue of hand-made bad images: each is refused, or gives errors for exactly what the
damaged field is needed for, and the right bytes for all else.

All cases go through the library; every eighth, and one of each outcome, through a real nbdkit.
"""

from __future__ import annotations

import errno
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

import nbd
import pytest
from support import catalogue, qemu
from support.catalogue import CASES, CLOSED, LISTED, NONE, REFUSED, SERVED, Case
from support.server import block_status, refused, serve

from qcow2snap_core.errors import Error, ImageError
from qcow2snap_core.image.disk import Disk
from qcow2snap_core.image.opener import open_image


@dataclass
class Base:
    """An undamaged image, and QEMU's word for what is in it."""

    path: Path
    good: bytes
    bad: bytes


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Base]:
    directory = tmp_path_factory.mktemp("bases")
    found = {}
    for kind in {case.kind for case in CASES}:
        path = catalogue.make(directory, kind)
        found[kind] = Base(path, qemu.content(path, "GOOD"), qemu.content(path, "BAD"))
    return found


def damaged(directory: Path, base: Base, case: Case) -> Path:
    path = directory / "disk.qcow2"
    for file in (base.path, base.path.with_name("base.raw")):
        if file.exists():
            shutil.copyfile(file, directory / (path.name if file is base.path else file.name))
    case.apply(path)
    assert path.read_bytes() != base.path.read_bytes()
    return path


def clusters(case: Case) -> int:
    return 16 * 1024 if case.kind == "extl2" else catalogue.CLUSTER


def check_disk(disk: Disk, case: Case, expected: bytes) -> None:
    """Cluster by cluster: errors for the lost ones, QEMU's bytes for the others."""
    lost = case.outcome if isinstance(case.outcome, range) else range(0)
    size = clusters(case)
    assert disk.size == len(expected)
    for at in range(0, disk.size, size):
        if at // size not in lost:
            assert disk.pread(size, at) == expected[at : at + size]
            assert list(disk.extents(at, size))
            continue
        for offset, length in ((at, size), (at + size - 1, 1)):
            with pytest.raises(ImageError, match=case.said) as caught:
                disk.pread(length, offset)
            assert f"guest offset {offset:#x}: " in str(caught.value)
        if case.extents_too:
            with pytest.raises(ImageError, match=case.said):
                list(disk.extents(at, size))
        else:
            assert [e.type for e in disk.extents(at, size)] == [0]


def test_the_catalogue_is_a_catalogue() -> None:
    assert len(CASES) >= 80
    assert len({case.name for case in CASES}) == len(CASES)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_bad_image(tmp_path: Path, bases: dict[str, Base], case: Case) -> None:
    base = bases[case.kind]
    path = damaged(tmp_path, base, case)
    if case.outcome == REFUSED:
        with pytest.raises(Error, match=case.said) as caught:
            open_image(str(path))
        assert f"'{path}'" in str(caught.value)
        assert "\n" not in str(caught.value)
        return
    with open_image(str(path)) as image:
        if case.outcome != NONE:
            good = image.snapshot("GOOD")
            assert good.pread(good.size, 0) == base.good
        if case.outcome in (CLOSED, LISTED, NONE):
            with pytest.raises(Error, match=case.said):
                image.snapshot("BAD")
        else:
            check_disk(image.snapshot("BAD"), case, base.bad)


def sample() -> list[Case]:
    """Few, for each takes a server: one of every outcome, and the first of every kind."""
    seen: set[object] = set()
    chosen = []
    for number, case in enumerate(CASES):
        new = {str(case.outcome), case.kind} - seen
        if new or not number % 20:
            chosen.append(case)
        seen |= new
    return chosen


@pytest.mark.parametrize("case", sample(), ids=lambda case: case.name)
def test_a_bad_image_through_nbdkit(tmp_path: Path, bases: dict[str, Base], case: Case) -> None:
    base = bases[case.kind]
    path = damaged(tmp_path, base, case)
    if case.outcome == REFUSED:
        assert re.search(case.said, refused(file=path))
        return
    with serve(file=path) as server:
        if case.outcome != NONE:
            assert server.read("GOOD") == base.good
        if case.outcome in (CLOSED, LISTED, NONE):
            with pytest.raises(nbd.Error):
                server.read("BAD")
        elif case.outcome == SERVED:
            assert server.read("BAD") == base.bad
        else:
            assert isinstance(case.outcome, range)
            size = clusters(case)
            at = case.outcome[0] * size
            with server.connect("BAD", extents=True) as client:
                for request in (
                    lambda: client.pread(size, at),
                    lambda: block_status(client, at, size),
                )[: 1 + case.extents_too]:
                    with pytest.raises(nbd.Error) as caught:
                        request()
                    assert caught.value.errnum == errno.EIO
                    assert re.search(case.said, server.log.splitlines()[-1])
                after = case.outcome[-1] * size + size
                before = 0 if case.outcome[0] else after
                assert client.pread(size, before) == base.bad[before : before + size]
        assert "Traceback" not in server.log
