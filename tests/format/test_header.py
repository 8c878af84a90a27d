"""The header: read as qemu-img reads it, and every field that is wrong refused by its name."""

from __future__ import annotations

import struct

import pytest
from support.devices import opened
from support.qemu import KiB, MiB, create, info, patch

from qcow2snap_core.errors import ImageError
from qcow2snap_core.format import ondisk as q
from qcow2snap_core.format.header import read_header


def header(path):
    with opened(path) as storage:
        return read_header(storage)


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """One image of each version, with a backing file."""
    directory = tmp_path_factory.mktemp("header")
    create(directory / "base", 64 * KiB)
    return {
        compat: create(directory / compat, MiB, backing=("base", "qcow2"), compat=compat)
        for compat in ("0.10", "1.1")
    }


@pytest.fixture
def image(tmp_path, bases):
    """A copy of one of them."""

    def make(compat="1.1"):
        path = tmp_path / "disk.qcow2"
        path.write_bytes(bases[compat].read_bytes())
        return path

    return make


@pytest.mark.parametrize(
    ("size", "options"),
    [
        (MiB, {"compat": "0.10"}),
        (MiB, {"compat": "1.1"}),
        (7 * MiB + 512, {"compat": "1.1", "cluster_size": 512}),
        (MiB, {"compat": "0.10", "cluster_size": 2 * MiB}),
        (MiB, {"compat": "1.1", "refcount_bits": 1}),
        (MiB, {"compat": "1.1", "refcount_bits": 64}),
        (0, {"compat": "1.1", "lazy_refcounts": "on"}),
    ],
)
def test_an_image_of_qemu_is_read_as_qemu_reads_it(tmp_path, size, options):
    path = create(tmp_path / "disk.qcow2", size, **options)
    h, said = header(path), info(path)
    details = said["format-specific"]["data"]
    assert h.size == said["virtual-size"] == size
    assert h.cluster_size == said["cluster-size"]
    assert {2: "0.10", 3: "1.1"}[h.version] == details["compat"]
    assert h.refcount_bits == details["refcount-bits"]
    assert (h.backing_file, h.backing_format) == (None, None)
    assert not h.dirty


@pytest.mark.parametrize("compat", ["0.10", "1.1"])
def test_the_backing_file_is_what_qemu_recorded(bases, compat):
    h, said = header(bases[compat]), info(bases[compat])
    assert h.backing_file.decode() == said["backing-filename"] == "base"
    assert h.backing_format == said["backing-filename-format"] == "qcow2"


V2_FIELDS = [
    (0, ">4s", b"QFI\0", "not a qcow2 image"),
    (0, ">4s", b"KDMV", "not a qcow2 image"),
    (4, ">I", 1, "qcow2 version 1 is not supported"),
    (4, ">I", 4, "qcow2 version 4 is not supported"),
    (4, ">I", 0, "qcow2 version 0 is not supported"),
    (16, ">I", 1024, "the backing file's name (1024 bytes"),
    (16, ">I", 0xFFFFFFFF, "does not fit in the first cluster"),
    (8, ">Q", 65536 - 3, "does not fit in the first cluster"),
    (8, ">Q", 1 << 40, "does not fit in the first cluster"),
    (8, ">Q", 71, "the backing file's name at 0x47 overlaps the header"),
    (20, ">I", 8, "cluster_bits is 8, the format allows 9 to 21"),
    (20, ">I", 22, "cluster_bits is 22, the format allows 9 to 21"),
    (20, ">I", 0, "cluster_bits is 0,"),
    (20, ">I", 0xFFFFFFFF, "cluster_bits is 4294967295,"),
    (32, ">I", 3, "encryption method 3 is unknown"),
]
V3_FIELDS = [
    (8, ">Q", 103, "the backing file's name at 0x67 overlaps the header"),
    (72, ">Q", 2, "the image is marked corrupt"),
    (72, ">Q", 3, "the image is marked corrupt"),
    (72, ">Q", 1 << 6, "needs features that are not supported: bit 6"),
    (72, ">Q", 1 << 63 | 1 << 40, "bit 40, bit 63"),
    (100, ">I", 103, "header_length is 103, which is not from 104"),
    (100, ">I", 0, "header_length is 0,"),
    (100, ">I", 65537, "header_length is 65537,"),
    (104, ">B", 1, "compression type 1 without its feature bit"),
    (104, ">B", 255, "compression type 255"),
]


@pytest.mark.parametrize(
    ("compat", "field"),
    [(c, f) for c in ("0.10", "1.1") for f in V2_FIELDS] + [("1.1", f) for f in V3_FIELDS],
)
def test_a_field_that_is_wrong_is_refused_by_name(image, compat, field):
    offset, form, value, message = field
    path = image(compat)
    patch(path, offset, struct.pack(form, value))
    with pytest.raises(ImageError) as caught:
        header(path)
    assert str(caught.value).startswith(f"{str(path)!r}: ")
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("compat", "offset", "form", "value"),
    [
        ("0.10", 36, ">IQ", (0xFFFFFFFF, 0x333)),  # the active L1
        ("0.10", 48, ">QI", (0x12345, 0xFFFFFFFF)),  # the refcounts
        ("1.1", 72, ">Q", (1,)),  # dirty
        ("1.1", 80, ">Q", (2**64 - 1,)),  # compatible features, all of them
        ("1.1", 88, ">Q", (2**64 - 1,)),  # autoclear features
        ("1.1", 96, ">I", (0xFFFFFFFF,)),  # refcount_order
        ("0.10", 72, ">Q", (2,)),  # no feature bits in version 2
    ],
)
def test_what_a_snapshot_does_not_depend_on_may_be_anything(image, compat, offset, form, value):
    path = image(compat)
    patch(path, offset, struct.pack(form, *value))
    assert header(path).size == MiB


