"""``qcow2snap memory``: what QEMU itself says of the machine's memory, byte for byte.

The memory of most machines here is a file that QEMU shares with the test: so it is known whole,
what a device or a ROM hides from the processors too, and the test can write to it.
"""

from __future__ import annotations

import os
import random
import struct
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
from support import command, damage, qemu
from support import savedstate as made
from support.qemu import MiB
from support.savedstate import PAGE, put_state
from support.server import ROOT
from support.vm import Vm, machine

GiB = 1 << 30
LOW, SIZE = 32 * MiB, 48 * MiB
HIDDEN = 0xA0000, 0x100000  # by video memory and ROMs
RNG = random.Random(5)


@dataclass
class Saved:
    """A machine that was saved, as ``live``."""

    image: Path
    vm: Vm
    ram: Path  # its memory


AMD = ("-cpu", "EPYC,phys-bits=46")
SPLIT = f"q35,max-ram-below-4g={LOW}"
PLENTY = ("-m", "slots=2,maxmem=1100G")
HOLE = ("-global", "q35-pcihost.pci-hole64-size=1024G")


@contextmanager
def saved(directory: Path, kind: str, *arguments: str, size: int = SIZE) -> Iterator[Saved]:
    """It still runs, or would, were it not stopped."""
    image = qemu.create(directory / "disk.qcow2", 3 * MiB)
    ram = directory / "ram"
    backend = f"memory-backend-file,id=pc.ram,mem-path={ram},size={size}b,share=on"
    options = ("-object", backend, *arguments)
    with machine(image, *options, kind=f"{kind},memory-backend=pc.ram", memory=size) as vm:
        vm.run_a_little()
        fill(ram, size)
        vm.save("live")
        yield Saved(image, vm, ram)


