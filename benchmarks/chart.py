"""make bench: the ratios of a benchmark's JSON as bars, for the documentation.

/usr/bin/python3 benchmarks/chart.py build/bench.json docs/performance.svg
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

OURS, GOAL = "#2f6f9f", "#b8562c"


def main(source: str, target: str) -> int:
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams["svg.hashsalt"] = "qcow2snap"  # the same input gives the same file
    mpl.rcParams["svg.fonttype"] = "none"
    from matplotlib import pyplot as plt

    result = json.loads(Path(source).read_text())
    engine = next(iter(result["engines"]))
    # The first of the others is qemu-nbd, or qemu-img; rows whose rounds do not agree have no bar.
    found = [(n, r, r["ratio"][engine][r["others"][0]]) for n, r in result["rows"].items()]
    rows = [(name, row) for name, row, ratio in found if ratio is not None][::-1]
    ratios = [ratio for _, _, ratio in found if ratio is not None][::-1]
    names = [name for name, _ in rows]
    figure, axes = plt.subplots(figsize=(8, 0.24 * len(rows) + 1.2))
    axes.barh(names, ratios, color=OURS, height=0.7)
    for y, (ratio, (_, row)) in enumerate(zip(ratios, rows, strict=True)):
        axes.text(ratio, y, f" {ratio:.2g}", va="center", fontsize=7)
        axes.plot([row["goal"]] * 2, [y - 0.4, y + 0.4], color=GOAL, linewidth=1.5)
    axes.axvline(1, color="black", linewidth=0.8)
    axes.tick_params(labelsize=7)
    axes.margins(y=0.01)
    axes.set_title(
        f"times the rate of qemu-nbd -l in the same run ({result['date']}, "
        f"{result['machine']['cores']} cores, {result['machine']['processor']});\n"
        "the black line is qemu-nbd, the short lines are our goals",
        fontsize=8,
        loc="left",
    )
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    figure.savefig(target, bbox_inches="tight", metadata={"Date": None})
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
