"""``qcow2snap split`` and ``join``: the same content in every snapshot and layer, says QEMU."""

from __future__ import annotations

import json
import os
import random
from pathlib import Path

import pytest
from support import command, damage, qemu
from support.qemu import KiB, MiB
from support.vm import machine

from qcow2snap_core.transfer.manifest import NAME

SIZE = 4 * MiB
FORMATS: dict[str, dict[str, object]] = {
    "plain": {},
    "extended L2": {"extended_l2": "on"},
    "small clusters": {"cluster_size": 4096},
    "version 2": {"compat": "0.10"},
}


def assert_clean(path: Path) -> None:
    qemu.run("qemu-img", "check", "-q", path)


def size_on_disk(path: Path) -> int:
    return path.stat().st_blocks * 512


def with_backing(directory: Path, fmt: str) -> Path:
    """A random image over a random backing file, with three snapshots."""
    base = directory / "base.img"
    qemu.RandomImage(base, seed=1, size=SIZE - 64 * KiB, fmt=fmt).make([])
    path = directory / "disk.qcow2"
    qemu.RandomImage(path, seed=2, size=SIZE, backing=(base.name, fmt)).make()
    return path


@pytest.mark.parametrize("options", FORMATS.values(), ids=FORMATS.keys())
def test_there_and_back_every_snapshot_has_its_content(
    tmp_path: Path, options: dict[str, object]
) -> None:
    path, chain, out = tmp_path / "disk.qcow2", tmp_path / "chain", tmp_path / "out.qcow2"
    compressed = options.get("extended_l2") is None
    image = qemu.RandomImage(path, 5, SIZE, options=options, compressed=compressed)
    names = image.make()
    command.qcow2snap("split", path, chain)
    assert sorted(os.listdir(chain)) == sorted(
        [*(f"{n}.qcow2" for n in names), "active.qcow2", NAME]
    )
    command.qcow2snap("join", chain / "active.qcow2", out)
    assert "backing-filename" not in qemu.info(out)
    assert qemu.info(out)["snapshots"] == qemu.info(path)["snapshots"]
    for name in [*names, None]:
        layer = chain / f"{name or 'active'}.qcow2"
        expected = qemu.content(path, name)
        assert qemu.content(layer) == expected
        assert qemu.content(out, name) == expected
        assert_clean(layer)
    assert_clean(out)


def test_the_chain_can_be_moved_and_records_its_formats(tmp_path: Path) -> None:
    path = qemu.create(tmp_path / "disk.qcow2", SIZE)
    qemu.take(path, "one")
    command.qcow2snap("split", path, tmp_path / "chain")
    said = qemu.info(tmp_path / "chain" / "active.qcow2")
    assert said["backing-filename"] == "one.qcow2"
    assert said["backing-filename-format"] == "qcow2"
    (tmp_path / "chain").rename(tmp_path / "moved")
    assert qemu.content(tmp_path / "moved" / "active.qcow2") == bytes(SIZE)


def test_an_overlay_holds_only_what_changed(tmp_path: Path) -> None:
    path, chain = qemu.create(tmp_path / "disk.qcow2", 64 * MiB), tmp_path / "chain"
    qemu.io(path, "write -P 1 0 16M")
    qemu.take(path, "one")
    qemu.io(path, "write -P 2 1M 64k", "write -z -u 2M 8M")
    command.qcow2snap("split", path, chain)
    assert size_on_disk(chain / "one.qcow2") > 16 * MiB
    assert size_on_disk(chain / "active.qcow2") < MiB, "zeros take no space"


