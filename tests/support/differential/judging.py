"""Comparisons of what is said about the file: whether it is damaged, what deleting would free."""

from __future__ import annotations

import random
import shutil
from collections import Counter
from pathlib import Path

from support import qemu, secret
from support.refcounts import allocated, place, refcounts, set_refcount

from .world import Different, Unavailable, World

_DAMAGED = 3
_TRIES = 3


def checks(world: World, rng: random.Random) -> None:
    """Damage where qemu-img check says so, and none elsewhere; leaks are no damage."""
    if world.dirty:
        raise Unavailable("dirty")
    found = world.check(world.path)
    if found["leaks"]:
        world.notes["leaks"] += 1
    if found["corruptions"]:
        world.notes["corrupted by QEMU itself"] += 1
    _compare(world, world.path, found, "")
    if not damaged(found):
        first = [word for word in world.keys if not word.startswith("--passphrase.")]
        given = first[: 2 + 2 * ("--passphrase" in first)]
        _, said = world.command("check", "--data", world.path, *given)
        if not said.endswith("no damage found\n"):
            raise Different(f"check --data: {said.strip()}")
        for state in world.states:
            if state.snapshot is not None:
                world.command("check", world.path, state.name, *world.keys)


def damaged(found: dict[str, object]) -> bool:
    return bool(found["corruptions"] or found["check-errors"])


def _compare(world: World, path: Path, found: dict[str, object], what: str) -> None:
    status, said = world.command("check", path, *world.keys, statuses=(0, _DAMAGED))
    if (status == _DAMAGED) == damaged(found):
        if not status and not world.dirty:
            leaks = sum(e.get("clusters", 0) for e in world.json("check", path))
            if leaks != found["leaks"]:
                raise Different(f"check{what}: {leaks} leaked clusters; QEMU: {found['leaks']}")
        return
    # QEMU also calls it an error when it may write in place (COPIED) to a cluster that is counted
    # more than once, though all but one are leaks: a snapshot that it could not take leaves those.
    if status or not found["leaks"] or damaged(_without_leaks(world, path)):
        raise Different(f"check{what}: {said.strip() or 'clean'}; QEMU: {found}")
    world.notes["errors that are leaks"] += 1


def _without_leaks(world: World, path: Path) -> dict[str, object]:
    """What qemu-img check finds after it has repaired the leaks."""
    copy = world.directory / "repaired"
    shutil.copyfile(path, copy)
    world.check(copy, "-r", "leaks")
    try:
        return world.check(copy)
    finally:
        copy.unlink()


def damages(world: World, rng: random.Random) -> None:
    """Refcounts that were changed: too low is damage, too high is none of anybody's harm."""
    if world.dirty or damaged(world.check(world.path)):
        raise Unavailable("dirty or damaged as it is")
    path = world.directory / "damaged"
    _, width, _ = place(world.path, 0)
    most = (1 << width) - 1
    for _ in range(_TRIES):
        shutil.copyfile(world.path, path)
        cluster, count = rng.choice(sorted(refcounts(path).items()))
        lower = rng.random() < 0.7 or count == most
        set_refcount(path, cluster, count - 1 if lower else count + 1)
        found = world.check(path)
        if lower:
            what = f" with the refcount of cluster {cluster} at {count - 1} instead of {count}"
            _compare(world, path, found, what)
        else:
            world.command("check", path, *world.keys)
    path.unlink()


def exclusive(world: World, rng: random.Random) -> None:
    """Each snapshot is deleted by QEMU in a copy of its own."""
    if len(world.states) < 2:
        raise Unavailable("no snapshots")
    found = world.check(world.path)
    if world.dirty or damaged(found):
        raise Unavailable("dirty or damaged as it is")
    copy = world.directory / "deleted"
    sizes = {e["id"]: e["exclusive-size"] for e in world.json("list", world.path)}
    names = Counter(s.snapshot.name for s in world.states if s.snapshot is not None)
    for state in world.states:
        snapshot = state.snapshot
        if snapshot is None or names[snapshot.name] > 1:  # QEMU would delete the first
            continue
        shutil.copyfile(world.path, copy)
        before = allocated(copy)
        opened = [*secret.objects(world.secrets), *secret.opened(copy, world.secrets)]
        qemu.run("qemu-img", "snapshot", "-d", snapshot.name, *opened)
        if any(s.id == snapshot.id for s in qemu.snapshots(copy).values()):
            raise Unavailable("QEMU deleted another one")
        freed = before - allocated(copy)
        # What is counted too often is not freed: it is a leak then.
        if freed != sizes[snapshot.id] and not (found["leaks"] and freed < sizes[snapshot.id]):
            raise Different(
                f"list: the exclusive size of {state.name} is {sizes[snapshot.id]}, "
                f"and {freed} bytes are freed"
            )
    copy.unlink(missing_ok=True)
