"""Ends a run with the table of what test_matrix.py covered."""

from __future__ import annotations

from typing import Any


def pytest_terminal_summary(terminalreporter: Any) -> None:
    found: dict[str, list[Any]] = {"matrix": [], "refused": []}
    for report in terminalreporter.stats.get("passed", []):
        for name, value in report.user_properties:
            if name in found and report.when == "call":
                found[name].append(value)
    if not found["matrix"]:
        return
    clusters = list(dict.fromkeys(c for _, c, _, _ in sorted(found["matrix"], key=_by_cluster)))
    rows: dict[tuple[str, str], dict[str, int]] = {}
    for feature, cluster, compat, _ in sorted(found["matrix"]):
        row = rows.setdefault((feature, compat), {})
        row[cluster] = row.get(cluster, 0) + 1
    terminalreporter.section("images that read as in QEMU, by cluster size (chains)")
    for (feature, compat), row in rows.items():
        cells = "".join(f"{c:>8}: {row.get(c, '-')}" for c in clusters)
        terminalreporter.write_line(f"{feature:<20} compat={compat:<5}{cells}")
    for feature, cluster, compat, why in sorted(found["refused"]):
        terminalreporter.write_line(f"QEMU refuses {feature}, {cluster}, compat={compat}: {why}")


def _by_cluster(case: Any) -> int:
    return int(case[1].replace("K", "000").replace("M", "000000"))
