"""Coverage-guided fuzzing of each parser: only errors of our own may come out of any bytes.

    make fuzz                                    a minute for all targets
    build/fuzz/bin/python tests/fuzz.py table 600        ten minutes for one

    make fuzz SANITIZE=1                         the native engine with AddressSanitizer and UBSan

The seeds are parts of images that QEMU has just made, and what earlier runs found worth keeping, in
tests/corpus/TARGET.zip (as OSS-Fuzz names and packs them); test_corpus.py tries those without a
fuzzer.  An input that does harm is left in build/fuzz/found/, and belongs into a test of its own.

    build/fuzz/bin/python tests/fuzz.py --keep 60        a minute for each, and a new tests/corpus
"""

# ruff: noqa: E402 (what is instrumented is imported first)
from __future__ import annotations

import hashlib
import os
import struct
import subprocess
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Generator, Iterator
from contextlib import suppress
from itertools import islice
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
FOUND = ROOT / "build" / "fuzz" / "found"
CORPUS = ROOT / "tests" / "corpus"
SECONDS = 9

if __name__ == "__main__" and sys.argv[1:2] not in ([], ["--keep"]):
    import atheris

    with atheris.instrument_imports(include=["qcow2snap_core"]):
        # All of them, by what they import in turn.
        import qcow2snap_core.decode.luks
        import qcow2snap_core.format.bitmaps
        import qcow2snap_core.image.disk
        import qcow2snap_core.image.image
        import qcow2snap_core.image.subclusters
        import qcow2snap_core.memory.acpi
        import qcow2snap_core.memory.cmos
        import qcow2snap_core.memory.savedram  # noqa: F401

from support import catalogue, damage, qemu, savedstate
from support.vm import machine

from qcow2snap_core._native.loaded import ENGINE
from qcow2snap_core.decode import codecs, luks
from qcow2snap_core.errors import Error, ImageError
from qcow2snap_core.format import bitmaps, snapshot_table
from qcow2snap_core.format import ondisk as q
from qcow2snap_core.format.header import read_header
from qcow2snap_core.image import clusters, disk, guard, layers, mapping, subclusters, tablereader
from qcow2snap_core.memory.acpi import AcpiTables
from qcow2snap_core.memory.blocks import PAGE, Block, Run
from qcow2snap_core.memory.cmos import find_end, read_cmos
from qcow2snap_core.memory.places import Wish, layout
from qcow2snap_core.memory.savedram import SavedRam
from qcow2snap_core.memory.stream import Stream
from qcow2snap_core.storage import libnbd
from qcow2snap_core.storage.local import ExpectedBytes, File
from qcow2snap_core.transfer import manifest, records
from qcow2snap_core.util.cache import BoundedCache


class Bytes:
    """A file that is the fuzzer's bytes; a :class:`qcow2snap_core.storage.local.Storage`."""

    path = "fuzzed"
    directory = "/"
    inode = (0, 0)

    def __init__(self, data: bytes) -> None:
        self._data = data

    def size(self) -> int:
        return len(self._data)

    def holds(self, pieces: ExpectedBytes) -> bool:
        return all(self.read(len(content), at) == content for content, at in pieces)

    def read(self, length: int, offset: int) -> bytes:
        assert length >= 0
        assert offset >= 0
        return self._data[offset : offset + length]


# --- Targets: each takes any bytes and raises nothing but what it lets through ---


def header(data: bytes) -> None:
    with suppress(Error):
        read_header(Bytes(data))  # type: ignore[arg-type]


def table(data: bytes) -> None:
    """The first twelve bytes are the header's count and offset."""
    file = bytearray(data[12:])
    file[60:72] = data[:12].ljust(12, b"\0")
    storage = Bytes(bytes(file))
    found = snapshot_table.read_table_once(storage)  # type: ignore[arg-type]
    assert not found.changed_during_read
    for s in found.snapshots[:3]:
        again = snapshot_table.read_table_once(storage, frozenset({s.identity}))  # type: ignore[arg-type]
        assert again.fingerprint is not None
        assert again.fingerprint.holds(storage)  # type: ignore[arg-type]


