"""The layouts of ondisk.py beside construct's way of saying the same, written from QEMU's spec."""

from __future__ import annotations

import pytest
from construct import Bytes, Int16ub, Int32ub, Int64ub, Struct
from support import qemu

from qcow2snap_core.format import ondisk as q

HEADER_V2 = Struct(
    "magic" / Bytes(4),
    "version" / Int32ub,
    "backing_file_offset" / Int64ub,
    "backing_file_size" / Int32ub,
    "cluster_bits" / Int32ub,
    "size" / Int64ub,
    "crypt_method" / Int32ub,
    "l1_size" / Int32ub,
    "l1_table_offset" / Int64ub,
    "refcount_table_offset" / Int64ub,
    "refcount_table_clusters" / Int32ub,
    "nb_snapshots" / Int32ub,
    "snapshots_offset" / Int64ub,
)
HEADER_V3 = Struct(
    "incompatible_features" / Int64ub,
    "compatible_features" / Int64ub,
    "autoclear_features" / Int64ub,
    "refcount_order" / Int32ub,
    "header_length" / Int32ub,
)
EXTENSION = Struct("type" / Int32ub, "length" / Int32ub)
CRYPTO_HEADER = Struct("offset" / Int64ub, "length" / Int64ub)
SNAPSHOT_FIELDS = Struct("nb_snapshots" / Int32ub, "snapshots_offset" / Int64ub)
SNAPSHOT_HEAD = Struct(
    "l1_table_offset" / Int64ub,
    "l1_size" / Int32ub,
    "id_str_size" / Int16ub,
    "name_size" / Int16ub,
    "date_sec" / Int32ub,
    "date_nsec" / Int32ub,
    "vm_clock_nsec" / Int64ub,
    "vm_state_size" / Int32ub,
    "extra_data_size" / Int32ub,
)

BOTH = {
    "header, version 2": (q.HEADER_V2, HEADER_V2),
    "header, version 3": (q.HEADER_V3, HEADER_V3),
    "extension": (q.EXTENSION, EXTENSION),
    "crypto header": (q.CRYPTO_HEADER, CRYPTO_HEADER),
    "the fields that lead to the snapshot table": (q.SNAPSHOT_FIELDS, SNAPSHOT_FIELDS),
    "snapshot": (q.SNAPSHOT_HEAD, SNAPSHOT_HEAD),
}


def test_every_layout_is_here() -> None:
    declared = {id(x) for x in vars(q).values() if isinstance(x, q.Layout)}
    assert declared == {id(layout) for layout, _ in BOTH.values()}


@pytest.mark.parametrize(("layout", "spec"), BOTH.values(), ids=BOTH)
def test_each_field_has_its_name_its_place_and_its_size(layout: q.Layout, spec: Struct) -> None:
    assert layout.length == spec.sizeof()
    assert list(layout.codes) == [field.name for field in spec.subcons]
    at = 0
    for field in spec.subcons:
        size = field.sizeof()
        marked = bytes(at) + bytes(range(1, size + 1)) + bytes(spec.sizeof() - at - size)
        expected = {k: v for k, v in spec.parse(marked).items() if k != "_io"}
        assert vars(layout.parse(marked)) == expected
        assert layout.unpack(marked) == tuple(expected.values())
        at += size


def test_what_follows_a_structure_is_ignored(tmp_path) -> None:
    start = qemu.create(tmp_path / "disk.qcow2", 3 << 20).read_bytes()
    header = q.HEADER_V2.parse(start)
    assert (header.magic, header.version, header.size) == (q.MAGIC, 3, 3 << 20)
    assert q.HEADER_V3.parse(start[q.HEADER_V2_LENGTH :]).header_length == 112


def test_the_lengths_are_the_spec_s() -> None:
    assert (q.HEADER_V2_LENGTH, q.HEADER_V3_LENGTH, q.SNAPSHOT_FIELDS_OFFSET) == (72, 104, 60)
    assert start_of(HEADER_V2, "nb_snapshots") == q.SNAPSHOT_FIELDS_OFFSET
    assert start_of(HEADER_V2, "cluster_bits") == q.ACTIVE_OFFSET


def start_of(spec: Struct, name: str) -> int:
    names = [field.name for field in spec.subcons]
    return sum(field.sizeof() for field in spec.subcons[: names.index(name)])
