"""Serves the snapshots of an image, reads them with NBD clients, and holds them to QEMU's answer.

    tests/demo.py                   with a small image of its own
    tests/demo.py FILE [SNAPSHOT]   with yours, which is only read; SNAPSHOT is an ID or a name

`make demo` runs it.  Every line that begins with $ is a command that was really run.  It needs
Python's standard library and the programs that packaging/install-deps installs for "run", and
exits 0 only if every byte that came over NBD is the one that qemu-img finds in the snapshot.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO
from urllib.parse import quote

PLUGIN = Path(__file__).resolve().parents[1] / "plugin" / "qcow2snap.py"
SOCKET = "nbd.sock"
MOST_LISTED = 20
PIECE = 1 << 20


class Failed(Exception):
    """What went wrong, in one line."""


def say(line: str = "", to: TextIO | None = None) -> None:
    """Print at once, and nothing that a name in an image could do to a terminal."""
    print("".join(c if c.isprintable() else repr(c)[1:-1] for c in line), file=to, flush=True)


def run(*command: object, show: bool = True) -> str:
    """Run a command that must succeed; returns what it printed."""
    words = [str(word) for word in command]
    if show:
        say(f"  $ {shlex.join(words)}")
    try:
        done = subprocess.run(words, capture_output=True, check=False, stdin=subprocess.DEVNULL)
    except FileNotFoundError:
        raise Failed(f"{words[0]} is not installed: run make deps") from None
    if done.returncode:
        raise Failed(last_line(done.stderr) or f"{words[0]} exited with {done.returncode}")
    return done.stdout.decode(errors="surrogateescape")


def last_line(output: bytes) -> str:
    lines = output.decode(errors="surrogateescape").strip().splitlines()
    return lines[-1] if lines else ""


# --- What is served ---


def make_image() -> Path:
    """Three days in the life of a disk, with a snapshot at the end of each."""
    image = Path("disk.qcow2")
    run("qemu-img", "create", "-q", "-f", "qcow2", image, "64M")
    days = {
        "monday": ["write -q -P 0x11 0 6M", "write -q -P 0x12 20M 300k"],
        "tuesday": ["write -q -P 0x21 2M 1M", "write -q -z 20M 128k"],
        "wednesday": ["discard -q 4M 1M", "write -q -c -P 0x31 32M 64k"],
    }
    for day, commands in days.items():
        run("qemu-io", *(word for command in commands for word in ("-c", command)), image)
        run("qemu-img", "snapshot", "-c", day, image)
    run("qemu-io", "-c", "write -q -P 0xff 0 64M", image)
    return image


@contextlib.contextmanager
def served(image: Path) -> Iterator[None]:
    """nbdkit on a Unix socket, in the foreground of its own, until the block ends."""
    ready = Path("nbdkit.pid")
    command = ["nbdkit", "-f", "-U", SOCKET, "-P", str(ready), "python", str(PLUGIN)]
    command.append(f"file={image}")
    say(f"  $ {shlex.join(command)} &")
    with open("nbdkit.log", "w+b") as log:
        try:
            server = subprocess.Popen(command, stderr=log, stdin=subprocess.DEVNULL)
        except FileNotFoundError:
            raise Failed("nbdkit is not installed: run make deps") from None
        try:
            while not ready.exists():  # nbdkit writes it once it listens
                if server.poll() is not None:
                    log.seek(0)
                    raise Failed(last_line(log.read()).rpartition("error: ")[2])
                time.sleep(0.01)
            yield
        finally:
            server.terminate()
            server.wait()


def uri(export: str = "") -> str:
    return f"nbd+unix:///{quote(export, safe='', errors='surrogateescape')}?socket={SOCKET}"


def exports() -> dict[str, str]:
    """The exports that nbdinfo finds, with their descriptions; printed as a table."""
    found = json.loads(run("nbdinfo", "--list", "--json", uri()))["exports"]
    width = max((len(e["export-name"]) for e in found[:MOST_LISTED]), default=0)
    for e in found[:MOST_LISTED]:
        name, size, what = e["export-name"], e["export-size"], e["description"]
        say(f"    {name:{width}}  {size:>12} bytes  ({what})")
    if len(found) > MOST_LISTED:
        say(f"    and {len(found) - MOST_LISTED} more")
    return {e["export-name"]: e["description"] for e in found}


# --- What QEMU says of the image ---


def information(image: Path) -> dict[str, Any]:
    """qemu-img info; -U because the image may be in use, and is only read; -f because the content
    of a raw image could pass for one that names other files."""
    return json.loads(
        run("qemu-img", "info", "-U", "-f", "qcow2", "--output=json", image, show=False)
    )


def choose(image: Path, snapshots: list[dict[str, Any]], wanted: str | None) -> dict[str, Any]:
    """The snapshot with that ID, else the first with that name, else the first of all."""
    if not snapshots:
        raise Failed(f"{image} has no internal snapshots: qemu-img snapshot -c NAME takes one")
    if wanted is None:
        return snapshots[0]
    for key in ("id", "name"):
        for snapshot in snapshots:
            if snapshot[key] == wanted:
                return snapshot
    there = ", ".join(f"{s['id']} '{s['name']}'" for s in snapshots[:MOST_LISTED])
    raise Failed(f"no snapshot '{wanted}' in {image}: it has {there}")


# --- Both compared ---


def export_of(snapshot: dict[str, Any], listed: dict[str, str]) -> str:
    """The export name of a snapshot: its name, or its ID where its name is not its alone."""
    name, ident = snapshot["name"], snapshot["id"]
    return name if listed.get(name, "").startswith(f"{ident}, ") else ident


def compare(image: Path, snapshot: dict[str, Any], export: str, active_size: int) -> None:
    """Copy a snapshot over NBD and with qemu-img; every byte must be the same."""
    name, ident = snapshot["name"], snapshot["id"]
    mine, theirs = Path("nbdcopy.raw"), Path("qemu-img.raw")
    check_space(export)
    run("nbdcopy", uri(export), mine)
    pick = f"snapshot.id={ident.replace(',', ',,')}"
    run("qemu-img", "convert", "-U", "-f", "qcow2", "-l", pick, "-O", "raw", image, theirs)
    size = mine.stat().st_size
    common = min(size, theirs.stat().st_size)
    at = first_difference(mine, theirs, common)
    if at is not None:
        raise Failed(f"snapshot '{name}' DIFFERS from qemu-img's at byte {at}")
    if size == active_size:
        say(f"    '{name}': all {size} bytes are the same")
    else:
        say(f"    '{name}': all of the first {common} bytes are the same; the snapshot has {size},")
        say(f"    but qemu-img gives it the active disk's size of {active_size}")
    mine.unlink()
    theirs.unlink()


def check_space(export: str) -> None:
    """The copies are sparse, but a large disk may still not fit, twice, where we are."""
    totals = json.loads(run("nbdinfo", "--map", "--totals", "--json", uri(export), show=False))
    data = sum(t["size"] for t in totals if t["type"] == 0)
    free = shutil.disk_usage(".").free
    if 2 * data > free:
        where = tempfile.gettempdir()
        raise Failed(
            f"two copies of {data} bytes do not fit in {where}, which has {free} bytes left: "
            f"set TMPDIR to a directory with more room"
        )


def first_difference(one: Path, other: Path, length: int) -> int | None:
    """Where two files begin to differ in their first ``length`` bytes; holes are skipped."""
    with open(one, "rb") as f, open(other, "rb") as g:
        at = 0
        while at < length:
            at = min(next_data(f.fileno(), at, length), next_data(g.fileno(), at, length))
            n = min(PIECE, length - at)
            x, y = os.pread(f.fileno(), n, at), os.pread(g.fileno(), n, at)
            if x != y or len(x) < n:
                return at + len(os.path.commonprefix((x, y)))
            at += n
    return None


def next_data(fd: int, at: int, end: int) -> int:
    try:
        return min(os.lseek(fd, at, os.SEEK_DATA), end)
    except OSError as e:
        if e.errno == errno.ENXIO:  # nothing but a hole from here on
            return end
        raise


# --- The whole of it ---


def demonstrate(image: Path | None, wanted: str | None) -> tuple[Path, str]:
    """The demonstration; returns what to try next with."""
    own = image is None
    if image is None:
        say("An image with three snapshots, and other content after them:")
        image = make_image()
    about = information(image)
    snapshots = about.get("snapshots", [])
    chosen = choose(image, snapshots, wanted)
    if own:
        say()
    say("All its snapshots served, read-only:")
    with served(image):
        say()
        say("What a client sees (with ID, date, disk size and VM-state size):")
        listed = exports()
        say()
        say("Copied over NBD, and by QEMU itself:")
        for snapshot in (snapshots[0], snapshots[2]) if own else (chosen,):
            compare(image, snapshot, export_of(snapshot, listed), about["virtual-size"])
    return image, export_of(chosen, listed)


def next_steps(image: Path, snapshot: str) -> None:
    """Commands for a user's own image; tests/e2e/test_demo.py runs them."""
    plugin, file = shlex.quote(str(PLUGIN)), shlex.quote(f"file={image}")
    one = f"nbdkit -U - python {plugin} {file} {shlex.quote(f'snapshot={snapshot}')}"
    scratch = one.replace("nbdkit -U -", "nbdkit -U - --filter=cow", 1)
    export = shlex.quote(f"nbd://localhost/{quote(snapshot, safe='', errors='surrogateescape')}")
    steps = {
        "serve every snapshot, until Ctrl-C": [
            f"nbdkit -f -i localhost python {plugin} {file}",
        ],
        "and from another terminal": [
            "nbdinfo --list nbd://localhost",
            f"nbdcopy {export} copy.raw",
            f"qemu-img convert -O qcow2 {export} copy.qcow2",
        ],
        "one snapshot, for as long as one command runs": [
            f"{one} --run 'nbdinfo --map \"$uri\"'",
        ],
        "boot it: writes go to a scratch layer that is forgotten in the end": [
            f"{scratch} --run \\",
            "    'qemu-system-x86_64 -m 1G -drive file=\"$uri\",format=raw,if=virtio'",
        ],
    }
    for what, commands in steps.items():
        say(f"  # {what}")
        for command in commands:
            say(f"  {command}")