def test_snapshots_of_other_sizes(tmp_path: Path) -> None:
    path, chain, out = tmp_path / "disk.qcow2", tmp_path / "chain", tmp_path / "out.qcow2"
    qemu.create(path, SIZE)
    sizes = {"odd": SIZE + 512, "short": MiB + 512, "long": 2 * SIZE}
    for byte, (name, size) in enumerate(sizes.items(), 1):
        qemu.run("qemu-img", "resize", "-q", "--shrink", path, size)
        qemu.io(path, f"write -P {byte} 0 {size // 2}", f"write -P {byte} {size - 512} 512")
        qemu.take(path, name)
    command.qcow2snap("split", path, chain)
    command.qcow2snap("join", chain / "active.qcow2", out)
    for name in sizes:
        expected = qemu.snapshot_content(path, name)
        assert qemu.content(chain / f"{name}.qcow2") == expected
        assert qemu.snapshot_content(out, name) == expected
    assert_clean(out)


def test_a_layer_that_grows_again_reads_zeros_there(tmp_path: Path) -> None:
    base = qemu.create(tmp_path / "base.qcow2", SIZE)
    qemu.io(base, f"write -P 1 0 {SIZE}")
    qemu.create(tmp_path / "mid.qcow2", MiB + 512, backing=("base.qcow2", "qcow2"))
    top = qemu.create(tmp_path / "top.qcow2", SIZE, backing=("mid.qcow2", "qcow2"))
    command.qcow2snap("join", top, tmp_path / "out.qcow2")
    expected = qemu.content(top)
    assert expected[MiB + 512 :] == bytes(SIZE - MiB - 512)
    assert qemu.content(tmp_path / "out.qcow2") == expected


def test_what_is_behind_the_end_of_a_compressed_cluster_stays_there(tmp_path: Path) -> None:
    base = qemu.create(tmp_path / "base.qcow2", 128 * KiB)
    qemu.io(base, "write -c -P 1 64k 64k")
    qemu.run("qemu-img", "resize", "-q", "--shrink", "-f", "qcow2", base, 96 * KiB)
    top = qemu.create(tmp_path / "top.qcow2", 128 * KiB, backing=("base.qcow2", "qcow2"))
    command.qcow2snap("join", top, tmp_path / "out.qcow2")
    expected = bytes(64 * KiB) + b"\1" * 32 * KiB + bytes(32 * KiB)
    assert qemu.content(tmp_path / "out.qcow2") == qemu.content(top) == expected


@pytest.mark.parametrize("fmt", ["raw", "qcow2"])
def test_a_backing_file_stays_that_of_the_base(tmp_path: Path, fmt: str) -> None:
    path, chain, out = with_backing(tmp_path, fmt), tmp_path / "chain", tmp_path / "out.qcow2"
    command.qcow2snap("split", path, chain)
    said = qemu.info(chain / "one.qcow2")
    assert said["backing-filename"] == "../base.img"
    assert said["backing-filename-format"] == fmt
    command.qcow2snap("join", chain / "active.qcow2", out, "--allow-dir", tmp_path)
    assert qemu.info(out)["snapshots"] == qemu.info(path)["snapshots"]
    for name in ["one", "two", "three", None]:
        assert qemu.content(chain / f"{name or 'active'}.qcow2") == qemu.content(path, name)
        assert qemu.content(out, name) == qemu.content(path, name)
    (chain / NAME).unlink()
    command.qcow2snap("join", "--force", chain / "active.qcow2", out, "--allow-dir", tmp_path)
    assert list(qemu.snapshots(out)) == ["base", "one", "two", "three", "active"]
    base = qemu.run("qemu-img", "convert", "-f", fmt, "-O", "raw", "base.img", "b", cwd=tmp_path)
    assert base == ""
    assert qemu.snapshot_content(out, "base") == (tmp_path / "b").read_bytes()


