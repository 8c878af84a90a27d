"""Decoders for compressed clusters: small classes behind one interface.

A compressed cluster is a stream followed by whatever fills its last sector.  It must decode to
exactly one cluster: a stream that is damaged, ends early or goes on past the cluster is an error.
"""

from __future__ import annotations

import zlib
from typing import Protocol

from .errors import ImageError


class Codec(Protocol):
    """One compression format."""

    name: str

    def decode(self, stream: bytes, size: int) -> bytes | bytearray:
        """The ``size`` bytes that ``stream`` decodes to; trailing bytes are ignored.

        Raises ImageError for a stream that does not give exactly that.
        """


class Zlib:
    """Raw deflate in a window of 4 KiB (QEMU: qcow2_zlib_decompress)."""

    name = "zlib"

    def decode(self, stream: bytes, size: int) -> bytes:
        decoder = zlib.decompressobj(wbits=-12)
        try:
            # One byte more than there may be, so that the end of the stream is seen too.
            data = decoder.decompress(stream, size + 1)
        except zlib.error as e:
            raise ImageError(f"its deflate stream is damaged ({e})") from e
        if len(data) != size:
            raise _wrong_size(len(data), size)
        return data


def _wrong_size(got: int, size: int) -> ImageError:
    if got > size:
        return ImageError("its compressed stream goes on past the cluster")
    return ImageError(f"its compressed stream ends after {got} of {size} bytes")
