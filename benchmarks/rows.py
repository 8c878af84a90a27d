"""The rows of the table: which image, what is done to it, and what we want of the plugin there.

The plugin's goal is a ratio to ``qemu-nbd -l`` in the same run, in some rows one to nbdkit's file
plugin as well; and in every row the CPU of the server for each request is to be no more than
qemu-nbd's.
"""

from __future__ import annotations

from dataclasses import dataclass

from clients import Measure, copy, extents, fio, served, to_file
from images import MiB

OURS = "plugin"  # stands for each engine that is measured
REQUESTS, MEBIBYTES, MAPS = "req/s", "MiB/s", "maps/s"

# Of the default cache of decoded clusters, 64 MiB.
_FITS, _FOUR_TIMES = 48 * MiB, 256 * MiB


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    name: str
    image: str
    unit: str
    measure: Measure
    goal: float  # the least ratio to the first of the others
    to_file: float | None = None  # and to nbdkit's file plugin
    cold: bool = False
    others: tuple[str, ...] = ("qemu-nbd", "file")


def _requests(name: str, image: str, goal: float, rw: str, *how: object, **more: object) -> Row:
    return Row(name, image, REQUESTS, served(fio(rw, *how)), goal, **more)  # type: ignore[arg-type]


def _copy(name: str, image: str, goal: float, cold: bool = False) -> Row:
    return Row(name, image, MEBIBYTES, served(copy), goal, cold=cold)


def _suite(image: str, beside_file: float | None = None) -> list[Row]:
    return [
        _requests(f"{image}/4k-1", image, 1.5, "randread", "4k", 1),
        _requests(f"{image}/4k-16", image, 1.5, "randread", "4k", 16, to_file=beside_file),
        _requests(f"{image}/4k-16x4", image, 1.5, "randread", "4k", 16, 4, to_file=beside_file),
        _requests(f"{image}/64k-16", image, 1.5, "randread", "64k", 16),
        _requests(f"{image}/64k-16x4", image, 1.5, "randread", "64k", 16, 4),
        _requests(f"{image}/1M-16", image, 1.5, "read", "1M", 16),
        _requests(f"{image}/1M-16x4", image, 1.5, "read", "1M", 16, 4),
        _copy(f"{image}/copy", image, 1.5),
    ]


def _compressed(image: str, copy_goal: float) -> list[Row]:
    fits = fio("randread", "4k", 16, 1, _FITS)
    warm = served(fits, warm=fio("read", "4k", 16, 1, _FITS))
    return [
        _copy(f"{image}/copy", image, copy_goal),
        _requests(f"{image}/4k-sequential", image, 5, "read", "4k", 16),
        Row(f"{image}/4k-cached", image, REQUESTS, warm, 5),
        _requests(f"{image}/4k-4xcache", image, 1.5, "randread", "4k", 16, 1, _FOUR_TIMES),
    ]


ROWS: list[Row] = [
    *_suite("plain", 0.8),
    *_suite("4k-clusters"),
    *_suite("fragmented"),
    *_suite("chain-of-5"),
    *_compressed("zlib", 2.5),
    *_compressed("zstd", 1.5),
    _copy("luks/copy", "luks", 2.5),
    _requests("luks/4k-1", "luks", 1.3, "randread", "4k", 1),
    _requests("luks/4k-16", "luks", 1.3, "randread", "4k", 16),
    _requests("luks/4k-16x4", "luks", 1.3, "randread", "4k", 16, 4),
    _requests("cold/4k-1", "plain", 1.0, "randread", "4k", 1, cold=True),
    _requests("cold/4k-16", "plain", 1.0, "randread", "4k", 16, cold=True),
    _copy("cold/copy", "plain", 1.0, cold=True),
    Row("map/1-tib", "1-tib", MAPS, served(extents), 1.5, others=("qemu-nbd",)),
    Row("to-file/copy", "plain", MEBIBYTES, to_file, 1.0, others=("qemu-img", "nbdcopy")),
]