NAMES = {
    "a slash": (b"a/b", "a%2Fb"),
    "a percent sign": (b"50%", "50%25"),
    "a colon": (b"nbd:x", "nbd:x"),
    "spaces and quotes": (b" it's,a=b", " it's,a=b"),
    "words of any language": ("nächtlich 夜 ночь".encode(), "nächtlich 夜 ночь"),
    "a line feed": (b"a\nb", "a%0Ab"),
    "an escape sequence": (b"\x1b[31mred\x7f", "%1B[31mred%7F"),
    "a C1 control": ("\x9b31m".encode(), "%C2%9B31m"),
    "right to left": ("a\u202eb".encode(), "a%E2%80%AEb"),
    "not UTF-8": (b"a\xff\xfe", "a%FF%FE"),
    "empty": (b"", "1"),
    "dots": (b"..", "%2E%2E"),
    "a hidden one": (b".a.b", "%2Ea.b"),
    "an option": (b"-rf", "%2Drf"),
    "the active one's": (b"active", "1"),
    "another's ID": (b"2", "1"),
    "repeated": (b"second", "1"),
    "too long": (b"n" * 250, "1"),
}


@pytest.mark.parametrize(("name", "expected"), NAMES.values(), ids=NAMES.keys())
def test_overlays_are_named_after_their_snapshots(
    tmp_path: Path, name: bytes, expected: str
) -> None:
    path, chain = qemu.create(tmp_path / "disk.qcow2", SIZE), tmp_path / "chain"
    qemu.io(path, "write -P 5 0 64k")
    qemu.take(path, "first")
    qemu.take(path, "second")
    damage.rename(path, {"first": name})
    command.qcow2snap("split", path, chain)
    second = "2" if name == b"second" else "second"
    found = {f"{expected}.qcow2", f"{second}.qcow2", "active.qcow2", NAME}
    assert set(os.listdir(chain)) == found
    assert qemu.content(chain / "active.qcow2") == qemu.content(path)


def test_a_chain_is_replaced_only_when_that_is_asked_for(tmp_path: Path) -> None:
    path, chain = qemu.create(tmp_path / "disk.qcow2", SIZE), tmp_path / "chain"
    qemu.take(path, "one")
    command.qcow2snap("split", path, chain)
    chain.chmod(0o750)
    qemu.delete(path, "one")
    qemu.io(path, "write -P 6 0 64k")
    assert "is not empty" in command.fails("split", path, chain)
    assert sorted(os.listdir(chain)) == ["active.qcow2", "one.qcow2", NAME]
    command.qcow2snap("split", "--force", path, chain)
    assert sorted(os.listdir(chain)) == ["active.qcow2", NAME]
    assert qemu.content(chain / "active.qcow2") == qemu.content(path)
    assert chain.stat().st_mode & 0o777 == 0o750
    assert sorted(os.listdir(tmp_path)) == ["chain", "disk.qcow2"]


@pytest.mark.parametrize("other", ["notes.txt", "directory.qcow2", "link.qcow2", "the image"])
def test_what_is_no_overlay_is_not_replaced_with_a_chain(tmp_path: Path, other: str) -> None:
    path, chain = qemu.create(tmp_path / "disk.qcow2", SIZE), tmp_path / "chain"
    chain.mkdir()
    if other == "the image":
        path = path.rename(chain / "disk.qcow2")
    elif other == "directory.qcow2":
        (chain / other).mkdir()
    elif other == "link.qcow2":
        (chain / other).symlink_to(path)
    else:
        (chain / other).write_text("kept")
    before = sorted(tmp_path.rglob("*"))
    said = command.fails("split", "--force", path, chain)
    assert "is being copied and lies in" in said or f"'{other}' in it is no overlay" in said
    assert sorted(tmp_path.rglob("*")) == before


def test_an_image_is_replaced_by_a_join_only_when_that_is_asked_for(tmp_path: Path) -> None:
    top, out = qemu.create(tmp_path / "top.qcow2", SIZE), tmp_path / "out.qcow2"
    out.write_bytes(b"kept")
    assert "is there already: add --force" in command.fails("join", top, out)
    assert out.read_bytes() == b"kept"
    command.qcow2snap("join", "--force", top, out)
    assert list(qemu.snapshots(out)) == ["top"]


