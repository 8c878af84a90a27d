"""Comparisons through other ways in: a real nbdkit, an image behind NBD, block devices."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from support.remote import remote
from support.running import eventually
from support.server import serve

from .reading import expanded, whole
from .world import Different, Unavailable, World, same

_SECTOR = 512


def served(world: World, rng: random.Random) -> None:
    """nbdkit with the plugin in it; nbdcopy and libnbd read."""
    keys: dict[str, object] = {"allow_dir": world.directory}
    for n, s in enumerate(world.secrets[: len(world.chain)]):
        if s is not None:
            keys[f"passphrase.{n}" if n else "passphrase"] = s
    exports = [e["export"] for e in world.json("list", world.path)]
    if not exports:
        raise Unavailable("no snapshots")
    with serve(file=world.path, **keys) as server, world.open() as image:
        for export, state in zip(exports, world.states, strict=False):
            same(f"served {export!r}", server.copy(export), state.content)
            disk = world.disk(image, state)
            ours = expanded(disk.extents(0, disk.size), disk.size)
            if expanded(server.extents(export), state.size) != ours:
                raise Different(f"served {export!r}: other extents than of the file")


def remotely(world: World, rng: random.Random) -> None:
    """The image is an export of nbdkit's file plugin, or of qemu-nbd."""
    if not world.alone:
        raise Unavailable("needs other files")
    with rng.choice((_by_nbdkit, _by_qemu))(world) as uri:
        _reads(world, rng, uri)
        listed = world.json("list", uri)
        if listed != world.json("list", world.path):
            raise Different("list: the remote image has other snapshots than the file")
        out = world.directory / "copy"
        state = rng.choice(world.states[:-1] or world.states)
        world.command("copy", uri, state.name, out, *world.keys)
        same(f"copy {state.name} from NBD", out.read_bytes(), state.content)
        out.unlink()


@contextmanager
def _by_nbdkit(world: World) -> Iterator[str]:
    with remote("-r", "file", world.path) as server:
        yield server.uri


@contextmanager
def _by_qemu(world: World) -> Iterator[str]:
    socket = world.directory / "far.sock"
    line = ["qemu-nbd", "-r", "-t", "-e", "9", "-f", "raw", "-k", socket, world.path]
    process = subprocess.Popen(line, stdin=subprocess.DEVNULL)
    try:
        eventually(lambda: socket.exists() or process.poll() is not None)
        yield f"nbd+unix://?socket={socket}"
    finally:
        process.kill()
        process.wait()
        socket.unlink(missing_ok=True)


def _reads(world: World, rng: random.Random, where: object) -> None:
    with world.open(where) as image:
        for state in world.states:
            disk = world.disk(image, state)
            same(f"{state.name} at {where}", whole(disk, rng), state.content)


# --- Block devices ---


def devices(world: World, rng: random.Random) -> None:
    """The image on a loop device, or one of device-mapper's over it; a copy to another."""
    if not world.alone:
        raise Unavailable("needs other files")
    file = world.directory / "device"
    shutil.copyfile(world.path, file)
    os.truncate(file, -(-file.stat().st_size // _SECTOR) * _SECTOR)
    with _loop(file) as loop, _mapped(loop, world) as device:
        _reads(world, rng, device)
        state = rng.choice(world.states[:-1] or world.states)
        target = world.directory / "target"
        target.write_bytes(b"\xaa" * (state.size + 4096))
        with _loop(target) as to:
            world.command("copy", device, state.name, to, *world.keys)
        same(f"copy {state.name} to {to}", target.read_bytes()[: state.size], state.content)
        target.unlink()
    file.unlink()


@contextmanager
def _loop(file: Path) -> Iterator[Path]:
    try:
        done = subprocess.run(
            ["losetup", "--find", "--show", str(file)], capture_output=True, text=True, check=False
        )
    except FileNotFoundError as e:
        raise Unavailable("no losetup here") from e
    if done.returncode:
        raise Unavailable(f"no loop device: {done.stderr}")
    device = done.stdout.strip()
    try:
        yield Path(device)
    finally:
        subprocess.run(["losetup", "-d", device], check=True)


@contextmanager
def _mapped(loop: Path, world: World) -> Iterator[Path]:
    """A linear mapping of all of it, where the kernel has device-mapper."""
    name = f"differential-{os.getpid()}"
    sectors = int(Path("/sys/class/block", loop.name, "size").read_text())
    line = ["dmsetup", "create", "--noudevsync", name, "--table", f"0 {sectors} linear {loop} 0"]
    try:
        made = subprocess.run(line, capture_output=True, check=False).returncode == 0
    except FileNotFoundError:
        made = False
    if not made:
        yield loop
        return
    world.notes["device-mapper"] += 1
    try:
        yield Path("/dev/mapper", name)
    finally:
        subprocess.run(["dmsetup", "remove", "--retry", name], check=True, capture_output=True)
