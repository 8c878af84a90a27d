"""Words that argparse would take for its own."""

from __future__ import annotations

from pathlib import Path

from support import command, qemu
from support.qemu import MiB


def test_a_snapshot_may_be_called_like_the_end_of_options(tmp_path: Path) -> None:
    """argparse drops every ``--``, the name as well."""
    path = qemu.create(tmp_path / "disk.qcow2", MiB)
    qemu.io(path, "write -P 7 0 64k")
    qemu.run("qemu-img", "snapshot", "-c", "--", path)
    qemu.io(path, "write -P 8 0 64k")
    expected = qemu.content(path, "--")
    out = tmp_path / "out"
    command.qcow2snap("copy", "--", path, "--", out)
    assert out.read_bytes() == expected
    assert "'--'" in command.qcow2snap("check", "--", path, "--")
    assert "deleting '--' frees" in command.qcow2snap("list", "--free=--", path)
    command.qcow2snap("copy", "--since=--", path, "@active", out)
    assert out.read_bytes() == qemu.content(path)
