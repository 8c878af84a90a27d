"""Journals of ext and logs of XFS that no kernel has written."""

from __future__ import annotations

import io
import struct
import tracemalloc
from collections.abc import Mapping

import pytest
from support.qemu import MiB

from qcow2snap_core.errors import ImageError
from qcow2snap_core.files.journal import Read, is_xfs_log_dirty, replayed
from qcow2snap_core.files.volumes import _judge_ext
from qcow2snap_core.files.window import Window

MAGIC = 0xC03B3998
DESCRIPTOR, COMMIT, SUPERBLOCK, REVOKE = 1, 2, 4, 5
LAST, SAME_UUID = 8, 2


def block(kind: int, sequence: int, content: bytes, size: int) -> bytes:
    return (struct.pack(">3I", MAGIC, kind, sequence) + content).ljust(size, b"\0")


def descriptor(sequence: int, targets: list[int], size: int) -> bytes:
    flags = [SAME_UUID] * (len(targets) - 1) + [SAME_UUID | LAST]
    tags = [struct.pack(">I2xH", *each) for each in zip(targets, flags, strict=True)]
    return block(DESCRIPTOR, sequence, b"".join(tags), size)


def revoke(sequence: int, numbers: list[int], size: int) -> bytes:
    content = struct.pack(f">I{len(numbers)}I", 16 + 4 * len(numbers), *numbers)
    return block(REVOKE, sequence, content, size)


def journal(blocks: Mapping[int, bytes], others: bytes, total: int) -> tuple[Read, int]:
    """One that begins with its block 1; ``others`` are those that are not given."""
    size = len(others)
    fields = struct.pack(">5I4xI", size, total, 1, 1, 1, 1)
    superblock = block(SUPERBLOCK, 0, fields, size)

    def read(offset: int, length: int) -> bytes:
        number = offset // size
        return (superblock if not number else blocks.get(number, others))[:length]

    return read, total * size


def test_what_was_revoked_is_written_again_only_later() -> None:
    data = {n: bytes([n]) * 1024 for n in (2, 3, 6, 10)}
    log = {
        1: descriptor(1, [70, 80], 1024),
        4: block(COMMIT, 1, b"", 1024),
        5: descriptor(2, [90], 1024),
        7: revoke(2, [70, 80, 90], 1024),
        8: block(COMMIT, 2, b"", 1024),
        9: descriptor(3, [80], 1024),
        11: block(COMMIT, 3, b"", 1024),
        12: revoke(4, [80], 1024),  # without its end
    }
    assert replayed(*journal(log | data, bytes(1024), 64)) == (1024, {80: data[10]})


def test_revokes_take_no_memory() -> None:
    """An image can have the same cluster everywhere: a journal of such blocks costs nothing."""
    numbers = [*range((65536 - 16) // 4)]
    read, size = journal({}, revoke(1, numbers, 65536), 1000)
    tracemalloc.start()
    try:
        assert replayed(read, size) == (65536, {})
        assert tracemalloc.get_traced_memory()[1] < 8 * MiB
    finally:
        tracemalloc.stop()


def test_a_journal_that_goes_round() -> None:
    """Transactions that lie over one another have more blocks than the journal."""
    log: dict[int, bytes] = {}
    for number in range(100):
        at = 122 * number
        targets = [*range(120 * number, 120 * number + 120)]
        log[1 + at % 1009] = descriptor(1 + number, targets, 1024)
        log[1 + (at + 121) % 1009] = block(COMMIT, 1 + number, b"", 1024)
    assert len(log) == 200
    with pytest.raises(ImageError, match="it has no end"):
        replayed(*journal(log, bytes(1024), 1010))


def test_a_log_of_xfs_at_the_end_of_the_disk() -> None:
    header = bytearray(256)
    struct.pack_into(">I", header, 4, 4096)
    struct.pack_into(">Q", header, 48, 15)  # the last of 16 blocks
    struct.pack_into(">I", header, 84, 16)
    struct.pack_into(">I", header, 96, 1)
    header[124] = 4
    record = bytearray(4096)
    struct.pack_into(">4sIIIQ", record, 0, b"\xfe\xed\xba\xbe", 1, 2, 0, 1 << 32)
    struct.pack_into(">I", record, 40, 1)  # operations
    struct.pack_into(">I", record, 320, 0xFFFF_FFFF)  # of which the first is behind so much
    disk = bytes(header).ljust(15 * 4096, b"\0") + bytes(record)
    with pytest.raises(ImageError, match="ends inside the 12 bytes of metadata"):
        is_xfs_log_dirty(Window(io.BytesIO(disk), 0, len(disk)))


def test_a_disk_that_ends_in_the_superblock() -> None:
    disk = bytes(1080) + b"\x53\xef" + bytes(20)
    with pytest.raises(ImageError, match="ends inside the 4 bytes of metadata"):
        _judge_ext(Window(io.BytesIO(disk), 0, len(disk)), ("tsk",))
