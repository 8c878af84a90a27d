"""A compressed cluster decodes to exactly one cluster, or it is an error."""

from __future__ import annotations

import random
import zlib

import pytest

from qcow2snap_core.decode.codecs import Zlib
from qcow2snap_core.errors import ImageError

SIZE = 65536


def deflate(data, level=6):
    """What QEMU writes: raw deflate in a window of 4 KiB."""
    coder = zlib.compressobj(level, zlib.DEFLATED, -12)
    return coder.compress(data) + coder.flush()


TEXT = b"".join(b"line %d\n" % n for n in range(10_000))[:SIZE]
NOISE = random.Random(1).randbytes(SIZE)
CONTENTS = {"zeros": bytes(SIZE), "ones": b"\xff" * SIZE, "text": TEXT, "noise": NOISE}
of_all_kinds = pytest.mark.parametrize("data", CONTENTS.values(), ids=CONTENTS)


def test_a_known_answer():
    """A stream taken from an image of QEMU 7.2: 512 times 0x07."""
    stream = bytes.fromhex("63671f0523190000")
    assert Zlib().decode(stream, 512) == b"\x07" * 512


@pytest.mark.parametrize("level", [0, 1, 9])
@of_all_kinds
def test_a_cluster_comes_back(data, level):
    assert Zlib().decode(deflate(data, level), SIZE) == data


@pytest.mark.parametrize("size", [512, 4096, 1 << 21])
def test_clusters_of_every_size(size):
    data = random.Random(size).randbytes(size // 2) * 2
    assert Zlib().decode(deflate(data), size) == data


@pytest.mark.parametrize("tail", [b"\0", bytes(511), b"\xff" * 511, deflate(TEXT)], ids=len)
def test_what_follows_the_stream_is_ignored(tail):
    assert Zlib().decode(deflate(TEXT) + tail, SIZE) == TEXT


@of_all_kinds
@pytest.mark.parametrize("keep", [0.1, 0.5, 0.9])
def test_a_stream_that_was_cut_short_is_an_error(data, keep):
    stream = deflate(data)
    with pytest.raises(ImageError, match=rf"stream ends after \d+ of {SIZE} bytes"):
        Zlib().decode(stream[: int(len(stream) * keep)], SIZE)


@pytest.mark.parametrize("missing", [1, 512, SIZE - 1, SIZE])
def test_a_stream_that_ends_before_the_cluster_is_an_error(missing):
    got = SIZE - missing
    with pytest.raises(ImageError, match=f"stream ends after {got} of {SIZE} bytes"):
        Zlib().decode(deflate(TEXT[:got]) + bytes(100), SIZE)


@pytest.mark.parametrize("more", [1, 512, 1 << 26])
def test_a_stream_that_goes_on_past_the_cluster_is_an_error(more):
    with pytest.raises(ImageError, match="goes on past the cluster"):
        Zlib().decode(deflate(TEXT + bytes(more)), SIZE)


@pytest.mark.parametrize(
    "stream",
    [
        b"\x07" + bytes(512),  # a block of the reserved type
        b"\x00\x01\x00\x01\x00" + bytes(512),  # a stored block whose lengths contradict
        b"\xff" * 512,
        NOISE[:512],
        zlib.compress(TEXT),  # with zlib's own header
    ],
    ids=["reserved", "contradiction", "ones", "noise", "header"],
)
def test_garbage_is_an_error(stream):
    with pytest.raises(ImageError, match=r"its (deflate stream is damaged|compressed stream ends)"):
        Zlib().decode(stream, SIZE)


def test_nothing_is_an_error():
    with pytest.raises(ImageError, match=f"ends after 0 of {SIZE} bytes"):
        Zlib().decode(b"", SIZE)


def test_a_damaged_stream_never_gives_another_length():
    """A flipped bit gives an error or, deflate having no checksum, a whole cluster."""
    stream = bytearray(deflate(TEXT))
    refused = 0
    for at in range(0, len(stream), 41):
        stream[at] ^= 0x10
        try:
            assert len(Zlib().decode(bytes(stream), SIZE)) == SIZE
        except ImageError:
            refused += 1
        stream[at] ^= 0x10
    assert refused