def test_the_dirty_bit_is_told(image):
    path = image()
    patch(path, 72, struct.pack(">Q", 1))
    assert header(path).dirty


def test_an_unknown_feature_goes_by_the_images_own_name_for_it(image):
    path = image()
    name = b"dirty bit"
    at = path.read_bytes().index(b"\0\0" + name)
    patch(path, at, bytes([0, 40]) + b"new\nthing".ljust(46, b"\0"))
    patch(path, 72, struct.pack(">Q", 1 << 40))
    with pytest.raises(ImageError, match=r"not supported: 'new\\nthing' \(bit 40\)$"):
        header(path)


@pytest.mark.parametrize("compat", ["0.10", "1.1"])
@pytest.mark.parametrize("length", [4, 8, 60, 71])
def test_a_file_that_ends_inside_the_header_says_so(image, compat, length):
    path = image(compat)
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(ImageError, match=f"ends inside the qcow2 header, after {length} bytes"):
        header(path)


def test_version_3_has_a_longer_header(image):
    path = image()
    path.write_bytes(path.read_bytes()[:103])
    with pytest.raises(ImageError, match="ends inside the qcow2 header, after 103 bytes"):
        header(path)


@pytest.mark.parametrize("length", [0, 1, 3])
def test_a_file_too_short_for_the_magic_is_no_qcow2_image(tmp_path, length):
    path = tmp_path / "short"
    path.write_bytes(b"QFI\xfb"[:length])
    with pytest.raises(ImageError, match="not a qcow2 image"):
        header(path)


def test_a_file_that_ends_inside_the_backing_name_says_so(image):
    path = image()
    whole = path.read_bytes()
    name_offset = int.from_bytes(whole[8:16], "big")
    path.write_bytes(whole[: name_offset + 2])
    with pytest.raises(ImageError, match="the file ends inside the backing file's name"):
        header(path)


@pytest.mark.parametrize("name_offset", [1, 100, 104, 65536])
def test_a_backing_name_of_no_length_is_none_wherever_it_lies(image, name_offset):
    path = image()
    patch(path, 8, struct.pack(">QI", name_offset, 0))
    assert header(path).backing_file is None
    assert "backing-filename" not in info(path)


# --- Header extensions ---


def with_extensions(path, *extensions):
    """Replace what stands after the header; an extension is (type, data) or raw bytes."""
    area = b"".join(
        e if isinstance(e, bytes) else struct.pack(">II", e[0], len(e[1])) + pad(e[1])
        for e in extensions
    )
    patch(path, 8, bytes(12))  # no backing file: the extensions may fill the cluster
    patch(path, 112, area)
    return path


def pad(data):
    return data + bytes(-len(data) % 8)


def test_unknown_extensions_are_passed_over(image):
    path = with_extensions(image(), (0x12345678, b"whatever"), (0xE2792ACA, b"raw"), bytes(8))
    assert header(path).backing_format == "raw"
    assert 0x12345678 not in header(path).extensions  # nor kept: it may have megabytes


def test_nothing_after_the_end_marker_is_read(image):
    path = with_extensions(image(), bytes(8), (0xE2792ACA, b"raw"))
    assert header(path).extensions == {}


@pytest.mark.parametrize("length", [65536, 0xFFFFFFFF, 65536 - 112 - 8 + 1])
def test_an_extension_that_does_not_fit_is_refused(image, length):
    path = with_extensions(image(), struct.pack(">II", 0x12345678, length))
    with pytest.raises(ImageError, match=f"extension 0x12345678 of {length} bytes does not fit"):
        header(path)


def test_an_extension_may_fill_the_cluster_to_its_end(image):
    path = with_extensions(image(), (0x12345678, b"x" * (65536 - 112 - 8)))
    assert header(path).backing_file is None


@pytest.mark.parametrize(
    ("kind", "most"),
    [(q.EXT_BACKING_FORMAT, 15), (q.EXT_DATA_FILE, 4095), (q.EXT_CRYPTO_HEADER, 16)],
)
def test_an_extension_longer_than_any_of_its_kind_is_refused(image, kind, most):
    assert (
        header(with_extensions(image(), (kind, b"x" * most), bytes(8))).extensions[kind]
        == b"x" * most
    )
    with pytest.raises(ImageError, match=f"header extension {kind:#010x} has {most + 1} bytes"):
        header(with_extensions(image(), (kind, b"x" * (most + 1)), bytes(8)))


def test_endless_extensions_are_refused(image):
    path = with_extensions(image(), *[(0x12345678, b"")] * 1000)
    with pytest.raises(ImageError, match="more than 64 header extensions"):
        header(path)
