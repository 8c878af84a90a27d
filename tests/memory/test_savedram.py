"""The RAM in states that were made by hand: what is read, and what is refused."""

from __future__ import annotations

import os
import random
import signal
import zlib
from collections.abc import Generator
from contextlib import suppress

import pytest
from support import savedstate as made
from support.memory import bounded
from support.qemu import MiB
from support.savedstate import COMMAND, COMPRESSED, DATA, END, EOS_WORD, FULL, PAGE, PART, START, be

from qcow2snap_core.errors import ImageError
from qcow2snap_core.memory import mappedram
from qcow2snap_core.memory.savedram import SavedRam
from qcow2snap_core.memory.stream import Stream
from qcow2snap_core.util.interrupts import Interrupted, deferred

RNG = random.Random(1)
PAGES = [RNG.randbytes(PAGE) for _ in range(8)]
BLOCKS = [("pc.ram", 4 * PAGE), ("vga.vram", 2 * PAGE)]
ALL = [
    made.page(0, PAGES[0], block="pc.ram") + made.page(PAGE, PAGES[1]),
    made.page(2 * PAGE, b"\0", made.ZERO) + made.page(3 * PAGE, PAGES[2]),
    made.page(0, b"\0", made.ZERO, "vga.vram") + made.page(PAGE, PAGES[3]),
]


def ram(state: bytes, step: int = 1 << 20) -> tuple[SavedRam, dict[str, bytearray]]:
    """What is read from a state that comes in pieces of so many bytes."""

    def pieces(start: int, end: int) -> Generator[bytes, None, None]:
        for at in range(start, end, step):
            yield state[at : min(end, at + step)]

    saved = SavedRam(Stream("the state", len(state), len(state), pieces))
    found = {block.name: bytearray(b"?" * block.size) for block in saved.blocks}
    for run in saved.runs():
        block = found[saved.blocks[run.block].name]
        assert run.data is None or len(run.data) == run.length
        block[run.offset : run.offset + run.length] = run.data or bytes(run.length)
    assert all(len(found[block.name]) == block.size for block in saved.blocks)
    return saved, found


@pytest.mark.parametrize("step", [1, 7, 4096, 5000, 1 << 20])
def test_pages_lie_where_they_belong(step: int) -> None:
    saved, found = ram(made.state(BLOCKS, ALL), step)
    assert saved.machine == "pc-i440fx-7.2"
    assert found["pc.ram"] == PAGES[0] + PAGES[1] + bytes(PAGE) + PAGES[2]
    assert found["vga.vram"] == bytes(PAGE) + PAGES[3]


def test_the_last_one_counts() -> None:
    again = made.page(PAGE, PAGES[5], block="pc.ram") + made.page(0, b"\0", made.ZERO)
    _, found = ram(made.state(BLOCKS, [*ALL, again]))
    assert found["pc.ram"][: 2 * PAGE] == bytes(PAGE) + PAGES[5]


def test_a_page_of_one_byte_over_and_over() -> None:
    filled = made.page(0, b"\xa5", made.ZERO, "pc.ram")
    _, found = ram(made.state(BLOCKS, [*ALL, filled]))
    assert found["pc.ram"][:PAGE] == b"\xa5" * PAGE


def packed(data: bytes) -> bytes:
    stream = zlib.compress(data)
    return be(4, len(stream)) + stream


@pytest.mark.parametrize("step", [1, 5000])
def test_compressed_pages(step: int) -> None:
    one = made.page(0, packed(PAGES[6]), COMPRESSED, "pc.ram")
    two = made.page(PAGE, packed(b"x" * PAGE), COMPRESSED)
    _, found = ram(made.state(BLOCKS, [*ALL, one + two]), step)
    assert found["pc.ram"][: 2 * PAGE] == PAGES[6] + b"x" * PAGE


@pytest.mark.parametrize(
    ("machine", "more"),
    [
        (None, b""),
        ("pc-q35-9.0", made.subsection("configuration/uuid", bytes(16))),
        ("pc", made.subsection("configuration/target-page-bits", be(4, 12))),
        (
            "pc",
            made.subsection("configuration/capabilities", be(4, 1) + made.counted("x"))
            + made.subsection("configuration/uuid", bytes(16)),
        ),
    ],
)
def test_configurations(machine: str | None, more: bytes) -> None:
    saved, _ = ram(made.state(BLOCKS, ALL, machine, more))
    assert saved.machine == machine


