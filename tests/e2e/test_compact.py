"""``qcow2snap compact``: every snapshot as it was, each cluster once, and nothing else."""

from __future__ import annotations

import os
import random
import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest
from support import command, damage, qemu, secret
from support.qemu import KiB, MiB
from support.tables import Entry, write_table
from support.vm import machine

from qcow2snap_core import cli
from qcow2snap_core.transfer.newimage import NewImage

SIZE = 4 * MiB
FORMATS: dict[str, dict[str, object]] = {
    "plain": {},
    "512": {"cluster_size": 512},
    "2M": {"cluster_size": 2 * MiB},
    "version 2": {"compat": "0.10"},
    "extended L2": {"extended_l2": "on"},
    "zstd": {"compression_type": "zstd"},
    "a disk that ends inside a cluster": {"cluster_size": 64 * KiB},
}


def assert_same(path: Path, out: Path) -> None:
    """All that QEMU says of the two, and every byte."""
    qemu.assert_same_snapshots(out, path)
    qemu.run("qemu-img", "compare", "-q", path, out)


HOW: list[tuple[str, list[str]]] = [
    *((kind, []) for kind in FORMATS),
    *(("plain", ["--compress", word]) for word in ("zlib", "zstd")),
    ("extended L2", ["--compress", "zlib"]),
    ("zstd", ["--compress", "zlib"]),
    ("a disk that ends inside a cluster", ["--compress", "zstd"]),
]


@pytest.mark.parametrize(("kind", "compress"), HOW)
def test_every_snapshot_is_there_again(tmp_path: Path, kind: str, compress: list[str]) -> None:
    path, out = tmp_path / "disk.qcow2", tmp_path / "out.qcow2"
    size = SIZE - 5 * 512 if "ends" in kind else SIZE
    packed = kind not in ("extended L2", "a disk that ends inside a cluster")
    qemu.RandomImage(path, 11, size, options=FORMATS[kind], compressed=packed).make()
    qemu.delete(path, "one")
    command.qcow2snap("compact", path, out, *compress)
    assert_same(path, out)
    command.qcow2snap("check", out)
    if not compress:
        assert out.stat().st_size < path.stat().st_size


def test_a_cluster_that_snapshots_share_is_written_once(tmp_path: Path) -> None:
    """Also where the states are no line: one was applied in between."""
    path, out = qemu.create(tmp_path / "disk.qcow2", 16 * MiB), tmp_path / "out.qcow2"
    qemu.io(path, "write -P 1 0 8M")
    qemu.take(path, "a")
    qemu.io(path, "write -P 2 0 4M")
    qemu.take(path, "b")
    qemu.run("qemu-img", "snapshot", "-a", "a", path)
    qemu.io(path, "write -P 3 4M 2M")
    qemu.take(path, "c")
    command.qcow2snap("compact", path, out)
    assert_same(path, out)
    assert out.stat().st_size < 15 * MiB  # 8 + 4 + 2, and tables
    for name in ("a", "b"):  # and QEMU counts as we do
        qemu.delete(out, name)
    qemu.run("qemu-img", "check", "-q", out)


def test_space_of_deleted_snapshots_is_gone(tmp_path: Path) -> None:
    path, out = qemu.create(tmp_path / "disk.qcow2", 32 * MiB), tmp_path / "out.qcow2"
    for n in range(4):
        qemu.io(path, f"write -P {n + 1} 0 8M")
        qemu.take(path, f"s{n}")
    for n in range(3):
        qemu.delete(path, f"s{n}")
    command.qcow2snap("compact", path, out)
    assert_same(path, out)
    assert path.stat().st_size > 32 * MiB
    assert out.stat().st_size < 9 * MiB


def test_subclusters_that_one_snapshot_shows_and_the_other_not(tmp_path: Path) -> None:
    """Both entries lead to one cluster: QEMU writes zeros into the bitmap alone.  The one that
    shows less comes first."""
    path = qemu.create(tmp_path / "disk.qcow2", MiB, extended_l2="on")
    out = tmp_path / "out.qcow2"
    qemu.io(path, "write -P 7 0 64k")
    qemu.take(path, "all")
    qemu.io(path, "write -z 8k 40k")
    qemu.take(path, "some")
    qemu.io(path, "discard 0 4k")
    qemu.delete(path, "all")  # so that the next one is behind the one that shows less
    qemu.take(path, "fewer")
    command.qcow2snap("compact", path, out)
    assert_same(path, out)


