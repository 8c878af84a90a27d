"""What is noted of pages, against a list with an entry for each."""

from __future__ import annotations

import random

from support.memory import bounded
from support.qemu import MiB

from qcow2snap_core.memory.blocks import MOST_RAM, PAGE, Block, Run
from qcow2snap_core.memory.sent import Sent


def test_it_says_what_a_list_would_say() -> None:
    rng = random.Random(3)
    for pages in (1, 7, 8, 9, 64, 200):
        sent, model = Sent(Block("pc.ram", pages * PAGE)), ["missing"] * pages
        while "missing" in model:
            at = model.index("missing")
            assert sent.missing() == (model.count("missing"), at * PAGE)
            first = rng.randrange(pages)
            count = rng.randrange(1, pages - first + 1) if rng.random() < 0.5 else 1
            data = bytes(count * PAGE) if rng.random() < 0.5 else None
            had_data = "data" in model[first : first + count]
            assert sent.note(Run(0, first * PAGE, count * PAGE, data)) == had_data
            model[first : first + count] = ["zero" if data is None else "data"] * count
            assert sent.data == model.count("data") * PAGE
        assert sent.missing() is None


def test_the_largest_memory_takes_two_bits_for_each_page() -> None:
    with bounded(MOST_RAM // PAGE // 4 + MiB):
        assert Sent(Block("pc.ram", MOST_RAM)).missing() == (MOST_RAM // PAGE, 0)
