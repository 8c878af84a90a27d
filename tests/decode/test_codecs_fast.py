"""The decoders that need a library: zstd, and deflate by libdeflate.  Known answers written by
hand from RFC 1951 and RFC 8878; libdeflate judges every stream as zlib does."""

from __future__ import annotations

import random
import zlib
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from qcow2snap_core.decode import codecs
from qcow2snap_core.decode.codecs import Codec, Libdeflate, Zlib, Zstd
from qcow2snap_core.errors import ImageError

# RFC 1951: a stored block (3.2.4); a block of fixed codes (3.2.6) with the literal A and the end
# of block, after which more bits are padding; two blocks, of which the second is the last.
NUMBERS = bytes(n % 251 for n in range(512))
STORED = b"\x01\x00\x02\xff\xfd" + NUMBERS
FIXED_A = b"\x73\x04\x00"
TWO_BLOCKS = b"\x00\x01\x00\xfe\xffA" + b"\x01\x01\x00\xfe\xffB"
DEFLATE = [(STORED, NUMBERS), (FIXED_A, b"A"), (TWO_BLOCKS, b"AB")]

# RFC 8878: magic, frame header descriptor (3.1.1.1.1), then blocks (3.1.1.2) whose three bytes
# are: last, type (raw 0, RLE 1) and size, from the low end.
MAGIC = b"\x28\xb5\x2f\xfd"
SINGLE_SEGMENT_512 = b"\x60\x00\x01"  # its size, less 256, in two bytes
WINDOW_1K = b"\x00\x00"  # no size
RLE_512_A = b"\x03\x10\x00A"
RAW_512 = b"\x01\x10\x00" + NUMBERS
RAW_THEN_RLE = b"\x10\x00\x00" + b"xy" + b"\xf3\x0f\x00A"
ZSTD = [
    (MAGIC + SINGLE_SEGMENT_512 + RLE_512_A, b"A" * 512),
    (MAGIC + SINGLE_SEGMENT_512 + RAW_512, NUMBERS),
    (MAGIC + WINDOW_1K + RLE_512_A, b"A" * 512),
    (MAGIC + WINDOW_1K + RAW_THEN_RLE, b"xy" + b"A" * 510),
]


@pytest.mark.parametrize("codec", [Libdeflate(), Zlib()], ids=["libdeflate", "zlib"])
@pytest.mark.parametrize(("stream", "data"), DEFLATE, ids=["stored", "fixed", "two blocks"])
@pytest.mark.parametrize("tail", [b"", b"\0" * 300, b"\xff" * 300])
def test_deflate_by_hand(codec: Codec, stream: bytes, data: bytes, tail: bytes) -> None:
    assert codec.decode(stream + tail, len(data)) == data


@pytest.mark.parametrize(("stream", "data"), ZSTD)
@pytest.mark.parametrize("tail", [b"", b"\0" * 300, MAGIC, MAGIC + SINGLE_SEGMENT_512 + RLE_512_A])
def test_zstd_by_hand(stream: bytes, data: bytes, tail: bytes) -> None:
    assert Zstd().decode(stream + tail, 512) == data


@pytest.mark.parametrize("size", [511, 513, 65536])
@pytest.mark.parametrize(("stream", "data"), ZSTD)
def test_a_frame_of_another_length_than_the_cluster(stream: bytes, data: bytes, size: int) -> None:
    with pytest.raises(ImageError, match="goes on past the cluster|ends after 512 of"):
        Zstd().decode(stream, size)


@pytest.mark.parametrize(
    "stream",
    [
        b"",
        MAGIC,
        bytes(512),
        MAGIC + SINGLE_SEGMENT_512 + RAW_512[:-1],
        MAGIC + SINGLE_SEGMENT_512 + b"\x07\x10\x00A",  # block type 3 is reserved
        MAGIC + b"\x68\x00\x01" + RLE_512_A,  # a reserved bit of the descriptor
        MAGIC + b"\x61\x07\x00\x01" + RLE_512_A,  # dictionary 7
        MAGIC + b"\x00\xf8" + RLE_512_A,  # a window of 2 TiB
        b"\x50\x2a\x4d\x18\x04\x00\x00\x00abcd",  # a skippable frame
        # All 512 bytes, but in a block that is not the last: QEMU wants the end of the frame.
        MAGIC + WINDOW_1K + b"\x02\x10\x00A",
        MAGIC + WINDOW_1K + b"\x02\x10\x00A" + bytes(300),
        MAGIC + SINGLE_SEGMENT_512 + b"\x02\x10\x00A",
    ],
)
def test_a_damaged_frame(stream: bytes) -> None:
    with pytest.raises(ImageError, match="zstd frame is damaged|stream ends after"):
        Zstd().decode(stream, 512)


def test_a_damaged_checksum() -> None:
    frame = zstandard.ZstdCompressor(write_checksum=True).compress(NUMBERS)
    assert Zstd().decode(frame, 512) == NUMBERS
    for wrong in (frame[:-1] + bytes([frame[-1] ^ 1]), frame[:-1], frame[:-4]):
        with pytest.raises(ImageError, match="damaged"):
            Zstd().decode(wrong, 512)


def judged(codec: Codec, stream: bytes, size: int) -> Any:
    try:
        return bytes(codec.decode(stream, size))
    except ImageError:
        return "refused"


@given(
    st.binary(max_size=600),
    st.integers(0, 9),
    st.integers(-2, 2),
    st.lists(st.tuples(st.integers(0, 10_000), st.integers(0, 255)), max_size=2),
    st.binary(max_size=20),
)
def test_libdeflate_judges_as_zlib(
    data: bytes, level: int, more: int, damage: list[tuple[int, int]], tail: bytes
) -> None:
    coder = zlib.compressobj(level, zlib.DEFLATED, -12)
    stream = bytearray(coder.compress(data) + coder.flush())
    for at, value in damage:
        stream[at % len(stream)] = value
    whole = bytes(stream) + tail
    size = max(1, len(data) + more)
    assert judged(Libdeflate(), whole, size) == judged(Zlib(), whole, size)


@pytest.mark.parametrize("make", [Libdeflate, Zstd])
def test_one_decoder_serves_several_threads(make: Any) -> None:
    codec, pieces = make(), []
    for seed in range(20):
        data = random.Random(seed).randbytes(30_000) + bytes(35_536)
        coder = zlib.compressobj(6, zlib.DEFLATED, -12)
        deflated = coder.compress(data) + coder.flush()
        pieces.append((deflated if make is Libdeflate else zstandard.compress(data), data))
    with ThreadPoolExecutor(8) as pool:
        for got, (_, data) in zip(
            pool.map(lambda p: codec.decode(p[0], 65536), pieces * 5), pieces * 5, strict=True
        ):
            assert got == data


def test_without_libdeflate_zlib_does_it(monkeypatch: pytest.MonkeyPatch) -> None:
    assert isinstance(codecs.deflate(), Libdeflate)

    def absent(name: str) -> None:
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr("ctypes.CDLL", absent)
    assert isinstance(codecs.deflate(), Zlib)
    assert codecs.available() == {"zlib_libdeflate": False, "zstd": True}


def test_without_zstandard_the_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "zstandard", None)
    with pytest.raises(ImageError, match="install python3-zstandard"):
        Zstd()
    assert codecs.available() == {"zlib_libdeflate": True, "zstd": False}
