"""Deflate streams that no compressor would make."""

from __future__ import annotations

import zlib

# The order in which a dynamic block gives the lengths of its code length codes (RFC 1951, 3.2.7).
_ORDER = (16, 17, 18, 0, 8, 7, 9, 6, 10, 5, 11, 4, 12, 3, 13, 2, 14, 1)


class _Bits:
    def __init__(self) -> None:
        self.text = ""

    def number(self, value: int, width: int) -> None:
        self.text += f"{value:0{width}b}"[::-1]

    def code(self, code: str) -> None:
        self.text += code


def _empty_dynamic_block() -> str:
    """A block that holds nothing but a new set of codes, for which the decoder makes tables."""
    lengths = {18: 1, 1: 2, 0: 2}
    many_zeros, one = "0", "11"
    bits = _Bits()
    bits.number(0, 1)  # not the last
    bits.number(2, 2)  # dynamic
    bits.number(0, 5 + 5)  # 257 literals and lengths, 1 distance
    bits.number(len(_ORDER) - 4, 4)
    for symbol in _ORDER:
        bits.number(lengths.get(symbol, 0), 3)
    bits.code(one)  # literal 0
    for zeros in (138, 117):
        bits.code(many_zeros)
        bits.number(zeros - 11, 7)
    bits.code(one)  # end of block
    bits.code(one)  # the distance
    bits.code("1")  # and the end of this block
    return bits.text


def slow(content: bytes, length: int) -> bytes:
    """At most that many bytes that decode to the content, and take a hundred times as long as they
    should."""
    packer = zlib.compressobj(9, zlib.DEFLATED, -12)
    end = packer.compress(content) + packer.flush()
    block = _empty_dynamic_block()
    text = block * ((length - len(end) - 8) * 8 // len(block)) + "000"  # and a stored one
    text += "0" * (-len(text) % 8)
    start = bytes(int(text[at : at + 8][::-1], 2) for at in range(0, len(text), 8))
    return start + b"\x00\x00\xff\xff" + end