def test_without_footers_and_with_commands() -> None:
    footer = b"\x7e" + be(4, made.RAM_ID)
    bare = made.state(BLOCKS, ALL).replace(footer, b"")
    ping = be(1, COMMAND) + be(2, 2) + be(2, 4) + be(4, 1)
    start = be(1, START) + be(4, made.RAM_ID)
    for state in (bare, made.state(BLOCKS, ALL).replace(start, ping + start)):
        assert ram(state)[1]["pc.ram"].startswith(PAGES[0])


MAPPED = made.mapped(
    [("pc.ram", {0: PAGES[0], 1: PAGES[1], 300: PAGES[2]}, 301 * PAGE), ("b", {}, PAGE)]
)


@pytest.mark.parametrize("step", [4096, 1 << 20])
def test_mapped_ram(step: int) -> None:
    _, found = ram(MAPPED, step)
    assert found["pc.ram"] == PAGES[0] + PAGES[1] + bytes(298 * PAGE) + PAGES[2]
    assert found["b"] == bytes(PAGE)


def test_a_large_gap_in_mapped_ram_is_not_read() -> None:
    large = made.mapped([("pc.ram", {0: PAGES[0]}, 80 << 20)])
    read = []

    def pieces(start: int, end: int) -> Generator[bytes, None, None]:
        for at in range(start, end, 1 << 20):
            read.append(at)
            yield large[at : at + (1 << 20)]

    runs = list(SavedRam(Stream("the state", 4096, len(large), pieces)).runs())
    assert runs[0] == (0, 0, PAGE, PAGES[0])
    assert sum(run.length for run in runs) == 80 << 20
    assert len(read) < 20


@pytest.mark.parametrize("at_once", [32, 64, 160, 1 << 20])
def test_mapped_ram_whose_bitmap_is_read_in_pieces(
    at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mappedram, "_BITMAP_AT_ONCE", at_once)
    pages = {n: RNG.randbytes(PAGE) for n in (0, 255, 256, 511, 512, 513, 1299)}
    state = made.mapped([("pc.ram", pages, 1300 * PAGE), ("b", {0: PAGES[0]}, PAGE)])
    _, found = ram(state)
    assert found["pc.ram"] == b"".join(pages.get(n, bytes(PAGE)) for n in range(1300))
    assert found["b"] == PAGES[0]


def test_a_large_block_takes_little_memory() -> None:
    """Of 2 TiB, whose bitmap has 64 MiB: one of a device, say, which is written nowhere."""
    size = 2 << 40
    said = made.head("pc-q35-11.0", made.MAPPED_RAM)
    said += be(1, START) + be(4, made.RAM_ID) + made.counted("ram") + be(4, 0) + be(4, 4)
    said += be(8, size | made.MEM_SIZE) + made.counted("/dev/x") + be(8, size)
    pages = 1 << 30
    said += made.mapped_header(4096, pages)
    rest = EOS_WORD + b"\x7e" + be(4, made.RAM_ID) + made.section(END, EOS_WORD)
    end = pages + size

    def pieces(start: int, stop: int) -> Generator[bytes, None, None]:
        for at in range(start, stop, 1 << 16):
            known = said if at < len(said) else rest if at >= end else b""
            yield known[at % end :].ljust(min(1 << 16, stop - at), b"\0")

    with bounded(8 << 20):
        saved = SavedRam(Stream("the state", 4096, end + len(rest), pieces))
        assert next(saved.runs()) == (0, 0, MiB, None)


def mapped_but(old: bytes, new: bytes) -> bytes:
    assert old in MAPPED
    return MAPPED.replace(old, new, 1)


WHOLE = made.state(BLOCKS, ALL)
HEAD = made.head()
LIST = made.block_list(BLOCKS)


def started(content: bytes) -> bytes:
    return HEAD + made.section(START, content)


def with_pages(content: bytes) -> bytes:
    return started(LIST + EOS_WORD) + made.section(END, content + EOS_WORD) + bytes(PAGE)


def with_capability(name: str) -> bytes:
    listed = be(4, 1) + made.counted(name)
    return made.state(BLOCKS, ALL, "pc", made.subsection("configuration/capabilities", listed))


AT = MAPPED.index(be(8, PAGE)) - 4 + 28  # the first bitmap
HEADER = made.mapped_header(AT, made.ALIGNED)

