"""NBD URIs: which they are, what of them is printed, and how they survive a change of directory."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from support.server import ROOT

from qcow2snap_core.storage.libnbd import absolute, is_uri, without_secrets


@pytest.mark.parametrize(
    ("path", "uri"),
    [
        ("nbd://host", True),
        ("nbd+unix:///?socket=x", True),
        ("nbds+vsock://2", True),
        ("./nbd://host", False),
        ("nbd:host:10809", False),
        ("NBD://host", False),
        ("http://host", False),
        ("/nbd://", False),
    ],
)
def test_a_uri_is_told_from_a_file(path: str, uri: bool) -> None:
    assert is_uri(path) is uri


@pytest.mark.parametrize(
    ("uri", "shown"),
    [
        ("nbd://host:1/x", "nbd://host:1/x"),
        ("nbds://alice:secret@host/x?tls-psk-file=/etc/keys", "nbds://host/x"),
        ("nbd+unix:///x?socket=/run/s&tls-certificates=/a", "nbd+unix:///x?socket=/run/s"),
        ("nbds+unix://alice@/?tls-psk-file=k&socket=s", "nbds+unix:///?socket=s"),
        ("nbd://h/a\nb", "nbd://h/a\\nb"),
    ],
)
def test_secrets_are_not_printed(uri: str, shown: str) -> None:
    assert without_secrets(uri) == shown


@pytest.mark.parametrize(
    ("uri", "expected"),
    [
        ("nbd://host/x", "nbd://host/x"),
        ("nbd+unix:///x?socket=s", "nbd+unix:///x?socket={here}/s"),
        ("nbd+unix:///x?socket=/s", "nbd+unix:///x?socket=/s"),
        ("nbd+unix:///x?socket=a%26b", "nbd+unix:///x?socket={here}/a%26b"),
        ("nbds://h?tls-psk-file=k&tls-certificates=c", "nbds://h?tls-psk-file={here}/k&{c}"),
        ("nbd://host/x?socket=", "nbd://host/x?socket="),
    ],
)
def test_names_of_files_become_absolute(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, uri: str, expected: str
) -> None:
    monkeypatch.chdir(tmp_path)
    here = str(tmp_path)
    assert absolute(uri) == expected.format(here=here, c=f"tls-certificates={here}/c")


def test_a_missing_module_is_named_with_its_package() -> None:
    script = (
        "import sys; sys.modules['nbd'] = None; from qcow2snap_core import cli; "
        "sys.exit(cli.main(['list', 'nbd://localhost']))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        cwd=ROOT,
    )
    assert done.returncode == 1
    assert done.stderr == ("qcow2snap: libnbd's Python module is missing: install python3-libnbd\n")