def test_a_disk_that_was_larger_before_and_after(tmp_path: Path) -> None:
    """The small one ends inside a cluster of which the others show all."""
    path, out = qemu.create(tmp_path / "disk.qcow2", MiB), tmp_path / "out.qcow2"
    qemu.io(path, "write -P 7 0 1M")
    qemu.take(path, "large")
    qemu.run("qemu-img", "resize", "-q", "--shrink", "-f", "qcow2", path, 512 * KiB + 512)
    qemu.take(path, "small")
    qemu.run("qemu-img", "resize", "-q", "-f", "qcow2", path, "2M")
    qemu.io(path, "write -P 8 1M 1M")
    command.qcow2snap("compact", path, out)
    assert_same(path, out)
    qemu.delete(path, "large")
    command.qcow2snap("compact", path, tmp_path / "again.qcow2")
    assert_same(path, tmp_path / "again.qcow2")


def test_a_saved_machine_goes_on_from_the_copy(tmp_path: Path) -> None:
    path, out = qemu.create(tmp_path / "disk.qcow2", 3 * MiB), tmp_path / "out.qcow2"
    qemu.io(path, "write -P 5 0 1M")
    with machine(path) as vm:
        vm.run_a_little()
        vm.save("live")
        saved, memory = vm.registers(), vm.memory(tmp_path)
    command.qcow2snap("compact", path, out)
    assert_same(path, out)
    with machine(out, "-loadvm", "live") as vm:
        assert vm.registers() == saved
        assert vm.memory(tmp_path) == memory


def test_odd_names_ids_and_dates_are_kept(tmp_path: Path) -> None:
    path, out = qemu.create(tmp_path / "disk.qcow2", MiB), tmp_path / "out.qcow2"
    for name in ("", "same", "same", "ü" * 100, "with space"):
        qemu.take(path, name)
    entry = qemu.snapshots(path)["with space"]
    qemu.patch(path, entry.entry_offset + 16, (10**9).to_bytes(4, "big"))  # date_sec: 2001
    command.qcow2snap("compact", path, out)
    assert qemu.info(out)["snapshots"] == qemu.info(path)["snapshots"]
    assert qemu.info(out)["snapshots"][-1]["date-sec"] == 10**9


def test_what_it_lies_on_is_what_the_copy_lies_on(tmp_path: Path) -> None:
    base = tmp_path / "base.qcow2"
    qemu.RandomImage(base, 3, SIZE).make([])
    path = tmp_path / "disk.qcow2"
    qemu.RandomImage(path, 4, SIZE, backing=(base.name, "qcow2")).make()
    (tmp_path / "elsewhere").mkdir()
    out = tmp_path / "elsewhere" / "out.qcow2"
    command.qcow2snap("compact", path, out)
    assert_same(path, out)
    assert qemu.info(out)["backing-filename"] == "../base.qcow2"


def test_an_encrypted_image_becomes_plain_and_that_is_said(tmp_path: Path) -> None:
    path, out = tmp_path / "disk.qcow2", tmp_path / "out.qcow2"
    secret.create(path, SIZE, ["pass"], **{"encrypt.format": "luks"})
    secret.play(path, ["pass"], 1, SIZE)
    secret.take(path, ["pass"], "one")
    secret.play(path, ["pass"], 2, SIZE)
    done = command.run("compact", path, out, "--passphrase", "pass")
    assert done.returncode == 0
    assert "is encrypted, the result is not" in done.stderr
    assert qemu.content(out, "one") == secret.content(path, ["pass"], "one")
    assert qemu.content(out) == secret.content(path, ["pass"])


def a_byte_of_data(data: bytearray) -> None:
    if data[:1] == b"\7":
        data[-1] ^= 1


def zeros_for_data(data: bytearray) -> None:
    if len(data) == 64 * KiB and data[8:] == bytes(64 * KiB - 8):  # an L2 table with one entry
        data[7] |= 1


def a_refcount(data: bytearray) -> None:
    if data[:4] == b"\0\1\0\2":  # of the header, and of the cluster that both states have
        data[3] = 1