def test_an_empty_directory_is_filled_and_keeps_its_mode(tmp_path: Path) -> None:
    path, chain = qemu.create(tmp_path / "disk.qcow2", SIZE), tmp_path / "chain"
    chain.mkdir(mode=0o750)
    command.qcow2snap("split", path, chain)
    assert sorted(os.listdir(chain)) == ["active.qcow2", NAME]
    assert chain.stat().st_mode & 0o777 == 0o750


def test_a_directory_with_something_in_it_is_refused(tmp_path: Path) -> None:
    path = qemu.create(tmp_path / "disk.qcow2", SIZE)
    assert "is not empty" in command.fails("split", path, tmp_path)
    assert os.listdir(tmp_path) == ["disk.qcow2"]


def test_without_room_nothing_is_begun(tmp_path: Path) -> None:
    filesystem = os.statvfs(tmp_path)
    size = filesystem.f_blocks * filesystem.f_frsize
    # Clusters that are all allocated, in a data file that is one hole.
    options = {"data_file_raw": "on", "cluster_size": "2M", "preallocation": "metadata"}
    path = qemu.create(tmp_path / "disk.qcow2", size, data_file=tmp_path / "data", **options)
    for name, line in {"chain": ("split", path), "out": ("join", path)}.items():
        assert "free" in command.fails(*line, tmp_path / name)
    assert "free" in command.fails("copy", path, "@active", tmp_path / "out")
    assert sorted(os.listdir(tmp_path)) == ["data", "disk.qcow2"]


def test_a_layer_below_whose_data_file_has_a_relative_name(tmp_path: Path) -> None:
    """QEMU looks for it where it runs; the command runs elsewhere."""
    run = {"cwd": tmp_path}
    options = "data_file=base.data,data_file_raw=off"
    qemu.run("qemu-img", "create", "-q", "-f", "qcow2", "-o", options, "base", 4 * MiB, **run)
    qemu.run("qemu-io", "-f", "qcow2", "-c", "write -P 1 0 2M", "base", **run)
    below = ["-b", "base", "-F", "qcow2"]
    qemu.run("qemu-img", "create", "-q", "-f", "qcow2", *below, "disk", **run)
    qemu.run("qemu-img", "snapshot", "-c", "one", "disk", **run)
    qemu.run("qemu-io", "-f", "qcow2", "-c", "write -P 2 1M 64k", "disk", **run)
    command.qcow2snap("split", tmp_path / "disk", tmp_path / "chain")
    top = tmp_path / "chain" / "active.qcow2"
    qemu.run("qemu-img", "compare", "-q", "disk", top, **run)


def test_out_must_not_be_a_layer(tmp_path: Path) -> None:
    qemu.create(tmp_path / "base.qcow2", SIZE)
    top = qemu.create(tmp_path / "top.qcow2", SIZE, backing=("base.qcow2", "qcow2"))
    assert "being copied" in command.fails("join", "--force", top, tmp_path / "base.qcow2")
    assert "which is being copied" in command.fails("join", "--force", top, top)


# --- There and back ---


def assert_the_same(out: Path, path: Path) -> None:
    """All that is said of the two, but for where their tables lie, and every byte."""
    assert_clean(out)
    listed = [json.loads(command.here("list", "--json", each)) for each in (path, out)]
    for snapshot in (*listed[0], *listed[1]):
        for key in [key for key in snapshot if key.startswith("exclusive")]:
            del snapshot[key]
    assert listed[1] == listed[0]
    for snapshot in listed[0]:
        id_ = snapshot["id"]
        assert qemu.content(out, id_, by="id") == qemu.content(path, id_, by="id")
    qemu.run("qemu-img", "compare", "-q", path, out)