REFUSED: dict[str, tuple[bytes, str]] = {
    "mapped, version 2": (
        mapped_but(HEADER, made.mapped_header(AT, made.ALIGNED, 2)),
        "mapped-ram of version 2 with pages of 4096 bytes",
    ),
    "mapped, large pages": (
        mapped_but(HEADER, made.mapped_header(AT, made.ALIGNED, 1, 8192)),
        "mapped-ram of version 1 with pages of 8192 bytes",
    ),
    "mapped, bitmap before": (
        mapped_but(HEADER, made.mapped_header(0, made.ALIGNED)),
        "pages at 0x100000, which lie over something else",
    ),
    "mapped, pages over the bitmap": (
        mapped_but(HEADER, made.mapped_header(AT, AT + 8)),
        "which lie over something else",
    ),
    "mapped, pages far away": (
        mapped_but(HEADER, made.mapped_header(AT, 1 << 63)),
        "behind its end",
    ),
    "mapped, a huge block": (
        mapped_but(be(8, 301 * PAGE) + HEADER, be(8, 1 << 61) + HEADER),
        "RAM block 'pc.ram' of 2305843009213693952 bytes",
    ),
    "mapped, more than is read": (
        mapped_but(be(8, 302 * PAGE | made.MEM_SIZE), be(8, 1 << 44 | made.MEM_SIZE)),
        "16 TiB of RAM: no more than 8 TiB is read",
    ),
    "mapped, a page in a section": (
        made.mapped([("b", {}, PAGE)], made.page(0, PAGES[0], block="b")),
        "a page in a section, where each should have its place",
    ),
    "nothing": (b"", "ends early, at offset 0x0"),
    "no magic": (b"x" * 99, "no migration stream"),
    "version 2": (WHOLE.replace(be(4, 3), be(4, 2), 1), "no migration stream of version 3"),
    "a long machine": (b"QEVM" + be(4, 3) + b"\x07" + be(4, 1 << 30), "a name of 1073741824 bytes"),
    "an odd machine": (made.state(BLOCKS, ALL, "pc\x1b[2J"), "a name that is none"),
    "an odd subsection": (
        made.state(BLOCKS, ALL, "pc", made.subsection("configuration/new", b"")),
        "a configuration that is not known: configuration/new",
    ),
    "other pages": (
        made.state(
            BLOCKS, ALL, "virt", made.subsection("configuration/target-page-bits", be(4, 16))
        ),
        "only that is read",
    ),
    "many capabilities": (
        made.state(
            BLOCKS, ALL, "pc", made.subsection("configuration/capabilities", be(4, 1 << 31))
        ),
        "2147483648 capabilities",
    ),
    "ignore-shared": (with_capability("x-ignore-shared"), "shared with other programs"),
    "another first": (
        HEAD + made.section(START, b"", "vfio", 1) + WHOLE[len(HEAD) :],
        "has the state of 'vfio' before the end of its RAM",
    ),
    "a device first": (
        HEAD + made.section(FULL, b"", "ram", 1) + WHOLE[len(HEAD) :],
        "before the end of its RAM",
    ),
    "another in between": (
        started(LIST + EOS_WORD) + made.section(START, b"", "block", 1),
        "has the state of 'block' before the end of its RAM",
    ),
    "a part of another": (
        started(LIST + EOS_WORD) + made.section(PART, EOS_WORD, number=9),
        "a part of another section",
    ),
    "no end": (started(LIST + EOS_WORD) + b"\0", "a section of type 0x0 before the RAM's end"),
    "old RAM": (WHOLE.replace(be(4, 0) + be(4, 4), be(4, 0) + be(4, 3), 1), "RAM of version 3"),
    "another footer": (
        WHOLE.replace(b"\x7e" + be(4, made.RAM_ID), b"\x7e" + be(4, 77), 1),
        "a section of the RAM that does not end where it should",
    ),
    "a command of postcopy": (
        HEAD + be(1, COMMAND) + be(2, 3) + be(2, 16) + bytes(16),
        "the command 3 of a live migration",
    ),
    "no blocks": (started(EOS_WORD), "does not begin with its blocks"),
    "too many pages": (
        started(made.block_list([("pc.ram", 1 << 50)])),
        "which cannot be the 274877906944 pages",
    ),
    "a block twice": (
        started(made.block_list([("pc.ram", PAGE), ("pc.ram", PAGE)])) + bytes(99),
        "'pc.ram' comes twice",
    ),
    "thousands of blocks": (
        started(made.block_list([(str(n), PAGE) for n in range(4097)])) + bytes(9 * 4097),
        "more than 4096 RAM blocks",
    ),
    "a block of no pages": (
        started(made.block_list([("a", 0), ("b", PAGE)])) + bytes(99),
        "RAM block 'a' of 0 bytes",
    ),
    "a block of half a page": (
        started(made.block_list([("a", 512)], 2 * PAGE)) + bytes(99),
        "RAM block 'a' of 512 bytes",
    ),
    "a block larger than all": (
        started(made.block_list([("a", 8 * PAGE)], 2 * PAGE)) + bytes(99),
        "RAM block 'a' of 32768 bytes, with 8192 to go",
    ),
    "a block without a name": (
        started(made.block_list([("", PAGE)])) + bytes(99),
        "a name of 0 bytes",
    ),
    "an unknown block": (with_pages(made.page(0, PAGES[0], block="pc.rom")), "in no RAM block"),
    "no block yet": (with_pages(made.page(0, PAGES[0])), "in no RAM block"),
    "behind a block": (
        with_pages(made.page(4 * PAGE, PAGES[0], block="pc.ram")),
        "a page at 0x4000 that is in no RAM block",
    ),
    "far behind a block": (
        with_pages(made.page((1 << 64) - PAGE, PAGES[0], block="pc.ram")),
        "in no RAM block",
    ),
    "differences": (with_pages(made.page(0, b"", made.XBZRLE, "pc.ram")), "XBZRLE"),
    "elsewhere": (with_pages(be(8, made.MULTIFD)), "multifd"),
    "RDMA": (with_pages(be(8, made.HOOK)), "a page with the flags 0x80"),
    "two kinds": (with_pages(made.page(0, b"", DATA | made.ZERO, "pc.ram")), "the flags 0xa"),
    "no flags": (with_pages(be(8, 0)), "a page with the flags 0x0"),
    "compressed, long": (
        with_pages(made.page(0, be(4, 1 << 20), COMPRESSED, "pc.ram")),
        "a compressed page that is none",
    ),
    "compressed, no stream": (
        with_pages(made.page(0, be(4, 9) + b"x" * 9, COMPRESSED, "pc.ram")),
        "a compressed page that is none",
    ),
    "compressed, too short": (
        with_pages(made.page(0, packed(b"x" * (PAGE - 1)), COMPRESSED, "pc.ram")),
        "a compressed page that is none",
    ),
    "compressed, too long": (
        with_pages(made.page(0, packed(b"x" * (PAGE + 1)), COMPRESSED, "pc.ram")),
        "a compressed page that is none",
    ),
    "compressed, a bomb": (
        with_pages(made.page(0, packed(bytes(1 << 21)), COMPRESSED, "pc.ram")),
        "a compressed page that is none",
    ),
}