def arguments() -> tuple[Path | None, str | None]:
    """FILE and SNAPSHOT, None where not given; `make demo` gives both, if need be empty."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("FILE", nargs="?", default="", help="a qcow2 image, which is only read")
    parser.add_argument("SNAPSHOT", nargs="?", default="", help="an ID or a name (the first)")
    given = parser.parse_args()
    if given.SNAPSHOT and not given.FILE:
        parser.error("SNAPSHOT needs FILE: make demo FILE=disk.qcow2 SNAPSHOT=nightly")
    if not given.FILE:
        return None, None
    image = Path(given.FILE).absolute()
    if not image.exists():
        raise Failed(f"there is no {image}")
    return image, given.SNAPSHOT or None


def main() -> int:
    for stream in (sys.stdout, sys.stderr):  # names may hold what the locale cannot say
        stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    try:
        image, wanted = arguments()
        with tempfile.TemporaryDirectory(prefix="qcow2snap-demo-") as directory:
            os.chdir(directory)
            say(f"  $ cd {shlex.quote(directory)}")
            used, snapshot = demonstrate(image, wanted)
            os.chdir("/")
    except (Failed, OSError) as e:
        say(f"demo: {e}", to=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    say()
    if image is None:
        say("Try next, with an image of your own:")
        used, snapshot = Path("disk.qcow2"), "nightly"
        say("  make demo FILE=disk.qcow2 SNAPSHOT=nightly")
    else:
        say("Try next:")
    next_steps(used, snapshot)
    return 0


if __name__ == "__main__":
    sys.exit(main())