@pytest.mark.parametrize("spoil", [a_byte_of_data, zeros_for_data, a_refcount])
def test_what_was_written_wrong_gets_no_name(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    spoil: Callable[[bytearray], None],
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A disk that changes a byte of what it is given."""
    path, out = qemu.create(tmp_path / "disk.qcow2", MiB), tmp_path / "out.qcow2"
    qemu.io(path, "write -P 7 0 64k")
    qemu.take(path, "s")
    real = NewImage.write

    def write(self: NewImage, data: bytes, offset: int) -> None:
        changed = bytearray(data)
        spoil(changed)
        real(self, changed, offset)

    monkeypatch.setattr(NewImage, "write", write)
    assert cli.main(["compact", str(path), str(out)]) == 1
    (said,) = capsys.readouterr().err.splitlines()
    assert "differs from its source" in said or "was written wrong" in said
    assert os.listdir(tmp_path) == ["disk.qcow2"]


def missing_table(path: Path) -> None:
    damage.put64(path, damage.l1_entry(path, "s", 0), damage.END_OF_FILE)


def missing_data(path: Path) -> None:
    damage.put64(path, damage.l2_entry(path, "s", 0), damage.END_OF_FILE)


def bad_stream(path: Path) -> None:
    offset, _ = damage.stream(path, "s", MiB)
    qemu.patch(path, offset, b"\xff" * 16)


DAMAGE: dict[Callable[[Path], None], str] = {
    missing_table: "past the end of the file",
    missing_data: "lies past the end of the file",
    bad_stream: "guest offset 0x100000: the compressed cluster at host offset",
}


@pytest.mark.parametrize("spoil", DAMAGE)
def test_what_cannot_be_read_is_an_error(tmp_path: Path, spoil: Callable[[Path], None]) -> None:
    path = qemu.create(tmp_path / "disk.qcow2", 2 * MiB)
    qemu.io(path, "write -P 7 0 1M", "write -c -P 8 1M 64k")
    qemu.take(path, "s")
    spoil(path)
    assert DAMAGE[spoil] in command.fails("compact", path, tmp_path / "out.qcow2")
    assert os.listdir(tmp_path) == ["disk.qcow2"]


@pytest.mark.skipif(os.geteuid() != 0, reason="mounts a small filesystem")
def test_an_l1_table_that_many_snapshots_have(tmp_path: Path) -> None:
    """In the copy each has its own: a small image can ask for terabytes of them."""
    path, out = qemu.create(tmp_path / "disk.qcow2", MiB), tmp_path / "out.qcow2"
    with open(path, "ab") as f:
        f.truncate(8 * MiB)  # the table begins at 4 MiB and is a hole
    entries, span = 256 * KiB // 8, 512 * MiB
    extra = struct.pack(">QQ", 0, entries * span)
    names = [b"%d" % n for n in range(1, 41)]
    write_table(path, [Entry(n, n, 4 * MiB, entries, extra=extra) for n in names])
    assert command.run("list", path).returncode == 0
    tracemalloc.start()
    try:
        assert cli.main(["compact", str(path), str(out), "--no-verify"]) == 0
        assert tracemalloc.get_traced_memory()[1] < 15 * MiB
    finally:
        tracemalloc.stop()
    qemu.run("qemu-img", "check", "-q", out)
    out.unlink()
    (tmp_path / "small").mkdir()
    qemu.run("mount", "-t", "tmpfs", "-o", "size=8M", "tmpfs", tmp_path / "small")
    try:
        line = command.fails("compact", path, tmp_path / "small" / "out.qcow2")
        assert "needs 1" in line, line
        assert not os.listdir(tmp_path / "small")
    finally:
        qemu.run("umount", tmp_path / "small")


def test_what_the_other_compression_does_not_make_smaller(tmp_path: Path) -> None:
    """Twice the same half: zstd sees that, deflate with qcow2's window of 4 KiB does not."""
    options = {"extended_l2": "on", "compression_type": "zstd"}
    path, out = qemu.create(tmp_path / "disk.qcow2", MiB, **options), tmp_path / "out.qcow2"
    half = tmp_path / "half"
    half.write_bytes(random.Random(1).randbytes(32 * KiB))
    qemu.io(path, f"write -c -s {half} 0 64k")
    qemu.take(path, "s")
    command.qcow2snap("compact", path, out, "--compress", "zlib")
    assert_same(path, out)
