"""Comparisons of what is written: copies, updates of copies, chains and images made of them."""

from __future__ import annotations

import random
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from qcow2snap_core.format.snapshots import Snapshot
from qcow2snap_core.image.opener import Options, open_image
from support import qemu, secret
from support.running import eventually

from .world import Different, State, Unavailable, World, remove, same, trust_base


def copies(world: World, rng: random.Random) -> None:
    """To a new file, then over it."""
    out = world.directory / "copy"
    for state in rng.sample(world.states, min(2, len(world.states))):
        world.command("copy", "--force", world.path, state.name, out, *world.keys)
        same(f"copy {state.name}", out.read_bytes(), state.content)
    out.unlink()


def salvages(world: World, rng: random.Random) -> None:
    """All of an image that is whole; of one that was cut off what its map does not leave out."""
    state = rng.choice(world.states)
    image = world.path.read_bytes()
    cut, out, map_ = (world.directory / name for name in ("cut.qcow2", "copy", "map"))
    for length in (len(image), *(rng.randrange(len(image) // 2, len(image)) for _ in range(3))):
        cut.write_bytes(image[:length])
        line = ["copy", "--salvage", map_, cut, state.name, out, *world.keys]
        whole = length == len(image)
        status, _ = world.command(*line, statuses=(0,) if whole else (0, 1))
        if not out.exists():  # not even its tables are there
            continue
        ours, theirs = bytearray(out.read_bytes()), bytearray(state.content)
        lost = [line.split() for line in map_.read_text().splitlines() if line.endswith("  -")]
        if bool(lost) != bool(status):
            raise Different(f"salvage of {state.name}: status {status}, {len(lost)} ranges lost")
        for at, n, _ in lost:
            start, end = int(at, 16), int(at, 16) + int(n, 16)
            if any(ours[start:end]):
                raise Different(f"salvage of {state.name}: data where it was lost, at {at}")
            ours[start:end] = theirs[start:end]
        same(f"salvage of {state.name}, cut at {length}", bytes(ours), bytes(theirs))
        world.notes["images of which a part was salvaged"] += bool(lost)
        out.unlink()
        map_.unlink()
    cut.unlink()


def _pair(world: World, rng: random.Random) -> tuple[State, State]:
    if len(world.states) < 2:
        raise Unavailable("no snapshots")
    old, new = rng.sample(world.states, 2)
    return old, new


def updates(world: World, rng: random.Random) -> None:
    """A copy of one state to the next, as a new file and in place."""
    out = world.directory / "copy"
    for how in ([], ["--in-place"]):
        old, new = _pair(world, rng)
        trusted: list[str] = []
        if rng.random() < 0.5:
            world.command("copy", world.path, old.name, out, *world.keys)
            if old.snapshot is None:
                trusted = trust_base()
        else:
            out.write_bytes(old.content)
            trusted = trust_base()
        line = ["--since", old.name, *how, *trusted, new.name]
        world.command("copy", world.path, *line, out, *world.keys)
        same(f"copy {' '.join(line)}", out.read_bytes(), new.content)
        out.unlink()


def updates_by_nbd(world: World, rng: random.Random) -> None:
    """Into a qemu-nbd that has a qcow2 image with a snapshot of its own."""
    old, new = _pair(world, rng)
    target, raw = world.directory / "target.qcow2", world.directory / "target.raw"
    size = max(old.size, new.size)
    raw.write_bytes(old.content.ljust(size, b"\xaa"))
    options = rng.choice(("extended_l2=on", "extended_l2=on,cluster_size=16k", "cluster_size=4k"))
    qemu.run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", "-o", options, raw, target)
    qemu.take(target, "kept")
    line = ["--since", old.name, *trust_base(), new.name]
    with _exported(target, "qcow2") as uri:
        world.command("copy", world.path, *line, uri, *world.keys)
    what = f"copy {' '.join(line)} into a qemu-nbd with {options}"
    same(what, qemu.content(target)[: new.size], new.content)
    same(f"{what}: its own snapshot", qemu.content(target, "kept"), raw.read_bytes())
    qemu.run("qemu-img", "check", "-q", target)
    remove(target)
    remove(raw)


@contextmanager
def _exported(path: Path, fmt: str) -> Iterator[str]:
    """qemu-nbd, which ends with its last connection."""
    socket = path.with_name("nbd.sock")
    line = ["qemu-nbd", "-f", fmt, "-e", "8", "--discard=unmap", "-k", str(socket), str(path)]
    process = subprocess.Popen(line, stdin=subprocess.DEVNULL)
    try:
        eventually(lambda: socket.exists() or process.poll() is not None)
        yield f"nbd+unix:///?socket={socket}"
        if process.wait(60):
            raise Different(f"qemu-nbd ended with {process.returncode}")
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()


# --- split and join ---


def splits(world: World, rng: random.Random) -> None:
    """Each overlay is a state; joined again, they are the snapshots that they were."""
    directory = world.directory / "chain"
    _, said = world.command("split", world.path, directory, *world.keys)
    overlays = [Path(line) for line in said.splitlines()]
    files = {file for file in directory.iterdir() if file.suffix == ".qcow2"}
    if len(overlays) != len(world.states) or set(overlays) != files:
        raise Different(f"split: {len(world.states)} states, but {overlays}")
    # A backing file of the image becomes the base's, and is never encrypted then.
    for state, overlay in zip(world.states, overlays, strict=True):
        same(f"split: {overlay.name}", qemu.content(overlay), state.content)
        qemu.run("qemu-img", "check", "-q", overlay)
    out = world.directory / "joined"
    world.command("join", overlays[-1], out, "--allow-dir", world.directory)
    _compare_image(world, out, "split, join")
    same("split, join: active disk", qemu.content(out), world.states[-1].content)
    remove(directory)
    remove(out)


def joins(world: World, rng: random.Random) -> None:
    """The chain as it is: each layer becomes a snapshot."""
    out = world.directory / "joined"
    layers = {}
    for number, (path, fmt) in enumerate(world.chain):
        if fmt == "raw":
            layers[path.stem] = path.read_bytes()
        else:
            layers[path.stem] = world.original(path, world.secrets[number:])
    world.command("join", world.path, out, *world.keys)
    _compare_joined(world, out, layers, "join")
    remove(out)


def compacts(world: World, rng: random.Random) -> None:
    """Every snapshot again, with all that was said of it, and the active disk."""
    out = world.directory / "compact"
    how = rng.choice([[], [], ["--compress", "zlib"], ["--compress", "zstd"]])
    world.command("compact", world.path, out, *how, *world.keys)
    secrets = [None, *world.secrets[1:]]  # it is plain itself, what it lies on is as it was
    said = qemu.run("qemu-img", "check", *secret.objects(secrets), *secret.opened(out, secrets))
    if "No errors" not in said:
        raise Different(f"compact: {said}")
    with open_image(str(out), Options(layers=False, data=False)) as image:
        there = image.snapshots
    expected = [state.snapshot for state in world.states[:-1]]
    if [_described(s) for s in there] != [_described(s) for s in expected if s is not None]:
        raise Different(f"compact {how}: {there}, not {expected}")
    copy = world.directory / "snapshot"
    for state, snapshot in zip(world.states, [*there, None], strict=True):
        shutil.copyfile(out, copy)
        if snapshot is not None:
            qemu.activate(copy, snapshot, snapshot.disk_size)
        same(f"compact {how}: {state.name}", world.content(copy, secrets), state.content)
        if snapshot is not None and snapshot.vm_state_size:
            ours = world.vm_state(out, snapshot, secrets)
            same(f"compact {how}: VM state", ours, world.vm_state(world.path, state.snapshot))
    remove(out)
    remove(copy)


def backs_up(world: World, rng: random.Random) -> None:
    """QEMU reads each snapshot in the repository; restored, they are what they were."""
    snapshots = [state for state in world.states if state.snapshot is not None]
    repository, out = world.directory / "repository", world.directory / "restored"
    how = rng.choice([[], ["--compress", "zlib"], ["--compress", "zstd"]])
    world.command("backup", world.path, repository, *how, *world.keys)
    for number, state in enumerate(snapshots, 1):
        file = repository / f"{number}.qcow2"
        same(f"backup {how}: {state.name}", qemu.content(file), state.content)
        qemu.run("qemu-img", "check", "-q", file)
    if snapshots:
        world.command("verify", repository)
        world.command("restore", repository, out)
        _compare_image(world, out, f"backup {how}, restore")
        remove(out)
    remove(repository)


def _compare_image(world: World, out: Path, what: str) -> None:
    """An image without a backing file that has the world's snapshots again."""
    said = qemu.run("qemu-img", "check", out)
    if "No errors" not in said:
        raise Different(f"{what}: {said}")
    with open_image(str(out)) as image:
        there = image.snapshots
    states = [state for state in world.states if state.snapshot is not None]
    if [_described(s) for s in there] != [_described(s.snapshot) for s in states]:
        raise Different(f"{what}: {there}, not {[s.snapshot for s in states]}")
    copy = world.directory / "snapshot"
    for state, snapshot in zip(states, there, strict=True):
        shutil.copyfile(out, copy)
        qemu.activate(copy, snapshot, snapshot.disk_size)
        same(f"{what}: {state.name}", qemu.content(copy), state.content)
        if snapshot.vm_state_size:
            ours = world.vm_state(out, snapshot, [None])
            same(f"{what}: VM state", ours, world.vm_state(world.path, state.snapshot))
        remove(copy)


def _described(s: Snapshot) -> tuple[object, ...]:
    return (*s.identity[:5], s.icount, s.disk_size, s.vm_state_size)


def _compare_joined(world: World, out: Path, layers: dict[str, bytes], what: str) -> None:
    said = qemu.run("qemu-img", "check", out)
    if "No errors" not in said:
        raise Different(f"{what}: {said}")
    if not layers.keys() <= qemu.snapshots(out).keys():
        raise Different(f"{what}: has {list(qemu.snapshots(out))}, not {list(layers)}")
    copy = world.directory / "snapshot"
    for name, snapshot in qemu.snapshots(out).items():
        if name in layers:
            copy.write_bytes(out.read_bytes())
            qemu.activate(copy, snapshot, snapshot.disk_size)
            same(f"{what}: snapshot {name!r}", qemu.content(copy), layers[name])
    same(f"{what}: active disk", qemu.content(out), world.states[-1].content)
    copy.unlink()
