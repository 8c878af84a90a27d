"""The native engine gives what Python gives, or hands the request back: the same random requests to
both, damage, changes of the snapshot table, and nonsense in its own constructor."""

from __future__ import annotations

import os
import random
import re
import shutil
import subprocess
import sys
import zlib

import pytest
import zstandard
from support import damage, qemu, secret
from support.qemu import KiB, MiB, as_active, create, delete, io, patch, take
from support.server import ROOT

from qcow2snap_core import ImageError, SnapshotGone
from qcow2snap_core._native import loaded
from qcow2snap_core.image.opener import Options, open_image

pytestmark = pytest.mark.skipif(loaded.ENGINE is None, reason=loaded.MISSING or "not wanted")

# The sanitizers are for this process, not for QEMU's tools.
SANITIZED = os.environ.get("QCOW2SNAP_SANITIZED") == "1"
PRELOAD = os.environ.pop("LD_PRELOAD", "") if SANITIZED else ""

SIZE = 4 * MiB
CLUSTER = 64 * KiB
SECRET = "open sesame"


def scattered(path, seed=1, *, step=64 * KiB):
    """Some of each step is written, some of it zeroed, each at another place."""
    rng = random.Random(seed)
    commands = []
    for at in range(0, SIZE, step):
        n = step // 8
        write, zero = rng.randrange(0, 8), rng.randrange(0, 8)
        commands.append(f"write -P {1 + at // step % 250} {at + write * n} {n}")
        commands.append(f"write -z {at + zero * n} {n}")
    io(path, *rng.sample(commands, len(commands) * 3 // 4))


def plain(tmp_path, **options):
    path = create(tmp_path / "disk", SIZE, **options)
    scattered(path)
    return path


def chain(tmp_path):
    """Five layers, the lowest raw and the shortest, the others of several geometries."""
    raw = tmp_path / "raw"
    raw.write_bytes(random.Random(5).randbytes(SIZE - MiB - 300))
    below, form = raw, "raw"
    for n, options in enumerate(
        [{"cluster_size": "4k"}, {"extended_l2": "on"}, {"compat": "0.10"}, {}]
    ):
        path = create(tmp_path / f"layer{n}", SIZE, backing=(below, form), **options)
        scattered(path, n, step=256 * KiB)
        below, form = path, "qcow2"
    return below


def with_data_file(tmp_path):
    """QEMU takes no snapshot of one; its active disk is read the same way, in a chain."""
    path = create(tmp_path / "with", SIZE, data_file=tmp_path / "data", data_file_raw="off")
    scattered(path)
    return create(tmp_path / "disk", SIZE, backing=(path, "qcow2"))


def compressed(tmp_path, kind):
    raw = tmp_path / "raw"
    raw.write_bytes((b"compressible" * SIZE)[:SIZE])
    path = tmp_path / "disk"
    options = f"compression_type={kind}"
    qemu.run("qemu-img", "convert", "-c", "-f", "raw", "-O", "qcow2", "-o", options, raw, path)
    return path


KINDS = {
    "plain": plain,
    "version 2": lambda tmp: plain(tmp, compat="0.10"),
    "clusters of 512": lambda tmp: plain(tmp, cluster_size=512),
    "clusters of 2M": lambda tmp: plain(tmp, cluster_size="2M"),
    "extended L2": lambda tmp: plain(tmp, extended_l2="on"),
    "extended L2, 16K": lambda tmp: plain(tmp, extended_l2="on", cluster_size="16k"),
    "chain": chain,
    "data file": with_data_file,
    "zlib": lambda tmp: compressed(tmp, "zlib"),
    "zstd": lambda tmp: compressed(tmp, "zstd"),
    "empty": lambda tmp: create(tmp / "disk", SIZE),
}


def requests(seed, count=300, *, align=1):
    rng = random.Random(seed)
    for _ in range(count):
        length = min(SIZE, int(2 ** rng.uniform(0, 21)) // align * align)
        yield length, rng.randrange(0, (SIZE - length) // align + 1) * align


def without_engine(monkeypatch, path, **options):
    with monkeypatch.context() as m:
        m.setattr(loaded, "ENGINE", None)
        return open_image(str(path), Options(**options))


def compare(path, monkeypatch, *, align=1, **options):
    """Every request alike; returns how many of how many the engine answered at the second try."""
    count = 0
    with (
        open_image(str(path), Options(**options)) as fast,
        without_engine(monkeypatch, path, **options) as slow,
    ):
        with monkeypatch.context() as m:
            m.setattr(loaded, "ENGINE", None)
            reference = slow.snapshot("s")
        disk = fast.snapshot("s")
        assert reference.reader is None
        whole = qemu.content(as_active(path, "s")) if not options else None
        for length, offset in requests(7, align=align):
            expected = reference.pread(length, offset)
            if whole is not None:
                assert expected == whole[offset : offset + length]
            assert disk.pread(length, offset) == expected, (length, offset)
            buffer = bytearray(os.urandom(length))
            if disk.reader.read(buffer, offset):
                count += 1
                assert buffer == expected, (length, offset)
    return count


@pytest.mark.parametrize("kind", KINDS)
def test_both_give_the_same_and_the_engine_does_the_common_case(tmp_path, monkeypatch, kind):
    path = KINDS[kind](tmp_path)
    take(path, "s")
    assert compare(path, monkeypatch) == 300


@pytest.mark.parametrize("kind", ["zlib", "zstd"])
def test_whole_compressed_clusters_are_decoded_where_they_are_wanted(tmp_path, kind):
    path = compressed(tmp_path, kind)
    take(path, "s")
    whole = qemu.content(as_active(path, "s"))
    with open_image(str(path)) as opened:
        disk = opened.snapshot("s")
        disk.pread(512, 0)  # loads the slice of the table
        buffer = bytearray(3 * CLUSTER)
        assert disk.reader.read(buffer, CLUSTER)
        assert buffer == whole[CLUSTER:][: len(buffer)]
        # Who wants a part of one will want more of it: Python decodes it and keeps it.
        assert not disk.reader.read(buffer[:512], CLUSTER)


def deflated(data):
    encoder = zlib.compressobj(wbits=-12)
    return encoder.compress(data) + encoder.flush()


def zstd(**options):
    return zstandard.ZstdCompressor(**options).compress


def put_stream(path, guest, stream):
    """Put another stream, in whole sectors, in place of that of a compressed cluster."""
    at = -(-path.stat().st_size // CLUSTER) * CLUSTER
    patch(path, at, stream + bytes(-len(stream) % 512))
    entry = 1 << 62 | (len(stream) - 1) // 512 << 54 | at
    damage.put64(path, damage.l2_entry(path, "s", guest), entry)


CONTENT = random.Random(6).randbytes(CLUSTER // 2) + bytes(CLUSTER // 2)
STREAMS = {
    "deflate": (deflated(CONTENT), "engine"),
    "deflate, and more behind it": (deflated(CONTENT) + b"more", "engine"),
    "deflate, a byte too few": (deflated(CONTENT[1:]), None),
    "deflate, a byte too many": (deflated(CONTENT + b"x"), None),
    "deflate, cut off": (deflated(CONTENT)[: 16 * KiB], None),
    "deflate, damaged": (b"\xff" + deflated(CONTENT)[1:], None),
    "zstd": (zstd()(CONTENT), "engine"),
    "zstd, and more behind it": (zstd()(CONTENT) + b"more", "engine"),
    "zstd with a checksum": (zstd(write_checksum=True)(CONTENT), "engine"),
    "zstd with a wrong checksum": (zstd(write_checksum=True)(CONTENT)[:-1] + b"?", None),
    "zstd that says no size": (zstd(write_content_size=False)(CONTENT), "python"),
    "zstd, a byte too few": (zstd()(CONTENT[1:]), None),
    "zstd, a byte too many": (zstd()(CONTENT + b"x"), None),
    "zstd, cut off": (zstd()(CONTENT)[: 16 * KiB], None),
    "zstd, damaged": (zstd()(CONTENT)[:6] + b"?" * 1000, None),
    "zstd, another format": (b"\x50\x2a\x4d\x18\4\0\0\0rest", None),
}


@pytest.mark.parametrize("name", STREAMS)
def test_a_stream_gives_the_cluster_or_is_python_s_to_judge(tmp_path, name):
    """``who`` decodes it; None: it is an error."""
    stream, who = STREAMS[name]
    path = compressed(tmp_path, "zstd" if name.startswith("zstd") else "zlib")
    take(path, "s")
    put_stream(path, CLUSTER, stream)
    with open_image(str(path)) as opened:
        disk = opened.snapshot("s")
        disk.pread(512, 0)
        buffer = bytearray(CLUSTER)
        assert disk.reader.read(buffer, CLUSTER) == (who == "engine")
        if who is None:
            with pytest.raises(ImageError):
                disk.pread_into(buffer, CLUSTER)
        else:
            disk.pread_into(buffer, CLUSTER)
            assert buffer == CONTENT


@pytest.mark.parametrize("form", ["luks", "aes"])
def test_sectors_are_decrypted_as_python_does(tmp_path, monkeypatch, form):
    path = tmp_path / "disk"
    secret.create(path, SIZE, (SECRET,), **{"encrypt.format": form})
    for at in range(0, SIZE, 256 * KiB):
        secret.io(path, (SECRET,), f"write -P {1 + at // KiB % 251} {at} 100k")
    secret.take(path, (SECRET,), "s")
    secrets = {0: SECRET.encode()}
    assert compare(path, monkeypatch, align=512, passphrases=secrets) == 300
    assert compare(path, monkeypatch, passphrases=secrets) < 300  # odd offsets are Python's


@pytest.fixture
def image(tmp_path):
    path = plain(tmp_path)
    take(path, "s")
    with open_image(str(path)) as opened:
        yield opened


def test_a_slice_that_is_not_loaded_is_handed_back(image):
    disk = image.snapshot("s")
    buffer = bytearray(4096)
    assert not disk.reader.read(buffer, 0)
    expected = disk.pread(4096, 0)
    assert disk.reader.read(buffer, 0)
    assert buffer == expected


def test_a_deleted_snapshot_is_handed_back_and_then_gone(image):
    disk = image.snapshot("s")
    disk.pread(SIZE, 0)
    take(image.path, "other")
    delete(image.path, "s")
    assert not disk.reader.read(bytearray(512), 0)
    with pytest.raises(SnapshotGone):
        disk.pread(512, 0)
    assert not disk.reader.read(bytearray(512), 0)


def test_other_snapshots_that_come_and_go_are_python_s_and_then_the_engine_s_again(image):
    disk = image.snapshot("s")
    whole = disk.pread(SIZE, 0)
    for n in range(5):
        take(image.path, f"n{n}")
        assert disk.pread(SIZE, 0) == whole
        assert disk.reader.read(bytearray(SIZE), 0)


@pytest.mark.parametrize("keep", [0, 64 * KiB, 300 * KiB + 77])
def test_a_file_that_is_truncated_is_handed_back(image, keep):
    disk = image.snapshot("s")
    disk.pread(SIZE, 0)
    os.truncate(image.path, keep)
    assert not disk.reader.read(bytearray(SIZE), 0)
    with pytest.raises(ImageError):
        disk.pread(SIZE, 0)


@pytest.mark.parametrize(
    ("offset", "length"),
    [(-1, 1), (SIZE, 1), (SIZE - 1, 2), (2**63, 1), (2**64, 1), (2**64 - 1, 2), (0, SIZE + 1)],
)
def test_what_is_outside_the_disk_is_refused_by_both(image, offset, length):
    disk = image.snapshot("s")
    disk.pread(SIZE, 0)
    assert not disk.reader.read(bytearray(length), offset)
    with pytest.raises(ValueError, match="outside the disk"):
        disk.pread_into(bytearray(length), offset)


@pytest.mark.parametrize("word", ["reserved", "unaligned", "version 2 zero", "compressed"])
def test_an_entry_that_is_not_sound_is_handed_back(tmp_path, word):
    path = plain(tmp_path, compat="0.10")
    io(path, "write -P 9 0 64k")
    take(path, "s")
    l1 = qemu.snapshots(path)["s"].l1_table_offset
    l2 = qemu.field64(path, l1) & (1 << 56) - 1
    entry = qemu.field64(path, l2)
    bad = {
        "reserved": entry | 1 << 60,
        "unaligned": entry + 512,
        "version 2 zero": entry | 1,
        "compressed": entry | 1 << 62,
    }
    patch(path, l2, bad[word].to_bytes(8, "big"))
    with open_image(str(path)) as opened:
        disk = opened.snapshot("s")
        disk.pread(64 * KiB, MiB)  # loads the slice
        assert disk.reader.read(bytearray(512), MiB)
        assert not disk.reader.read(bytearray(512), 0)
        with pytest.raises(ImageError):
            disk.pread(512, 0)


TABLES = ({}, 1, 16, 13, 13, False, False, True, 0, {}, False, None, None)


def changed(at, value):
    return (3, SIZE, *TABLES[:at], value, *TABLES[at + 1 :])


@pytest.mark.parametrize(
    "layers",
    [
        (),
        ((),),
        ((-1, SIZE),),
        ((3, 2**63),),
        ((3, SIZE), (3,)),
        ((3, SIZE),) * 300,
        (changed(2, 64),),
        (changed(2, 8),),
        (changed(3, 40),),
        (changed(4, 14),),
        (changed(4, -1),),
        (changed(8, 2**63),),
        ((3, SIZE, {}, 1, 13, 10, 10, True, False, True, 0, {}, False, None, None),),
        (changed(11, "no cipher"),),
        (changed(12, 1),),
        (changed(0, []),),
        ((3, SIZE, {}),),
    ],
)
def test_a_layer_that_makes_no_sense_is_refused(layers):
    with pytest.raises((ValueError, TypeError, OverflowError)):
        loaded.ENGINE.Reader(3, layers)


def test_slices_of_any_content_and_length_do_no_harm(tmp_path):
    """Random words in random slices; what it would do is seen with sanitizers, below."""
    content = random.Random(3).randbytes(256 * KiB)
    (tmp_path / "data").write_bytes(content)
    fd = os.open(tmp_path / "data", os.O_RDONLY)
    rng = random.Random(4)
    answered = 0
    for _ in range(2000):
        extended, bits = rng.choice([(False, 9), (False, 16), (True, 14), (True, 16), (False, 21)])
        words = [
            rng.choice([0, 1, 1 << 63, 1 << 62, rng.getrandbits(64), rng.randrange(8) << bits])
            for _ in range(rng.randrange(0, 40))
        ]
        table = b"".join(w.to_bytes(8, "little") for w in words)
        tables = {(1, n): table for n in range(rng.randrange(3))} | {(1, ~0): table}
        layer = (fd, MiB, tables, 1, bits, 9, rng.randrange(10), extended)
        layer += (rng.random() < 0.5, rng.random() < 0.5, rng.randrange(MiB), {}, False, None)
        layer += (rng.choice([None, "deflate", "zstd", "unheard of"]),)
        reader = loaded.ENGINE.Reader(fd, (layer, (fd, 100 * KiB)))
        reader.expect(())
        buffer = bytearray(rng.randrange(200 * KiB))
        answered += reader.read(buffer, rng.randrange(MiB))
    os.close(fd)
    assert answered > 100


@pytest.mark.skipif(sys.version_info < (3, 13), reason="this Python has no way to ask")
def test_a_second_interpreter_goes_without():
    """The engine has one for ever; Python is told, and says so."""
    asked = (
        "from qcow2snap_core._native.loaded import ENGINE, MISSING\n"
        "assert ENGINE is None\n"
        "assert 'does not support loading in subinterpreters' in MISSING, MISSING"
    )
    script = (
        "import _interpreters, qcow2snap_core._native.engine\n"
        "second = _interpreters.create()\n"
        f"failed = _interpreters.run_string(second, {asked!r})\n"
        "assert failed is None, failed.formatted\n"
        "_interpreters.destroy(second)"
    )
    env = {**os.environ, "LD_PRELOAD": PRELOAD}  # it loads the engine
    qemu.run(sys.executable, "-W", "error", "-c", script, cwd=ROOT, env=env)


def test_a_free_threaded_python_goes_without():
    """3.13 finds the file, loads it and fails in the middle, with no ImportError."""
    script = (
        "import sys; sys.abiflags += 't'\n"
        "from qcow2snap_core._native.loaded import ENGINE, MISSING\n"
        "print(ENGINE, MISSING)"
    )
    said = qemu.run(sys.executable, "-c", script, cwd=ROOT)
    assert said.startswith("None no native engine, reads take more time: it needs Python's lock")


@pytest.mark.skipif(SANITIZED, reason="this is it")
def test_all_of_this_with_sanitizers(tmp_path):
    """The engine compiled with AddressSanitizer and UndefinedBehaviorSanitizer."""
    for folder in ("qcow2snap_core", "packaging", "tests/support"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("*.so"))
    (tmp_path / "tests" / "image").mkdir()
    for file in ("tests/conftest.py", "tests/image/test_native.py"):
        shutil.copy(ROOT / file, tmp_path / file)
    flags = "-O1 -g -fsanitize=address,undefined -fno-sanitize-recover=all"
    env = {**os.environ, "CFLAGS": flags, "QCOW2SNAP_SANITIZED": "1"}
    qemu.run(tmp_path / "packaging" / "build-native", env=env)
    preload = " ".join(
        qemu.run("cc", f"-print-file-name={name}.so").strip() for name in ("libasan", "libubsan")
    )
    env |= {"LD_PRELOAD": preload, "ASAN_OPTIONS": "detect_leaks=0:abort_on_error=1"}
    env |= {"PYTHONMALLOC": "malloc"}  # or nobody sees where one of Python's objects ends
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:xdist", "tests/image/test_native.py"]
    done = subprocess.run(
        command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=170, check=False
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "failed" not in done.stdout
    assert re.search(r"^[4-9]\d passed, [12] skipped", done.stdout, re.MULTILINE)