CLUSTER_BITS = {False: 9, True: 14}


def tables(data: bytes) -> None:
    """A byte of flags, then a file: the L1 table in its first cluster, L2 tables behind it."""
    flags = data[0] if data else 0
    wide = bool(flags & 1)
    bits = CLUSTER_BITS[wide]
    geometry = tablereader.Geometry(bits, 2 + bool(flags & 2), wide, bool(flags & 4))
    cache: mapping.TableCache = BoundedCache(1 << 20)
    parts = Bytes(data[1:]), geometry, 0, (1 << bits) // 8, cache, 0
    kind = subclusters.SubclusterMapping if wide else mapping.Mapping
    tested = kind(*parts)  # type: ignore[arg-type]
    size = tested.tables.bytes_per_l1_entry * 70
    step = tested.tables.bytes_per_l1_entry // 3 + 1
    for start in range(0, size, step):
        with suppress(ImageError):
            at = start
            for guest, length, _, host in islice(tested.runs(start, step), 200):
                assert guest == at
                assert length > 0
                assert host >= 0
                at += length


class Content(guard.Unguarded):
    """Lets the native engine read, with nothing to compare."""

    def __init__(self, storage: File) -> None:
        super().__init__(storage)
        self.plain_fd = storage.plain_fd

    def tell(self, expect: guard.Expect) -> None:
        expect(())


def engine(data: bytes) -> None:
    """Four requests of 4 bytes, then a file as in :func:`tables`, which is data too, and lies below
    as a raw file.  What the native engine answers is what Python answers."""
    fd = os.memfd_create("fuzzed")
    os.write(fd, data[17:])
    storage = File("fuzzed", "/fuzzed", fd)
    flags = data[16] if len(data) > 16 else 0
    wide = bool(flags & 1)
    bits = CLUSTER_BITS[wide]
    geometry = tablereader.Geometry(bits, 2 + bool(flags & 2), wide, bool(flags & 4))
    cache: mapping.TableCache = BoundedCache(1 << 20)
    kind = subclusters.SubclusterMapping if wide else mapping.Mapping
    tables = kind(storage, geometry, 0, 8, cache, 0)
    codec = codecs.Zstd() if flags & 8 else codecs.deflate()
    content = clusters.Clusters(storage, storage, bits, codec, BoundedCache(1 << 20))
    size, base = tables.tables.bytes_per_l1_entry * 4, (flags >> 4) * 4096
    tested = disk.Disk("x", size, tables, content, Content(storage), layers.RawLayer(storage), base)
    for at in range(0, 16, 4):
        where, length = struct.unpack("<HH", data[at : at + 4].ljust(4, b"\0"))
        offset = where * (size >> 16)
        length = min(1 + (length * (1 << bits) >> 12), size - offset)
        said: bytearray | None = bytearray(length)
        try:
            tested.fill(said, offset)
        except Error:
            said = None
        buffer = bytearray(length)
        if tested.reader is not None and tested.reader.read(buffer, offset):
            assert buffer == said


def decoders(data: bytes) -> None:
    """A byte that chooses, then a stream.  Whatever two decoders make of it is the same."""
    size = 4096
    if data[:1] and data[0] & 1:
        with suppress(ImageError):
            assert len(codecs.Zstd().decode(data[1:], size)) == size
        return
    made = []
    for decoder in (codecs.Zlib(), codecs.deflate()):
        with suppress(ImageError):
            made.append(bytes(decoder.decode(data[1:], size)))
    assert all(m == made[0] and len(m) == size for m in made)


def luks_header(data: bytes) -> None:
    luks.MAX_LUKS_ITERATIONS = 100  # type: ignore[misc]
    with suppress(Error):
        luks.open_luks(data.ljust(1 << 20, b"\0"), b"secret", "fuzzed")