def fill(ram: Path, size: int) -> None:
    """Random pages, alone and together, and on both sides of the place where it is split."""
    pages = {LOW // PAGE - 1, LOW // PAGE, size // PAGE - 1}
    pages.update(RNG.randrange(MiB // PAGE, size // PAGE) for _ in range(300))
    pages.update(range(1000, 1700))
    with open(ram, "r+b") as f:
        for page in pages - {n for n in pages if n >= size // PAGE}:
            f.seek(page * PAGE)
            f.write(RNG.randbytes(PAGE))


def segments(path: Path) -> list[tuple[int, bytes]]:
    """(address, content) of an ELF file's, read as the format says."""
    data = path.read_bytes()
    assert data[:7] == b"\x7fELF\x02\x01\x01"
    kind, _, _, _, phoff, _, _, _, each, count = struct.unpack_from("<HHIQQQIHHH", data, 16)
    assert (kind, each) == (4, 56)
    found = []
    for n in range(count):
        kind, _, offset, _, address, filesz, memsz, _ = struct.unpack_from(
            "<IIQQQQQQ", data, phoff + n * each
        )
        if kind == 1:
            assert filesz == memsz
            found.append((address, data[offset : offset + filesz]))
    return found


@pytest.mark.parametrize("kind", ["pc", "q35"])
def test_it_is_what_the_machine_had(tmp_path: Path, kind: str) -> None:
    """Below 4 GiB and above: by the RAM itself, by pmemsave, and by dump-guest-memory."""
    split = f"{kind},max-ram-below-4g={LOW}"
    raw, elf, dump = tmp_path / "out.raw", tmp_path / "out.elf", tmp_path / "dump"
    with saved(tmp_path, split) as it:
        said = command.fails("memory", it.image, "live", raw)
        assert "the machine's CMOS says 32 MiB and 16 MiB: add --below-4g" in said
        assert not raw.exists()
        for out in (raw, elf):
            command.qcow2snap("memory", it.image, "live", out, "--below-4g", "32M")
        ram = it.ram.read_bytes()
        above = it.vm.memory(tmp_path, 4 * GiB, SIZE - LOW)
        below = it.vm.memory(tmp_path, 0, LOW)
        it.vm.qmp("dump-guest-memory", paging=False, protocol=f"file:{dump}")
    assert raw.stat().st_size == 4 * GiB + SIZE - LOW
    assert raw.stat().st_blocks * 512 < SIZE
    with open(raw, "rb") as f:
        assert f.read(LOW) == ram[:LOW]
        assert os.lseek(f.fileno(), LOW, os.SEEK_DATA) >= 4 * GiB  # nothing in the hole
        f.seek(4 * GiB)
        assert f.read() == ram[LOW:] == above
    first, end = HIDDEN
    assert ram[:first] + ram[end:LOW] == below[:first] + below[end:]
    assert elf.read_bytes()[18:20] == b"\x3e\0"  # x86-64; QEMU says in which mode the machine was
    assert segments(elf) == [(0, ram[:LOW]), (4 * GiB, ram[LOW:])]
    seen = [(0, first), (end, LOW), (4 * GiB, 4 * GiB + SIZE - LOW)]
    dumped = segments(dump)
    for at, stop in seen:
        assert content(dumped, at, stop) == content(segments(elf), at, stop)


@pytest.mark.parametrize(
    ("arguments", "at"),
    [
        (AMD, 4 * GiB),
        (("-m", "slots=2,maxmem=500G", *AMD), 4 * GiB),
        ((*PLENTY, "-cpu", "Haswell,phys-bits=46"), 4 * GiB),
        ((*PLENTY, *AMD), 1 << 40),
        ((*HOLE, *AMD), 1 << 40),
    ],
    ids=["small", "maxmem", "maxmem, Intel", "maxmem, moved", "hole, moved"],
)
def test_memory_that_qemu_moves_to_1_tib(
    tmp_path: Path, arguments: tuple[str, ...], at: int
) -> None:
    out = tmp_path / "out.elf"
    with saved(tmp_path, SPLIT, *arguments) as it:
        ram = it.ram.read_bytes()
        assert it.vm.memory(tmp_path, at, SIZE - LOW) == ram[LOW:]
    line = ("memory", it.image, "live", out, "--below-4g", "32M")
    if at != 4 * GiB:
        said = command.fails(*line)
        assert said.endswith("as its ACPI tables say: add --above-4g 0x10000000000")
        assert not out.exists()
        line += ("--above-4g", "0x10000000000")
    command.qcow2snap(*line)
    assert segments(out) == [(0, ram[:LOW]), (at, ram[LOW:])]


def content(found: list[tuple[int, bytes]], at: int, end: int) -> bytes:
    """The bytes from one address to another, which may be in several segments."""
    parts = b""
    for address, data in found:
        if address <= at + len(parts) < min(end, address + len(data)):
            parts += data[at + len(parts) - address : end - address]
    assert len(parts) == end - at
    return parts


def test_what_is_printed(tmp_path: Path) -> None:
    with saved(tmp_path, "pc", size=16 * MiB) as it:
        said = command.qcow2snap("memory", it.image, "live", tmp_path / "a.raw")
        assert said.startswith(f"{tmp_path}/a.raw: 16 MiB of memory of pc-i440fx-")
        assert said.endswith("of it in pages with data\n")
        assert command.qcow2snap_json("memory", it.image, "1", tmp_path / "b.raw") == [
            {"address": 0, "length": 16 * MiB, "block": "pc.ram", "offset": 0}
        ]
        assert (tmp_path / "a.raw").read_bytes() == it.ram.read_bytes()
    assert (tmp_path / "a.raw").read_bytes() == (tmp_path / "b.raw").read_bytes()


def test_compressed_pages(tmp_path: Path) -> None:
    image = qemu.create(tmp_path / "disk.qcow2", 3 * MiB)
    with machine(image) as vm:
        if "compress: off" not in vm.hmp("info migrate_capabilities"):
            pytest.skip("this QEMU compresses no pages")
        vm.run_a_little()
        vm.hmp("migrate_set_capability compress on")
        vm.save("live")
        seen = vm.memory(tmp_path)
    command.qcow2snap("memory", image, "live", tmp_path / "out")
    found = (tmp_path / "out").read_bytes()
    assert found[: HIDDEN[0]] + found[HIDDEN[1] :] == seen[: HIDDEN[0]] + seen[HIDDEN[1] :]
    assert any(found[: HIDDEN[0]])


def test_nodes_and_a_dimm(tmp_path: Path) -> None:
    image, out = qemu.create(tmp_path / "disk.qcow2", 3 * MiB), tmp_path / "out"
    arguments: list[str] = []
    for name in ("ram-node1", "ram-node0", "plugged"):
        backend = f"memory-backend-file,id={name},mem-path={tmp_path / name},size=16M,share=on"
        arguments += ["-object", backend]
    for n in range(2):
        arguments += ["-numa", f"node,memdev=ram-node{n}"]
    arguments += ["-device", "pc-dimm,memdev=plugged", "-m", "32M,slots=1,maxmem=1G"]
    with machine(image, *arguments, kind="q35", memory=32 * MiB) as vm:
        [dimm] = vm.qmp("query-memory-devices")
        at = dimm["data"]["addr"]
        vm.run_a_little()
        for name in ("ram-node1", "ram-node0", "plugged"):
            with open(tmp_path / name, "r+b") as f:
                f.write(RNG.randbytes(3 * PAGE))
        vm.save("live")
        ram = [(tmp_path / name).read_bytes() for name in ("ram-node0", "ram-node1", "plugged")]
        assert vm.memory(tmp_path, at, 16 * MiB) == ram[2]
        assert vm.memory(tmp_path, 16 * MiB, 16 * MiB) == ram[1]
    assert "add --place plugged=ADDRESS" in command.fails("memory", image, "live", out)
    assert command.run("memory", image, "live", out, "--place", f"plugged={at:#x}").stderr == ""
    with open(out, "rb") as f:
        assert f.read(32 * MiB) == ram[0] + ram[1]
        f.seek(at)
        assert f.read() == ram[2]


def test_pages_with_places_of_their_own(tmp_path: Path) -> None:
    """In savevm that is new in QEMU 11."""
    with saved(tmp_path, "pc") as it:
        if it.vm.qmp("query-version")["qemu"]["major"] < 11:
            pytest.skip("this QEMU cannot")  # from 9 to 10 it has the capability, and crashes
        it.vm.hmp("migrate_set_capability mapped-ram on")
        fill(it.ram, SIZE)
        it.vm.save("again")
        command.qcow2snap("memory", it.image, "again", tmp_path / "out")
        assert (tmp_path / "out").read_bytes() == it.ram.read_bytes()


# xor ax,ax; mov bx,0x1000; next: mov es,bx; mov es:[0],ax; inc ax; add bx,0x100; cmp bx,0x8000;
# jb next; mov bx,0x1000; jmp next: it writes to 112 pages, over and over.
BUSY = bytes.fromhex("31c0bb0010 8ec3 26a30000 40 81c30001 81fb0080 72ef bb0010 ebea")


def test_a_page_that_came_again(tmp_path: Path) -> None:
    """A guest that writes while it is sent: no savevm, which stops it, but a live migration."""
    image = qemu.create(tmp_path / "disk.qcow2", 3 * MiB)
    raw = tmp_path / "boot"
    raw.write_bytes(BUSY.ljust(510, b"\0") + b"\x55\xaa")
    qemu.run("qemu-img", "convert", "-n", "-f", "raw", "-O", "qcow2", raw, image)
    sent = tmp_path / "sent"
    with machine(image) as vm:
        vm.qmp("cont")
        while not vm.memory(tmp_path, 0x10000, 2).strip(b"\0"):
            pass  # until it has begun
        vm.migrate(f"exec:cat >{sent}")
        seen = vm.memory(tmp_path)
    state = sent.read_bytes()
    pages = [
        struct.pack(">Q", at | made.DATA | made.CONTINUE) for at in range(0x10000, 0x80000, PAGE)
    ]
    assert any(state.count(page) > 1 for page in pages), "no page came twice"
    put_state(image, "live", state)
    command.qcow2snap("memory", image, "live", tmp_path / "out")
    found = (tmp_path / "out").read_bytes()
    assert found[: HIDDEN[0]] + found[HIDDEN[1] :] == seen[: HIDDEN[0]] + seen[HIDDEN[1] :]


# --- By hand ---


def test_a_state_that_is_longer_than_it_says(image: Path) -> None:
    """Pages with places of their own: the size counts what was written."""
    blocks = [("pc.ram", {0: CONTENT[0], 600: CONTENT[1]}, 700 * PAGE)]
    put_state(image, "live", made.mapped(blocks), 3 * PAGE)
    out = image.with_name("out")
    assert command.run("memory", image, "live", out).returncode == 0
    assert out.read_bytes() == CONTENT[0] + bytes(599 * PAGE) + CONTENT[1] + bytes(99 * PAGE)
    assert out.stat().st_blocks * 512 <= 16 * PAGE


RAM = [("pc.ram", 4 * PAGE), ("0000:00:02.0/vga.vram", PAGE)]
CONTENT = [RNG.randbytes(PAGE) for _ in range(4)]
WHOLE = b"".join(
    made.page(n * PAGE, content, block=None if n else "pc.ram") for n, content in enumerate(CONTENT)
)


@pytest.fixture
def image(tmp_path: Path) -> Path:
    return qemu.create(tmp_path / "disk.qcow2", MiB)


def test_a_page_that_is_zero_in_the_end(image: Path) -> None:
    again = made.page(PAGE, b"\0", made.ZERO, "pc.ram") + made.page(2 * PAGE, CONTENT[3])
    put_state(image, "live", made.state(RAM, [WHOLE, again]))
    out = image.with_name("out")
    command.run("memory", image, "live", out)
    assert out.read_bytes() == CONTENT[0] + bytes(PAGE) + CONTENT[3] + CONTENT[3]


def test_without_a_description_it_is_said_what_is_assumed(image: Path) -> None:
    put_state(image, "live", made.state(RAM, [WHOLE]))
    done = command.run("memory", image, "live", image.with_name("out"))
    assert done.returncode == 0
    [line] = done.stderr.splitlines()
    assert "does not say how much of the memory lay below 4 GiB: 16 KiB is" in line


def test_without_tables_it_is_said_where_the_rest_is(image: Path) -> None:
    put_state(image, "live", made.state(RAM, [WHOLE]))
    line = ["memory", image, "live", image.with_name("out.elf"), "--below-4g", "8K", "--force"]
    [said] = command.run(*line).stderr.splitlines()
    assert "does not say whether the 8 KiB above 4 GiB were at 0x100000000" in said
    assert said.endswith("add --above-4g 0x10000000000")
    for at in (1 << 32, 1 << 40, 5 << 32):
        assert command.run(*line, "--above-4g", f"{at:#x}").stderr == ""
        assert segments(image.with_name("out.elf"))[1] == (at, b"".join(CONTENT[2:]))


OTHER = made.page(0, CONTENT[0], block="one") + made.page(0, CONTENT[1], block="two")
PLUGGED = WHOLE + made.page(0, CONTENT[0], block="dimm0")


@pytest.mark.parametrize(
    ("blocks", "pages", "options", "expected"),
    [
        (
            [("one", PAGE), ("two", PAGE)],
            OTHER,
            ["--ram", "two", "--ram", "one"],
            [(0, CONTENT[1]), (PAGE, CONTENT[0])],
        ),
        (
            [("ram-node1", PAGE), ("ram-node0", PAGE)],
            OTHER.replace(b"\3one", b"\x09ram-node1").replace(b"\3two", b"\x09ram-node0"),
            [],
            [(0, CONTENT[1]), (PAGE, CONTENT[0])],
        ),
        (
            [*RAM, ("dimm0", PAGE)],
            PLUGGED,
            ["--place", "dimm0=0x100000000"],
            [(0, b"".join(CONTENT)), (1 << 32, CONTENT[0])],
        ),
        (
            [*RAM, ("dimm0", PAGE)],
            PLUGGED,
            ["--place", "dimm0=none", "--below-4g", "8K"],
            [(0, b"".join(CONTENT[:2])), (1 << 32, b"".join(CONTENT[2:]))],
        ),
    ],
    ids=["named", "NUMA", "a DIMM", "without the DIMM, split"],
)
def test_several_blocks(
    image: Path,
    blocks: list[tuple[str, int]],
    pages: bytes,
    options: list[str],
    expected: list[tuple[int, bytes]],
) -> None:
    put_state(image, "live", made.state(blocks, [pages]))
    out = image.with_name("out.elf")
    assert command.run("memory", image, "live", out, *options).returncode == 0
    merged = [(0, b"".join(content for at, content in segments(out) if at < 1 << 32))]
    merged += [(at, content) for at, content in segments(out) if at >= 1 << 32]
    assert merged == [
        (0, b"".join(content for at, content in expected if at < 1 << 32)),
        *[(at, content) for at, content in expected if at >= 1 << 32],
    ]


ONE = made.state(RAM, [WHOLE])
DIMM = made.state([*RAM, ("dimm0", PAGE)], [PLUGGED])


@pytest.mark.parametrize(
    ("state", "options", "said"),
    [
        (made.state(RAM, [WHOLE[: -PAGE - 8]]), [], "lacks 1 of the 4 pages of RAM block 'pc.ram'"),
        (ONE[: len(ONE) // 2], [], "ends early"),
        (DIMM, [], "add --place dimm0=ADDRESS, or --place dimm0=none to leave it out"),
        (DIMM, ["--place", "dimm0=0x1000"], "would lie over others at 0x1000"),
        (DIMM, ["--place", "dimm0=0x1001"], "cannot be at 0x1001"),
        (DIMM, ["--place", f"dimm0={1 << 52}"], "cannot be at 0x10000000000000"),
        (DIMM, ["--place", "dimm1=0"], "there is no RAM block 'dimm1': there are pc.ram (16 KiB)"),
        (DIMM, ["--place", "pc.ram=0"], "'pc.ram' is given two places"),
        (ONE, ["--below-4g", "1"], "--below-4g: give a size of whole pages"),
        (ONE, ["--above-4g", "0x10000000000"], "--above-4g: all of the memory lies below 4 GiB"),
        (ONE, ["--below-4g", "8K", "--above-4g", "0x10000"], "0x100000000 or 0x10000000000 in"),
        (ONE, ["--below-4g", "8K", "--above-4g", "0x100000001"], "give the address of a page"),
        (ONE, ["--below-4g", "8G"], "--below-4g: give a size of whole pages"),
        (made.state([("ram", PAGE)], [b""]), [], "add --ram NAME"),
        (made.state([("ram-node1", PAGE)], [b""]), [], "add --ram NAME"),
        (made.state(RAM, [WHOLE], "virt-9.0"), [], "of type 'virt-9.0' has its memory is not"),
    ],
    ids=lambda value: "" if isinstance(value, bytes) else None,
)
def test_what_cannot_be_told_is_one_line_and_no_file(
    image: Path, state: bytes, options: list[str], said: str
) -> None:
    put_state(image, "live", state)
    done = command.run("memory", image, "live", image.with_name("out"), *options)
    assert done.returncode == 1
    assert said in done.stderr.splitlines()[-1]
    assert sorted(path.name for path in image.parent.iterdir()) == ["disk.qcow2"]


def test_targets_and_snapshots(image: Path) -> None:
    put_state(image, "live", made.state(RAM, [WHOLE]))
    qemu.take(image, "disk only")
    out = image.with_name("out")
    assert "standard output cannot take" in command.fails("memory", image, "live", "-")
    assert "has no VM state" in command.fails("memory", image, "disk only", out)
    out.write_bytes(b"mine")
    assert "add --force to replace it" in command.fails("memory", image, "live", out)
    assert "which is being copied" in command.fails("memory", image, "live", image, "--force")
    assert command.run("memory", image, "live", out, "--force").returncode == 0
    assert out.read_bytes() == b"".join(CONTENT)


def test_a_file_that_cannot_be_so_long(image: Path) -> None:
    put_state(image, "live", DIMM)
    out = image.with_name("out")
    line = ["prlimit", f"--fsize={GiB}", sys.executable, "-m", "qcow2snap_core", "memory"]
    words = [image, "live", out, "--place", f"dimm0={GiB}"]
    done = subprocess.run([*line, *words], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].endswith(f"cannot make '{out}' 1 GiB long: file too large")
    assert sorted(path.name for path in image.parent.iterdir()) == ["disk.qcow2"]


def test_a_damaged_table_is_an_error(image: Path) -> None:
    put_state(image, "live", made.state(RAM, [WHOLE]))
    l2 = damage.l2_entry(image, "live", MiB if MiB % (512 * MiB) == 0 else 512 * MiB)
    damage.put64(image, l2, 1 << 55 | 512)
    out = image.with_name("out")
    assert command.run("memory", image, "live", out).returncode == 1
    assert not out.exists()
    assert not list(image.parent.glob(".qcow2snap-*"))
