"""The state of a real machine that `savevm` put into an image: its export is what QEMU saved,
and another QEMU that loads it as an incoming migration is in the same state."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import nbd
import pytest
from support import qemu
from support.qemu import KiB, MiB
from support.server import ROOT, serve
from support.vm import MEMORY, machine

# Every geometry puts the state at another place: behind the disk, at the next L1 entry.
SHAPES: dict[str, tuple[int, dict[str, Any]]] = {
    "defaults": (3 * MiB, {}),
    "v2": (3 * MiB, {"compat": "0.10", "cluster_size": 4 * KiB}),
    "512": (MiB + 512, {"cluster_size": 512}),
    "a whole L1 entry": (2 * MiB, {"cluster_size": 4 * KiB}),
    "2M": (3 * MiB, {"cluster_size": 2 * MiB}),
    "extended L2": (3 * MiB, {"extended_l2": "on"}),
    "extended L2, a whole L1 entry": (16 * MiB, {"extended_l2": "on", "cluster_size": 16 * KiB}),
    "zstd": (3 * MiB, {"compression_type": "zstd"}),
}


def content_of_vm_state(path: Path, name: str) -> bytes:
    """By qemu-img, which is told that the disk goes on over the state."""
    state = qemu.snapshots(path)[name].vm_state_size
    padded = -(-state // 512) * 512
    copy = qemu.as_active(path, name, vm_state=True)
    start = qemu.info(copy)["virtual-size"] - padded
    tail = f"driver=raw,offset={start},size={padded},file.driver=qcow2,file.file.filename={copy}"
    out = path.with_name("state")
    qemu.run("qemu-img", "convert", "--image-opts", tail, "-O", "raw", out)
    copy.unlink()
    return out.read_bytes()[:state]


@pytest.mark.parametrize("shape", SHAPES)
def test_the_export_is_what_qemu_saved(tmp_path: Path, shape: str) -> None:
    size, options = SHAPES[shape]
    path = qemu.create(tmp_path / "disk.qcow2", size, **options)
    qemu.io(path, "write -P 5 0 1M")
    with machine(path) as vm:
        vm.save("live")
    (listed,) = qemu.info(path)["snapshots"]
    with serve(file=path) as server:
        state = server.read("live/vmstate")
        assert server.copy("live/vmstate") == state
        assert server.read("live") == qemu.content(path, "live")
    for target in (path.with_name("copied"), "-"):
        done = subprocess.run(
            [sys.executable, "-m", "qcow2snap_core", "copy", path, "live/vmstate", target],
            stdout=subprocess.PIPE,
            cwd=ROOT,
            check=True,
            timeout=60,
        )
        assert (done.stdout if target == "-" else path.with_name("copied").read_bytes()) == state
    assert len(state) == listed["vm-state-size"]
    assert state[:4] == b"QEVM"
    assert state == content_of_vm_state(path, "live")


@pytest.mark.parametrize("extended", ["on", "off"])
def test_qemu_resumes_from_the_export(tmp_path: Path, extended: str) -> None:
    path = qemu.create(tmp_path / "disk.qcow2", 3 * MiB, extended_l2=extended)
    with machine(path) as vm:
        vm.run_a_little()
        registers, memory = vm.registers(), vm.memory(tmp_path)
        vm.save("live")
    assert any(memory), "the BIOS wrote nothing"
    with machine(path) as vm:  # a machine that was only switched on is in another state
        assert vm.registers() != registers
    stream = tmp_path / "stream"
    with serve(file=path) as server:
        stream.write_bytes(server.copy("live/vmstate"))
    with machine(path, "-incoming", f"exec:cat {stream}") as vm:
        vm.wait_until_loaded()
        assert vm.registers() == registers
        assert vm.memory(tmp_path) == memory
        assert len(memory) == MEMORY
        vm.run_a_little()  # and it goes on


def test_the_state_is_that_of_its_snapshot(tmp_path: Path) -> None:
    """Two states in one image, another disk size between them, and one without a state."""
    path = qemu.create(tmp_path / "disk.qcow2", 3 * MiB, cluster_size=4 * KiB)
    with machine(path) as vm:
        vm.save("first")
    qemu.run("qemu-img", "resize", "-q", path, 9 * MiB)
    with machine(path) as vm:
        vm.run_a_little()
        vm.save("second")
    qemu.take(path, "none")
    with serve(file=path) as server:
        for name in ("first", "second"):
            assert server.read(f"{name}/vmstate") == content_of_vm_state(path, name)
        assert server.read("first/vmstate") != server.read("second/vmstate")
        with pytest.raises(nbd.Error), server.connect("none/vmstate"):
            pass
        assert "there is no export 'none/vmstate'" in server.log


def test_a_snapshot_of_that_name_wins(tmp_path: Path) -> None:
    path = qemu.create(tmp_path / "disk.qcow2", 3 * MiB)
    with machine(path) as vm:
        vm.save("live")
    qemu.io(path, "write -P 8 0 3M")
    qemu.take(path, "live/vmstate")
    with serve(file=path) as server:
        assert server.read("live/vmstate") == b"\x08" * 3 * MiB


def test_beside_the_chosen_snapshot(tmp_path: Path) -> None:
    path = qemu.create(tmp_path / "disk.qcow2", 3 * MiB)
    with machine(path) as vm:
        vm.save("live")
        vm.save("other")
    with serve(file=path, snapshot="live") as server:
        assert server.read("live/vmstate") == content_of_vm_state(path, "live")
        with pytest.raises(nbd.Error), server.connect("other/vmstate"):
            pass