def bitmap_directory(data: bytes) -> None:
    """The header's extension, then the file."""
    extension, file = data[:24].ljust(24, b"\0"), Bytes(data)
    fields = read_header(Bytes(EMPTY))._replace(  # type: ignore[arg-type]
        autoclear=q.AUTOCLEAR_BITMAPS, extensions={q.EXT_BITMAPS: extension}
    )
    with suppress(ImageError):
        for what, offset, length in islice(bitmaps.areas(file, fields), 10_000):  # type: ignore[arg-type]
            assert what.isprintable()
            assert offset >= 0
            assert length > 0


def uri(data: bytes) -> None:
    """What is not shown of a URI stays unshown, and what it says is not changed."""
    text = data.decode("utf-8", "surrogateescape")
    head, slashes, rest = text.partition("://")
    secret = f"{head}{slashes}user:hunter2@{rest.replace('hunter2', '')}"
    if libnbd.is_uri(secret) and not {"/", "?"} & set(rest.partition("@")[0]):
        assert "hunter2" not in libnbd.without_secrets(secret)
    assert libnbd.without_secrets(text).isprintable()
    once = libnbd.absolute(text)
    assert libnbd.absolute(once) == once
    assert libnbd.is_uri(once) == libnbd.is_uri(text)


def copy_record(data: bytes) -> None:
    """What is taken for a record says the same when it is written again."""
    with suppress(ValueError):
        found = records.parse(data)
        assert str(found.holds).isprintable()
        assert records.parse(records.text(found)) == found


def directory_manifest(data: bytes) -> None:
    """What is taken for a manifest says the same when it is written again, and leads nowhere."""
    with suppress(ValueError):
        found = manifest.parse(data)
        for entry in found.entries:
            assert str(entry).isprintable()
            for stored in filter(None, (entry.disk, entry.vm_state)):
                assert os.path.basename(stored.file) == stored.file
                assert stored.file.isprintable()
            assert len([*found.down_from(entry)]) <= len(found.entries)
        assert manifest.parse(manifest.text(found)) == found


def saved_memory(data: bytes) -> None:
    """Pages lie in their blocks, and blocks beside each other."""

    def pieces(start: int, end: int) -> Generator[bytes, None, None]:
        for at in range(start, end, 5000):
            yield data[at : min(end, at + 5000)]

    with suppress(Error):
        saved = SavedRam(Stream("fuzzed", len(data), len(data), pieces))
        for run in islice(saved.runs(), 10_000):
            assert 0 <= run.offset < run.offset + run.length <= saved.blocks[run.block].size
            assert run.data is None or len(run.data) == run.length
        end = 0
        for place in layout(saved.machine, saved.blocks, Wish()).placed:
            assert place.address >= end
            assert 0 <= place.offset < place.offset + place.length <= saved.blocks[place.block].size
            end = place.address + place.length


def cmos(data: bytes) -> None:
    def read(length: int, offset: int) -> bytes:
        assert 0 <= offset <= offset + length <= len(data)
        return data[offset : offset + length]

    read_cmos(read, len(data))
    end = find_end(read, 0, len(data))
    assert end is None or 0 < end <= len(data)


