"""Where a passphrase is taken from: the notations of nbdkit's luks filter, and their errors,
none of which may show a secret."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from qcow2snap_core.errors import UsageError
from qcow2snap_core.util.passphrase import read_passphrase

LINES = [
    (b"secret\n", b"secret"),
    (b"secret", b"secret"),
    (b"first\nsecond\n", b"first"),
    (b"\n", b""),
    (b"", b""),
    (b" spaces stay \n", b" spaces stay "),
    (b"\r\n", b"\r"),
    (b"caf\xe9\0\xff\n", b"caf\xe9\0\xff"),
]


@pytest.mark.parametrize("value", ["secret", "", " ", "a+b", "a-b", "caf\xe9", "caf\udce9"])
def test_the_secret_itself(value: str) -> None:
    assert read_passphrase("passphrase", value) == os.fsencode(value)


@pytest.mark.parametrize(("content", "secret"), LINES)
def test_the_first_line_of_a_file(tmp_path: Path, content: bytes, secret: bytes) -> None:
    file = tmp_path / "a file"
    file.write_bytes(content)
    assert read_passphrase("passphrase", f"+{file}") == secret


@pytest.mark.parametrize(("content", "secret"), LINES)
def test_the_first_line_of_a_descriptor(content: bytes, secret: bytes) -> None:
    out, into = os.pipe()
    os.write(into, content)
    os.close(into)
    assert read_passphrase("passphrase", f"-{out}") == secret
    with pytest.raises(OSError):
        os.close(out)  # it was read for this once


@pytest.mark.parametrize("ending", [b"", b"\n", b"\nmore"])
def test_a_long_one_is_read_whole(tmp_path: Path, ending: bytes) -> None:
    secret = b"s" * (64 << 10)
    (tmp_path / "file").write_bytes(secret + ending)
    assert read_passphrase("passphrase", f"+{tmp_path}/file") == secret
    assert read_passphrase("passphrase", secret.decode()) == secret


def test_one_that_is_too_long_is_refused_and_not_cut(tmp_path: Path) -> None:
    secret = "s" * ((64 << 10) + 1)
    (tmp_path / "file").write_text(secret)
    for value in (secret, f"+{tmp_path}/file", "+/dev/zero"):
        with pytest.raises(UsageError, match=r"passphrase=: .* longer than 64 KiB"):
            read_passphrase("passphrase", value)


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ("-0", "above 2"),
        ("-2", "above 2"),
        ("-hunter2", "above 2"),
        ("-3.5", "above 2"),
        ("--3", "above 2"),
        ("-\u0663", "above 2"),
        ("-99999", "cannot read the passphrase: bad file descriptor"),
        ("-99999999999999999999", "above 2"),
        ("-" + "9" * 5000, "above 2"),
        ("+/nowhere/at all", "cannot open '/nowhere/at all': no such file"),
        ("+", "cannot open"),
        ("+a\0b", "cannot open"),
        ("+/", "is a directory"),
    ],
)
def test_a_bad_notation_names_the_key_and_no_secret(value: str, said: str) -> None:
    with pytest.raises(UsageError) as error:
        read_passphrase("passphrase.1", value)
    assert str(error.value).startswith("passphrase.1=")
    assert said in str(error.value)
    assert "hunter2" not in str(error.value)
    assert "\n" not in str(error.value)


def test_a_prompt_needs_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    with open(os.devnull) as nothing:
        monkeypatch.setattr("sys.stdin", nothing)
        with pytest.raises(UsageError, match=r"passphrase=- asks on a terminal, there is none"):
            read_passphrase("passphrase", "-")
