"""The layers of a random chain, the topmost first."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

from support.qemu import KiB, MiB

_CLUSTERS = (512, 1 * KiB, 4 * KiB, 16 * KiB, 64 * KiB, 256 * KiB, 2 * MiB)
_WEIGHTS = (3, 1, 3, 3, 6, 1, 2)
_MOST_CLUSTERS = 1500  # in a disk, or comparing takes longer than making


@dataclass(frozen=True)
class Layer:
    """One file of a chain as it is created."""

    name: str
    fmt: str
    size: int
    options: tuple[tuple[str, str], ...] = ()  # of qemu-img create
    secret: str | None = None

    def option(self, key: str, otherwise: str = "") -> str:
        return dict(self.options).get(key, otherwise)

    @property
    def version(self) -> int:
        return 2 if self.option("compat") == "0.10" else 3

    @property
    def cluster(self) -> int:
        return int(self.option("cluster_size", "65536"))

    @property
    def grain(self) -> int:
        """What QEMU allocates at a time: a cluster, or a subcluster."""
        return self.cluster // 32 if self.option("extended_l2") else self.cluster

    @property
    def has_data_file(self) -> bool:
        return bool(self.option("data_file"))

    def features(self) -> Iterator[str]:
        """What is counted at the end of a run."""
        if self.fmt == "raw":
            return
        yield f"cluster size {self.cluster}"
        yield f"version {self.version}"
        yield f"refcount bits {self.option('refcount_bits', '16')}"
        for key in ("extended_l2", "lazy_refcounts", "data_file", "data_file_raw"):
            if self.option(key) not in ("", "off"):
                yield key.replace("_", " ")
        for key in ("encrypt.format", "preallocation"):
            if self.option(key):
                yield f"{key.partition('.')[0]} {self.option(key)}"


def random_layers(rng: random.Random) -> list[Layer]:
    """One to four of them."""
    depth = rng.choices((1, 2, 3, 4), (42, 28, 20, 10))[0]
    layers: list[Layer] = []
    size = 0
    for number in range(depth):
        bottom = number == depth - 1
        fmt = "raw" if number and bottom and rng.random() < 0.5 else "qcow2"
        cluster = rng.choices(_CLUSTERS, _WEIGHTS)[0]
        size = _size(rng, cluster, size)
        name = f"l{number}.{fmt}" if number else "disk.qcow2"
        if fmt == "raw":
            layers.append(Layer(name, fmt, size))
        else:
            layers.append(_qcow2(rng, name, size, cluster, top=not number, backed=not bottom))
    return layers


def _size(rng: random.Random, cluster: int, above: int) -> int:
    """Of a layer below one of the size ``above``, if that is not 0."""
    most = max(min(6 * MiB, _MOST_CLUSTERS * cluster), 4 * cluster)
    kind = rng.random()
    if above and kind < 0.3:
        return above
    if above and kind < 0.6:  # shorter; a layer that ends inside a cluster is the interesting one
        return max(512, int(above * rng.random()) & -512)
    size = rng.randrange(most // 4, most + 1) & -512
    return size & -cluster or cluster if rng.random() < 0.3 else max(512, size)


def _qcow2(
    rng: random.Random, name: str, size: int, cluster: int, *, top: bool, backed: bool
) -> Layer:
    options: dict[str, object] = {"cluster_size": cluster}
    secret = None
    if rng.random() < 0.2:
        options["compat"] = "0.10"
    else:
        options["compat"] = "1.1"
        if cluster >= 16 * KiB and rng.random() < 0.35:
            options["extended_l2"] = "on"
        if rng.random() < 0.4:
            options["refcount_bits"] = 1 << rng.randrange(7)
        if rng.random() < 0.3:
            options["lazy_refcounts"] = "on"
        if rng.random() < 0.3:
            options["compression_type"] = "zstd"
        # QEMU takes no snapshots with one, so there is less to compare.
        if rng.random() < (0.06 if top else 0.15):
            options["data_file"] = f"{name}.data"
            options["data_file_raw"] = "off" if backed else rng.choice(("on", "off"))
    if "data_file" not in options and rng.random() < 0.12:
        options["encrypt.format"] = rng.choice(("aes", "luks"))
        secret = f"secret-of-{name}"
    if not backed and rng.random() < 0.2:
        options["preallocation"] = rng.choice(("metadata", "falloc", "full"))
    return Layer(name, "qcow2", size, tuple((k, str(v)) for k, v in options.items()), secret)