def acpi(data: bytes) -> None:
    size = max(1, -(-len(data) // PAGE)) * PAGE
    tables = AcpiTables([Block("/rom@etc/acpi/tables", size)])
    tables.note(Run(0, 0, size, data.ljust(size, b"\0")))
    said = tables.above_4g(1 << 30)
    assert said is None or said >= 1 << 32


# A header that is good: version 3, clusters of 64 KiB.
EMPTY = struct.pack(">4sIQII", b"QFI\xfb", 3, 0, 0, 16).ljust(100, b"\0") + struct.pack(">I", 104)

TARGETS: dict[str, Callable[[bytes], None]] = {
    "header": header,
    "table": table,
    "tables": tables,
    "engine": engine,
    "decoders": decoders,
    "luks": luks_header,
    "bitmaps": bitmap_directory,
    "uri": uri,
    "record": copy_record,
    "manifest": directory_manifest,
    "memory": saved_memory,
    "cmos": cmos,
    "acpi": acpi,
}


# --- Seeds ---


def seeds(directory: Path, target: str) -> Iterator[bytes]:
    if target == "luks":
        path = directory / "luks.qcow2"
        secret = f"secret,id=s,data={'x' * 8}"
        options = "encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10"
        create = ("qemu-img", "create", "-q", "-f", "qcow2", "--object", secret, "-o", options)
        qemu.run(*create, path, "64k")
        at = path.read_bytes().index(luks.MAGIC)
        seed = bytearray(qemu.peek(path, at, luks.HEADER_LENGTH))
        seed[164:168] = struct.pack(">I", 10)  # of the digest
        seed[212:216] = struct.pack(">I", 10)  # of the first key slot
        yield bytes(seed)
        return
    if target == "uri":
        yield b"nbds+unix://user:password@/export?socket=/run/a&tls-psk-file=keys"
        yield b"nbd://[::1]:10809/a%20b"
        return
    if target == "record":
        who = records.Held("1", "weekly", 1_700_000_000, 5, 7, "ab" * 32)
        yield records.text(records.Record(who, size=1 << 26, mtime_ns=1_700_000_000_123_456_789))
        yield records.text(records.Record(who._replace(id="2"), who, between=True))
        return
    if target in ("manifest", "acpi"):
        for file in corpus_of(target):
            yield file
        return
    if target == "memory":
        page = os.urandom(savedstate.PAGE)
        pages = savedstate.page(0, page, block="pc.ram") + savedstate.zeros([savedstate.PAGE])
        packed = zlib.compress(page)
        pages += savedstate.page(
            0, len(packed).to_bytes(4, "big") + packed, savedstate.COMPRESSED, "ram-node0"
        )
        blocks = [("pc.ram", 2 * savedstate.PAGE), ("ram-node0", savedstate.PAGE)]
        yield savedstate.state(blocks, [pages, b""], more=savedstate.MAPPED_RAM.replace(b"m", b"n"))
        header = savedstate.mapped_header(128, 136)
        yield savedstate.head("pc-q35-11.0", savedstate.MAPPED_RAM) + header + page
        return
    if target == "cmos":
        path = qemu.create(directory / "cmos.qcow2", 1 << 20)
        with machine(path, "-vga", "none") as vm:
            vm.migrate(f"exec:cat >{directory / 'sent'}")
        state = (directory / "sent").read_bytes()
        yield state[state.index(b"mc146818rtc") - 6 :][-65536:]
        yield state[-65536:]
        return
    if target == "bitmaps":
        path = qemu.create(directory / "bitmaps.qcow2", 1 << 20)
        for name in ("one", "two"):
            qemu.run("qemu-img", "bitmap", "--add", "-g", 4096, path, name)
        image = path.read_bytes()
        extension = image[image.index(struct.pack(">II", q.EXT_BITMAPS, 24)) + 8 :][:24]
        count, _, size, at = struct.unpack(">IIQQ", extension)
        directory_bytes = bytearray(image[at : at + size])
        directory_bytes[:8] = struct.pack(">Q", 24 + size)  # of the first one's table
        table = struct.pack(">QQ", 1 << 16, 1)
        yield struct.pack(">IIQQ", count, 0, size, 24) + directory_bytes + table
        return
    if target == "engine":
        encoder = zlib.compressobj(wbits=-12)
        stream = encoder.compress(bytes(range(256)) * 2) + encoder.flush()
        tables = [1 << 63 | 512, 1 << 62 | 1024, 1 << 62 | 1024, 1 << 63 | 1024]
        file = struct.pack(">Q504xQQQ488x", *tables) + stream
        yield struct.pack("<8HB", 0, 8192, 0, 9999, 0, 999, 1, 1, 2) + file.ljust(2048, b"\0")
    for kind in ("plain", "v2", "zstd", "extl2", "overlay"):
        path = catalogue.make(directory, kind)
        image = path.read_bytes()
        if target == "header":
            yield image[:4096]
        elif target == "table":
            at = int.from_bytes(image[64:72], "big")
            cluster = damage.cluster_size(path)
            place = struct.pack(">IQ", 2, cluster)
            yield place + image[:cluster] + image[at : at + 200]
        elif target in ("tables", "engine"):
            wide = kind == "extl2"
            cluster = 1 << CLUSTER_BITS[wide]
            l2 = damage.l2_table(path, "BAD", 0)
            l1 = struct.pack(">Q", 1 << 63 | cluster).ljust(cluster, b"\0")
            flags = bytes([wide | (kind != "v2") << 1 | (kind == "zstd") << 3])
            requests = struct.pack("<8H", 0, 9999, 1, 4096, 2, 8192, 3, 1) * (target == "engine")
            yield requests + flags + l1 + image[l2 : l2 + min(cluster, 1024)]
        elif target == "decoders" and kind in ("plain", "zstd"):
            at, sectors = damage.stream(path, "BAD", 0)
            yield bytes([kind == "zstd"]) + image[at : at + 512 * (sectors + 1)]


def corpus_of(target: str) -> list[bytes]:
    """The inputs that are kept."""
    if not (CORPUS / f"{target}.zip").exists():
        return []
    with zipfile.ZipFile(CORPUS / f"{target}.zip") as kept:
        return [kept.read(name) for name in kept.namelist()]


MOST_KEPT, MOST_KEPT_BYTES = 120, 8192  # inputs of a target, and how long one of them may be


def keep(target: str, found: list[bytes]) -> None:
    """The shortest ones: the fuzzer stores none that took no new branch."""
    CORPUS.mkdir(exist_ok=True)
    chosen = sorted({x for x in found if len(x) <= MOST_KEPT_BYTES}, key=len)[:MOST_KEPT]
    with zipfile.ZipFile(CORPUS / f"{target}.zip", "w", zipfile.ZIP_DEFLATED) as kept:
        for data in chosen:
            when = zipfile.ZipInfo(hashlib.sha1(data).hexdigest())  # of 1980: the same file again
            kept.writestr(when, data, zipfile.ZIP_DEFLATED)


def fuzz(target: str, seconds: int, into: str | None = None) -> None:
    os.environ.pop("LD_PRELOAD", None)  # the sanitizers are not for QEMU's tools
    FOUND.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as directory:
        corpus = Path(into or directory, "corpus")
        corpus.mkdir()
        for number, seed in enumerate([*seeds(Path(directory), target), *corpus_of(target)]):
            (corpus / str(number)).write_bytes(seed)
        limits = [f"-max_total_time={seconds}", "-timeout=5", "-rss_limit_mb=1024"]
        limits += ["-max_len=65536", "-print_final_stats=1", "-verbosity=1"]
        prefix = f"-artifact_prefix={FOUND / target}-"
        atheris.Setup([sys.argv[0], *limits, prefix, str(corpus)], TARGETS[target])
        atheris.Fuzz()


def main() -> int:
    keeping = sys.argv[1:2] == ["--keep"]
    if len(sys.argv) > 1 and not keeping:
        fuzz(sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else SECONDS, *sys.argv[3:4])
        return 0
    with tempfile.TemporaryDirectory() as directory:
        return all_targets(Path(directory), sys.argv[2] if keeping else None)


def all_targets(directory: Path, keep_after: str | None) -> int:
    bad = []
    if ENGINE is None:
        del TARGETS["engine"]
        print("engine: it is not there to be fuzzed")
    for target in TARGETS:
        place = directory / target
        place.mkdir()
        done = subprocess.run(
            [sys.executable, __file__, target, keep_after or str(SECONDS), str(place)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            check=False,
        )
        lines = done.stdout.splitlines()
        runs = next((x.split(":")[-1] for x in lines if "number_of_executed_units" in x), " no")
        print(
            f"{target}:{runs} inputs, {'harm found' if done.returncode else 'no harm'}", flush=True
        )
        if keep_after:
            keep(target, [file.read_bytes() for file in (place / "corpus").iterdir()])
        if done.returncode:
            bad.append(target)
            print("\n".join(lines[-60:]))
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