def test_a_signal_ends_what_has_hardly_an_end() -> None:
    empty = made.section(PART, EOS_WORD)

    def pieces(_start: int, _end: int) -> Generator[bytes, None, None]:
        yield started(LIST + EOS_WORD)
        os.kill(os.getpid(), signal.SIGTERM)
        for _ in range(20):  # then it ends early, and nobody listened
            yield empty * 1000

    with deferred(), pytest.raises((Interrupted, ImageError)) as e:
        list(SavedRam(Stream("the state", 1 << 50, 1 << 50, pieces)).runs())
    with deferred():  # forget it
        assert e.type is Interrupted


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_right_is_refused(case: str) -> None:
    state, said = REFUSED[case]
    with pytest.raises(ImageError) as e:
        ram(state)
    assert said in str(e.value)
    assert str(e.value).startswith("the state ")
    assert str(e.value).isprintable()


def test_a_state_that_ends_early_is_an_error_wherever_it_ends() -> None:
    behind = len(made.section(FULL, b"whatever", "timer", 0)) + 1
    for length in range(len(WHOLE) - behind):
        with pytest.raises(ImageError, match="ends early|cannot be the"):
            ram(WHOLE[:length])


def test_any_byte_may_be_wrong() -> None:
    """There is an end, with pages inside of their blocks, or an error of ours."""
    rng = random.Random(4)
    small = made.state(BLOCKS[:1], [made.zeros([])] + ALL[:2])
    for _ in range(3000):
        broken = bytearray(small)
        for _ in range(rng.randrange(1, 4)):
            broken[rng.randrange(len(broken))] = rng.choice(
                (0, 1, 8, 16, 32, 255, rng.getrandbits(8))
            )
        with suppress(ImageError):
            ram(bytes(broken))