def test_names_ids_and_dates_come_back(tmp_path: Path) -> None:
    path = qemu.create(tmp_path / "disk.qcow2", SIZE)
    for number, name in enumerate("abcdefgh"):
        qemu.io(path, f"write -P {number + 1} {number * 64}k 64k")
        qemu.take(path, name)
    qemu.delete(path, "c")  # so that no ID is what a new image would give
    for number, name in enumerate(qemu.snapshots(path)):
        at = qemu.snapshots(path)[name].entry_offset
        qemu.patch(path, at + 16, (10**9 + number).to_bytes(4, "big"))  # date_sec
        qemu.patch(path, at + 24, (2**40 + number).to_bytes(8, "big"))  # vm_clock_nsec
        qemu.patch(path, at + 56, (2**50 + number).to_bytes(8, "big"))  # icount
    names = {"a": b"", "b": b"\xff\n", "d": b"same", "e": b"same", "f": b"active", "g": b"n" * 250}
    damage.rename(path, names)
    qemu.run("qemu-img", "check", "-q", "-r", "all", path)  # which counts the table's clusters
    command.here("split", path, tmp_path / "chain")
    command.here("join", tmp_path / "chain" / "active.qcow2", tmp_path / "out.qcow2")
    assert_the_same(tmp_path / "out.qcow2", path)
    assert [s["icount"] for s in json.loads(command.here("list", "--json", path))] == [
        2**50 + number for number in range(7)
    ]


@pytest.mark.parametrize("seed", range(4))
def test_any_image_comes_back(tmp_path: Path, seed: int) -> None:
    rng = random.Random(seed)
    options: dict[str, object] = rng.choice([{}, {"cluster_size": 4096}, {"extended_l2": "on"}])
    path = tmp_path / "disk.qcow2"
    names = [f"s{n}" for n in range(rng.randrange(5))]
    qemu.RandomImage(path, seed, SIZE + rng.randrange(9) * 512, options=options).make(names)
    if names:
        qemu.run("qemu-img", "snapshot", "-a", rng.choice(names), path)
    command.here("split", path, tmp_path / "chain")
    (tmp_path / "chain").rename(tmp_path / "moved")
    said = command.here("join", tmp_path / "moved" / "active.qcow2", tmp_path / "out.qcow2")
    assert said == f"{tmp_path}/out.qcow2: {', '.join(names)}\n"
    assert_the_same(tmp_path / "out.qcow2", path)


def test_a_saved_machine_comes_back(tmp_path: Path) -> None:
    path, chain = qemu.create(tmp_path / "disk.qcow2", 3 * MiB), tmp_path / "chain"
    qemu.io(path, "write -P 5 0 1M")
    qemu.take(path, "before")
    with machine(path) as vm:
        vm.run_a_little()
        vm.save("live")
        saved, memory = vm.registers(), vm.memory(tmp_path)
    command.here("split", path, chain)
    assert sorted(os.listdir(chain)) == [
        *("active.qcow2", "before.qcow2", "live.qcow2", "live.vmstate", NAME)
    ]
    out = tmp_path / "out.qcow2"
    command.here("join", chain / "active.qcow2", out)
    assert_the_same(out, path)
    with machine(out, "-loadvm", "live") as vm:
        assert vm.registers() == saved
        assert vm.memory(tmp_path) == memory
    qemu.patch(chain / "live.vmstate", 100, b"x")
    assert "live.vmstate' was changed" in command.fails_here(
        "join", "--force", chain / "active.qcow2", out
    )
    command.here("split", "--force", path, chain)
    command.here("join", "--force", chain / "active.qcow2", out)
    assert_the_same(out, path)


