"""The images that the benchmark reads: each with one snapshot, made by QEMU's tools, once."""

from __future__ import annotations

import os
import random
import subprocess
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

KiB, MiB, GiB, TiB = 1 << 10, 1 << 20, 1 << 30, 1 << 40
SYSTEM = "/usr"
SECRET = "bench"
SNAPSHOT = "s"


@dataclass(frozen=True)
class Image:
    """A qcow2 file with the snapshot ``s``, and what serving it takes."""

    path: Path
    raw: Path | None  # the same content, for nbdkit's file plugin
    size: int
    encrypted: bool = False

    @property
    def files(self) -> list[Path]:
        """The image and those below it."""
        return sorted(self.path.parent.glob(f"{self.path.stem}.*qcow2"))


def qemu(*arguments: object) -> None:
    subprocess.run([str(a) for a in arguments], check=True, stdout=subprocess.DEVNULL)


def build(folder: Path, name: str) -> Image:
    """The image of that name, made if it is not there yet."""
    folder.mkdir(parents=True, exist_ok=True)
    make, size, with_raw = IMAGES[name]
    path = folder / f"{name}.qcow2"
    raw = folder / f"{name}.raw" if with_raw else None
    done = folder / f"{name}.{size}.done"
    if not done.exists():
        for old in folder.glob(f"{name}.*"):
            old.unlink()
        make(path, size)
        if raw is not None:
            _to_raw(path, raw, encrypted=name == "luks")
        done.touch()
    return Image(path, raw, size, encrypted=name == "luks")


def content(path: Path, size: int) -> Path:
    """A raw file of that size, the same for every image: this system's programs and libraries.

    They are what a guest's disk holds too.  Made-up data would decide by itself how the decoders
    compare: half noise and half repetition, say, is copied rather than decoded.
    """
    source = path.with_name(f"content-{size}.source")
    if not source.exists():
        with open(source, "wb") as out:
            for file in _system_files():
                out.write(file.read_bytes()[: size - out.tell()])
                if out.tell() == size:
                    break
            else:
                raise SystemExit(f"there are not {size} bytes of files in {SYSTEM}")
    return source


def _system_files() -> Iterator[Path]:
    for folder, names, files in os.walk(SYSTEM):
        names.sort()
        paths = (Path(folder, name) for name in sorted(files))
        yield from (p for p in paths if p.is_file() and not p.is_symlink())


def _convert(path: Path, size: int, *options: str) -> None:
    source = content(path, size)
    qemu("qemu-img", "convert", "-f", "raw", "-O", "qcow2", *options, source, path)
    qemu("qemu-img", "snapshot", "-c", SNAPSHOT, path)


def _write(path: Path, commands: str) -> None:
    """Have qemu-io do what the lines say: there may be more than fit in a command line."""
    line = ["qemu-io", "-f", "qcow2", "-t", "unsafe", str(path)]
    subprocess.run(line, input=commands, text=True, check=True, stdout=subprocess.DEVNULL)


def _plain(path: Path, size: int) -> None:
    _convert(path, size)


def _small_clusters(path: Path, size: int) -> None:
    _convert(path, size, "-o", "cluster_size=4k")


def _zlib(path: Path, size: int) -> None:
    _convert(path, size, "-c", "-W", "-m", "4")


def _zstd(path: Path, size: int) -> None:
    _convert(path, size, "-c", "-W", "-m", "4", "-o", "compression_type=zstd")


def _fragmented(path: Path, size: int) -> None:
    """4 KiB clusters, written in random order."""
    qemu("qemu-img", "create", "-q", "-f", "qcow2", "-o", "cluster_size=4k", path, size)
    offsets = list(range(0, size, 4 * KiB))
    random.Random(1).shuffle(offsets)
    commands = "".join(f"write -q -P {1 + o // 4096 % 255} {o} 4k\n" for o in offsets)
    _write(path, commands)
    qemu("qemu-img", "snapshot", "-c", SNAPSHOT, path)


def _chain(path: Path, size: int) -> None:
    """Five layers; each megabyte is in one of them."""
    below: Path | None = None
    for layer in range(5):
        this = path if layer == 4 else path.with_name(f"{path.stem}.layer{layer}.qcow2")
        backing = () if below is None else ("-b", below.name, "-F", "qcow2")
        qemu("qemu-img", "create", "-q", "-f", "qcow2", *backing, this, size)
        commands = "".join(
            f"write -q -P {layer + 1} {o} 1M\n" for o in range(layer * MiB, size, 5 * MiB)
        )
        _write(this, commands)
        below = this
    qemu("qemu-img", "snapshot", "-c", SNAPSHOT, path)


def _luks(path: Path, size: int) -> None:
    secret = ("--object", f"secret,id=s,data={SECRET}")
    opts = f"driver=qcow2,file.filename={path},encrypt.key-secret=s"
    form = "encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10"
    create = ("qemu-img", "create", "-q", *secret, "-f", "qcow2", "-o", form, path, size)
    for _ in range(9):  # QEMU gives up where it cannot measure how fast PBKDF2 is
        with suppress(subprocess.CalledProcessError):
            qemu(*create)
            break
    else:
        qemu(*create)
    source = content(path, size)
    target = ("--target-image-opts", "-n", "-f", "raw", source, opts)
    qemu("qemu-img", "convert", *secret, *target)
    qemu("qemu-img", "snapshot", *secret, "--image-opts", "-c", SNAPSHOT, opts)


def _sparse(path: Path, size: int) -> None:
    """A megabyte of data in every sixteenth of a percent of the disk."""
    qemu("qemu-img", "create", "-q", "-f", "qcow2", path, size)
    commands = "".join(f"write -q -P 7 {o} 64k\n" for o in range(0, size, size // 16384))
    _write(path, commands)
    qemu("qemu-img", "snapshot", "-c", SNAPSHOT, path)


def _grown(path: Path, size: int) -> None:
    """Nearly empty, whatever its size: data at the start, in the middle and at the end."""
    qemu("qemu-img", "create", "-q", "-f", "qcow2", path, size)
    writes = [x for o in (0, size // 2, size - MiB) for x in ("-c", f"write -q -P 9 {o} 1M")]
    qemu("qemu-io", "-f", "qcow2", *writes, path)
    qemu("qemu-img", "snapshot", "-c", SNAPSHOT, path)


def _to_raw(path: Path, raw: Path, *, encrypted: bool) -> None:
    opts = f"driver=qcow2,file.filename={path}"
    secret: tuple[str, ...] = ()
    if encrypted:
        opts += ",encrypt.key-secret=s"
        secret = ("--object", f"secret,id=s,data={SECRET}")
    qemu("qemu-img", "convert", *secret, "--image-opts", "-l", SNAPSHOT, "-O", "raw", opts, raw)


#: How to make it, its size, and whether the raw content is wanted too.
IMAGES: dict[str, tuple[Callable[[Path, int], None], int, bool]] = {
    "plain": (_plain, 512 * MiB, True),
    "4k-clusters": (_small_clusters, 512 * MiB, True),
    "fragmented": (_fragmented, 256 * MiB, True),
    "chain-of-5": (_chain, 512 * MiB, True),
    "zlib": (_zlib, 512 * MiB, True),
    "zstd": (_zstd, 512 * MiB, True),
    "luks": (_luks, 512 * MiB, True),
    "1-tib": (_sparse, 1 * TiB, False),
    "1-gib-empty": (_grown, 1 * GiB, False),
    "64-gib-empty": (_grown, 64 * GiB, False),
    "1-tib-empty": (_grown, 1 * TiB, False),
    "16-tib-empty": (_grown, 16 * TiB, False),
}
