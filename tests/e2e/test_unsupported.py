"""An image that needs what the plugin cannot do yet is refused at the start, never misread."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.qemu import MiB, run
from support.server import refused

SECRET = ("--object", "secret,id=s,data=abc")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10", "it is encrypted"),
        ("encrypt.format=aes,encrypt.key-secret=s", "it is encrypted"),
        ("compression_type=zstd", "compression type 1"),
        ("extended_l2=on", "extended L2 entries"),
        ("data_file=data.raw", "external data file"),
    ],
    ids=["luks", "aes", "zstd", "extended L2", "data file"],
)
def test_what_is_not_supported_is_refused(options: str, said: str, tmp_path: Path) -> None:
    image = tmp_path / "disk.qcow2"
    run("qemu-img", "create", *SECRET, "-f", "qcow2", "-o", options, image, MiB, cwd=tmp_path)
    assert said in refused(file=image)
