"""Sizes: read as nbdkit reads them, written as qemu-img writes them.  Both are asked."""

from __future__ import annotations

import json
import os
import re

import pytest
from support.qemu import run

from qcow2snap_core.errors import UsageError
from qcow2snap_core.util.units import binary, counted, parse_size

SIZES = [
    *("0", "1", "512", "64k", "64K", "64M", "1G", "2T", "3p", "7E", "2048s", "2048S", "10b", "10B"),
    *(
        "+5",
        "007",
        "9223372036854775807",
        "8191P",
        "1.5G",
        "-1",
        "",
        "M",
        "1 G",
        "1G ",
        "G1",
    ),
    *("1KB", "1MiB", "64x", "9223372036854775808", "8E", "99999999999999999999", "1_000", "٣"),
]
SINCE_1_48 = {
    **{"0x10": 16, "0X1F": 31, "0x10k": 16 << 10, "+0x1s": 512, "0x10b": 0x10B, "0x1e": 0x1E},
    **{"0x": None, "0xg": None, "0x1kb": None, "0x8000000000000000": None},
}

PROBE = """
import json, os, nbdkit
def dump_plugin():
    for text in json.loads(os.environ["TEXTS"]):
        try:
            print("answer=%d" % nbdkit.parse_size(text), flush=True)
        except Exception:
            print("answer=None", flush=True)
def open(readonly): pass
def get_size(h): return 0
def pread(h, count, offset): return b""
"""


@pytest.fixture(scope="module")
def nbdkit_says(tmp_path_factory):
    """nbdkit's own parser, asked once for all."""
    script = tmp_path_factory.mktemp("units") / "probe.py"
    script.write_text(PROBE)
    env = {**os.environ, "TEXTS": json.dumps([*SIZES, *SINCE_1_48])}
    said = run("nbdkit", "python", script, "--dump-plugin", env=env)
    answers = re.findall(r"^answer=(.*)$", said, re.M)
    return {
        t: None if a == "None" else int(a)
        for t, a in zip([*SIZES, *SINCE_1_48], answers, strict=True)
    }


def parsed(text):
    try:
        return parse_size(text)
    except UsageError:
        return None


@pytest.mark.parametrize("text", SIZES)
def test_a_size_is_what_nbdkit_takes_it_for(nbdkit_says, text):
    assert parsed(text) == nbdkit_says[text]


@pytest.mark.parametrize("text", SINCE_1_48)
def test_hexadecimal_sizes_are_those_of_nbdkit_1_48(nbdkit_says, text):
    assert parsed(text) == SINCE_1_48[text]
    assert nbdkit_says[text] in (SINCE_1_48[text], None)


@pytest.mark.parametrize("text", ["lots", "64x", "", "8E"])
def test_the_error_shows_what_was_given(text):
    with pytest.raises(UsageError, match=f"^{text!r} is "):
        parse_size(text)


SECTORS = [1, 2, 3, 19, 1999, 2000, 2001, 10_000, 65536, 1_000_000, 1 << 21, 3 << 20, 7 << 28]


@pytest.mark.parametrize("size", [n * 512 for n in SECTORS])
def test_a_size_is_shown_as_qemu_img_shows_it(tmp_path, size):
    disk = tmp_path / "disk.raw"
    with open(disk, "wb") as f:
        f.truncate(size)
    said = run("qemu-img", "info", "-f", "raw", disk)
    assert f"virtual size: {binary(size)} ({size} bytes)" in said


def test_nothing_is_zero_bytes():
    assert binary(0) == "0 B"


def test_one_is_singular() -> None:
    assert counted(1, "range") == "1 range"
    assert counted(1, "entry", "entries") == "1 entry"
    assert [counted(n, "entry", "entries") for n in (0, 2000)] == ["0 entries", "2,000 entries"]
