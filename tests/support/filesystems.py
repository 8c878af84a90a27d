"""Real filesystems, made by each one's own tools from a directory of files, and read back."""

from __future__ import annotations

import importlib.util
import os
import shutil
import stat
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from hashlib import sha256
from pathlib import Path
from random import Random

import pytest

from support import qemu
from support.qemu import MiB
from support.server import ROOT

#: Where `make deps-test` puts dissect, which is in no distribution
DISSECT = ROOT / "build" / "dissect"

SIZES = {"xfs": 300 * MiB, "btrfs": 128 * MiB}
_TOOLS = {
    "ext4": ["mke2fs"],
    "ext2": ["mke2fs"],
    "xfs": ["mkfs.xfs"],
    "btrfs": ["mkfs.btrfs"],
    "ntfs": ["mkntfs", "ntfs-3g"],
    "fat": ["mkfs.fat", "mcopy"],
}


@cache
def has_dissect() -> bool:
    """Whether it loads: dissect.target 3.25 is there, and does not, with Python 3.14."""
    script = "import dissect.target.filesystems.extfs"
    env = {**os.environ, "PYTHONPATH": str(DISSECT)}
    line = [sys.executable, "-c", script]
    return subprocess.run(line, env=env, stderr=subprocess.DEVNULL, check=False).returncode == 0


def needs(kind: str, backend: str) -> None:
    """Skip the test where something is missing."""
    path = f"{os.environ['PATH']}:/usr/sbin:/sbin"
    missing = [tool for tool in _TOOLS[kind] if shutil.which(tool, path=path) is None]
    if kind == "ntfs" and not os.access("/dev/fuse", os.W_OK):
        missing.append("/dev/fuse")
    if backend == "dissect" and not has_dissect():
        missing.append("dissect")
    if backend == "tsk" and importlib.util.find_spec("pytsk3") is None:
        missing.append("pytsk3")
    if missing:
        pytest.skip(f"not here: {', '.join(missing)}")


def use_dissect(monkeypatch: pytest.MonkeyPatch) -> None:
    """For the commands that a test runs, and in its own process."""
    monkeypatch.setenv("PYTHONPATH", str(DISSECT))
    if DISSECT.exists() and str(DISSECT) not in sys.path:
        sys.path.append(str(DISSECT))


def make_tree(top: Path, kind: str) -> Path:
    """Files of many kinds, as far as the filesystem has them."""
    noise = Random(1)
    (top / "etc" / "deep" / "deeper").mkdir(parents=True)
    (top / "etc" / "hostname").write_text("guest1\n")
    (top / "etc" / "deep" / "deeper" / "empty").touch()
    (top / "big").write_bytes(noise.randbytes(3 * MiB + 17))
    (top / "text").write_text("a line of text\n" * 50_000)
    for i in range(60):
        (top / "etc" / f"file{i}").write_bytes(noise.randbytes(noise.randrange(9000)))
    (top / "etc" / "hostname").chmod(0o640)
    if kind != "fat":
        (top / "ünïcode ☃").write_text("snow")
        with open(top / "sparse", "wb") as f:
            f.seek(2 * MiB)
            f.write(b"middle")
            f.truncate(5 * MiB)
        os.link(top / "text", top / "etc" / "again")
    if kind not in ("fat", "ntfs"):
        os.symlink("../text", top / "etc" / "link")
        os.symlink("deep/deeper", top / "etc" / "into")
        os.symlink("./" * 40 + "hostname", top / "etc" / "long")
    for path in (top, *top.rglob("*")):
        os.utime(path, ns=(10**18, 10**18), follow_symlinks=False)
    return top


def make_filesystem(kind: str, tree: Path, raw: Path, *options: object) -> Path:
    """A filesystem with what is in a directory."""
    with open(raw, "wb") as f:
        f.truncate(SIZES.get(kind, 48 * MiB))
    environment = {**os.environ, "PATH": f"{os.environ['PATH']}:/usr/sbin:/sbin"}
    if kind in ("ext4", "ext2"):
        qemu.run("mke2fs", "-q", "-t", kind, *options, "-d", tree, raw, env=environment)
    elif kind == "xfs":
        proto = raw.with_suffix(".proto")
        proto.write_text("/\n0 0\n" + "\n".join(_proto(tree)) + "\n")
        qemu.run("mkfs.xfs", "-q", "-p", proto, raw, env=environment)
    elif kind == "btrfs":
        qemu.run("mkfs.btrfs", "-q", "--rootdir", tree, raw, env=environment)
    elif kind == "ntfs":
        qemu.run("mkntfs", "-q", "-F", "-Q", raw, env=environment)
        with mounted("ntfs-3g", raw) as where:
            qemu.run("cp", "-a", f"{tree}/.", where)
    else:
        qemu.run("mkfs.fat", "-F", "16", raw, env=environment)
        qemu.run("mcopy", "-s", "-m", "-i", raw, *tree.iterdir(), "::", env=environment)
    return raw


def _proto(directory: Path) -> Iterator[str]:
    """mkfs.xfs's prototype file: it knows no times and no hard links."""
    yield f"d--{stat.S_IMODE(directory.stat().st_mode):03o} 0 0"
    for path in sorted(directory.iterdir()):
        mode = stat.S_IMODE(path.lstat().st_mode)
        name = path.name.replace(" ", "_")
        if path.is_symlink():
            yield f"{name} l--{mode:03o} 0 0 {os.readlink(path)}"
        elif path.is_dir():
            first, *rest = _proto(path)
            yield f"{name} {first}"
            yield from rest
        elif " " not in path.name:
            yield f"{name} ---{mode:03o} 0 0 {path}"
    yield "$"


@contextmanager
def mounted(kind: str, raw: Path, *options: str) -> Iterator[Path]:
    """What the kernel, or ntfs-3g, shows of it; skips the test where that cannot be."""
    where = raw.with_name(f"{raw.name}.mnt")
    where.mkdir()
    line = ["ntfs-3g", str(raw), str(where)]
    if kind != "ntfs-3g":
        line = ["mount", "-o", ",".join(("loop", *options)), "-t", kind, str(raw), str(where)]
    done = subprocess.run(line, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"cannot be mounted here: {done.stderr.strip()}")
    try:
        yield where
    finally:
        subprocess.run(["umount", where], check=True)
        where.rmdir()


def snapshot_of(raw: Path, name: str = "one") -> Path:
    """An image whose snapshot has this content, and whose active disk has other."""
    path = raw.with_suffix(".qcow2")
    qemu.run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", raw, path)
    qemu.take(path, name)
    qemu.io(path, "write -P 7 0 1M")
    return path


def digests(top: Path, *, without: tuple[str, ...] = ()) -> dict[str, str]:
    """All files and links below a directory, with their content and size."""
    found = {}
    for path in sorted(top.rglob("*")):
        name = str(path.relative_to(top))
        if name in without:
            continue
        if path.is_symlink():
            found[name] = f"-> {os.readlink(path)}"
        elif path.is_dir():
            found[name] = "directory"
        else:
            found[name] = sha256(path.read_bytes()).hexdigest()
    return found