def test_what_was_changed_since_is_no_snapshot_of_the_past(tmp_path: Path) -> None:
    path, chain = qemu.create(tmp_path / "disk.qcow2", SIZE), tmp_path / "chain"
    for byte, name in enumerate(("a/b", "two"), 1):
        qemu.io(path, f"write -P {byte} 0 64k")
        qemu.take(path, name)
    command.here("split", path, chain)
    top, out = chain / "active.qcow2", tmp_path / "out.qcow2"
    qemu.io(top, "write -P 9 1M 64k")  # the machine goes on with it
    command.here("join", top, out)
    assert qemu.info(out)["snapshots"] == qemu.info(path)["snapshots"]
    assert qemu.content(out) == qemu.content(top)
    command.here("join", "--force", chain / "two.qcow2", out)
    assert qemu.info(out)["snapshots"] == qemu.info(path)["snapshots"]
    upper = qemu.create(chain / "upper.qcow2", None, backing=("active.qcow2", "qcow2"))
    command.here("join", "--force", upper, out)
    assert [(s.id, s.name) for s in qemu.snapshots(out).values()] == [
        *(("1", "a/b"), ("2", "two"), ("3", "active"), ("4", "upper"))
    ]
    upper.unlink()
    qemu.run("qemu-img", "commit", "-q", top)
    done = command.run("join", "--force", top, out)
    assert done.returncode == 0
    assert "two.qcow2' was changed since qcow2snap.json was made" in done.stderr
    assert list(qemu.snapshots(out)) == ["a%2Fb", "two", "active"]
    assert qemu.content(out) == qemu.content(top)


def test_a_size_that_is_not_the_overlays_is_not_believed(tmp_path: Path) -> None:
    path, chain = qemu.create(tmp_path / "disk.qcow2", SIZE), tmp_path / "chain"
    qemu.take(path, "one")
    command.here("split", path, chain)
    fields = json.loads((chain / NAME).read_bytes())
    fields["snapshots"][0]["disk-size"] *= 2
    (chain / NAME).write_text(json.dumps(fields))
    done = command.run("join", "--no-verify", chain / "active.qcow2", tmp_path / "out.qcow2")
    assert done.returncode == 0
    assert "one.qcow2' was changed since qcow2snap.json was made" in done.stderr
    listed = json.loads(command.here("list", "--json", tmp_path / "out.qcow2"))
    assert [s["disk-size"] for s in listed] == [SIZE, SIZE]


@pytest.mark.parametrize("text", ["", "{}", '{"version": 2}'])
def test_what_is_no_manifest_is_not_used_and_that_is_said(tmp_path: Path, text: str) -> None:
    path, chain = qemu.create(tmp_path / "disk.qcow2", MiB), tmp_path / "chain"
    qemu.take(path, "one")
    command.here("split", path, chain)
    (chain / NAME).write_text(text)
    done = command.run("join", chain / "active.qcow2", tmp_path / "out.qcow2")
    assert done.returncode == 0
    (line,) = done.stderr.splitlines()
    assert "cannot be believed" in line
    assert list(qemu.snapshots(tmp_path / "out.qcow2")) == ["one", "active"]


def test_compressed_clusters_stay_as_they_are(tmp_path: Path) -> None:
    path = qemu.create(tmp_path / "disk.qcow2", 16 * MiB)
    qemu.io(path, "write -c -P 1 0 8M")
    qemu.take(path, "one")
    command.here("split", path, tmp_path / "chain")
    command.here("join", tmp_path / "chain" / "active.qcow2", tmp_path / "out.qcow2")
    for each in (tmp_path / "chain" / "one.qcow2", tmp_path / "out.qcow2"):
        assert size_on_disk(each) < MiB
    assert_the_same(tmp_path / "out.qcow2", path)


def test_a_layer_that_is_no_whole_number_of_sectors_is_refused(tmp_path: Path) -> None:
    (tmp_path / "base.raw").write_bytes(b"x" * 1000)
    top = qemu.create(tmp_path / "top.qcow2", MiB, backing=("base.raw", "raw"))
    line = command.fails_here("join", top, tmp_path / "out.qcow2")
    assert "base.raw' has 1000 bytes" in line
    qemu.run("truncate", "-s", "%512", tmp_path / "base.raw")
    command.here("join", top, tmp_path / "out.qcow2")
    assert qemu.content(tmp_path / "out.qcow2") == qemu.content(top)
