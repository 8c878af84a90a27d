"""The matrix of what QEMU can make: every feature with every cluster size, both versions of the
format and every kind of layer below.  Content byte for byte as in `qemu-img convert -l`, extents
as in `qemu-img map`; and what QEMU refuses to make, so that the gaps in the table are its own.

The run ends with the table: see conftest.py in this folder.
"""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support import qemu, secret
from support.qemu import KiB, MiB
from support.server import Server, serve

SIZE = 4 * MiB + 3 * 512
TOP, BELOW = "top secret", "another secret"

LUKS = {"encrypt.format": "luks"}
AES = {"encrypt.format": "aes"}
EXTL2 = {"extended_l2": "on"}
ZSTD = {"compression_type": "zstd"}

# Options of qemu-img create, and whether some clusters are written compressed.
FEATURES: dict[str, tuple[dict[str, Any], bool]] = {
    "zlib": ({}, True),
    "zstd": (ZSTD, True),
    "extended L2": (EXTL2, False),
    "extended L2, zlib": (EXTL2, True),
    "extended L2, zstd": ({**EXTL2, **ZSTD}, True),
    "LUKS": (LUKS, False),
    "legacy AES": (AES, False),
}
CLUSTERS = {"512": 512, "16K": 16 * KiB, "64K": 64 * KiB, "2M": 2 * MiB}
COMPATS = ("0.10", "1.1")
CHAINS = ("alone", "on raw", "on the same", "on data file")

# What QEMU itself will not make, and how it says so.
REFUSED: dict[tuple[str, str, str], str] = {
    ("extended L2", "512", "1.1"): "at least 16384 bytes",
    ("zstd", "64K", "0.10"): "only supported with compatibility level 1.1",
    ("extended L2", "64K", "0.10"): "only supported with compatibility level 1.1",
}


def possible(feature: str, cluster: str, compat: str) -> bool:
    if "extended" in feature:
        return cluster != "512" and compat == "1.1"
    return cluster != "16K" and not (compat == "0.10" and feature == "zstd")


CASES = [
    (feature, cluster, compat, chain)
    for feature in FEATURES
    for cluster in CLUSTERS
    for compat in COMPATS
    for chain in CHAINS
    if possible(feature, cluster, compat)
]


def make(path: Path, feature: str, cluster: str, compat: str, **rest: Any) -> secret.Secrets:
    """An image of one feature; returns its own secret."""
    options, _ = FEATURES[feature]
    own = rest.pop("secret", TOP)
    secrets = (own if "encrypt.format" in options else None,)
    options = {**options, "cluster_size": CLUSTERS[cluster], "compat": compat}
    secret.create(path, rest.pop("size", SIZE), secrets, **options, **rest)
    return secrets


@pytest.fixture(scope="module")
def fresh(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., secret.Secrets]:
    """As :func:`make`, from a copy where the same was made before: a LUKS header costs QEMU two
    seconds of measuring how slow a key derivation should be."""
    directory = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        directory = directory.parent  # all workers have the copies in common

    def copied(path: Path, feature: str, cluster: str, compat: str, **rest: Any) -> secret.Secrets:
        if feature != "LUKS":
            return make(path, feature, cluster, compat, **rest)
        backing = rest.pop("backing", None)
        key = "-".join(["luks", cluster, compat, *map(str, rest.values())])
        template = directory / key
        if not template.exists():
            mine = directory / f"{key}.{os.getpid()}"
            make(mine, feature, cluster, compat, **rest)
            mine.rename(template)
        shutil.copyfile(template, path)
        secrets = (rest.get("secret", TOP),)
        if backing is not None:
            where = secret.opened(path, secrets)
            name, fmt = backing
            rebase = ["-u", "-b", str(name), "-F", fmt]
            qemu.run("qemu-img", "rebase", *secret.objects(secrets), *rebase, *where)
        return secrets

    return copied


def below(directory: Path, case: tuple[str, str, str, str], fresh: Any) -> tuple[Any, Any]:
    """The layer below the image, as (name, format) for qemu-img, and its secret."""
    feature, cluster, compat, chain = case
    path = directory / "below"
    if chain == "on raw":  # shorter, and no whole number of sectors
        path.write_bytes(bytes(range(256)) * (3 * MiB // 256) + b"the end")
        return (path.name, "raw"), None
    if chain == "on the same":  # longer
        (own,) = fresh(path, feature, "64K", "1.1", secret=BELOW, size=SIZE + MiB)
        secret.play(path, (own,), 1, SIZE + MiB, compressed=FEATURES[feature][1])
        return (path.name, "qcow2"), own
    raw = "on" if cluster == "64K" else "off"
    data = {"data_file": directory / "data.raw", "data_file_raw": raw}
    secret.create(path, SIZE - MiB, (), cluster_size=16 * KiB, **data)
    secret.play(path, (), 2, SIZE - MiB, cluster=16 * KiB)
    return (path.name, "qcow2"), None


def read_pieces(server: Server, name: str, content: bytes) -> None:
    """At any offset: sectors, subclusters and compressed clusters are cut anywhere."""
    rng = random.Random(name)
    with server.connect(name) as client:
        for _ in range(25):
            at = rng.randrange(len(content))
            length = min(len(content) - at, rng.choice((1, 15, 511, 512, 4097, 70_000)))
            assert client.pread(length, at) == content[at : at + length], (at, length)


@pytest.mark.parametrize("case", CASES, ids="/".join)
def test_content_and_extents_are_those_of_qemu(
    tmp_path: Path,
    fresh: Any,
    case: tuple[str, str, str, str],
    record_property: Callable[[str, object], None],
) -> None:
    feature, cluster, compat, chain = case
    backing, lower = (None, None) if chain == "alone" else below(tmp_path, case, fresh)
    path = tmp_path / "disk.qcow2"
    (own,) = fresh(path, feature, cluster, compat, backing=backing)
    secrets = (own, lower)
    for name, compressed in (("one", FEATURES[feature][1]), ("two", False)):
        secret.play(
            path, secrets, ord(name[0]), SIZE, cluster=CLUSTERS[cluster], compressed=compressed
        )
        secret.take(path, secrets, name)
    expected = {name: secret.content(path, secrets, name) for name in ("one", "two")}
    keys = {f"passphrase.{i}" if i else "passphrase": s for i, s in enumerate(secrets) if s}
    with serve(file=path, **keys) as server:
        for name, content in expected.items():
            assert server.copy(name) == content
            read_pieces(server, name, content)
        assert server.extents("two") == secret.snapshot_extents(path, secrets, "two")
    record_property("matrix", case)


@pytest.mark.parametrize("case", REFUSED, ids="/".join)
def test_what_qemu_refuses_to_make(
    tmp_path: Path,
    case: tuple[str, str, str],
    record_property: Callable[[str, object], None],
) -> None:
    with pytest.raises(secret.Refused, match=REFUSED[case]) as refusal:
        make(tmp_path / "disk.qcow2", *case)
    record_property("refused", (*case, str(refusal.value).rpartition(": ")[2]))
