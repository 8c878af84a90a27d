"""Encrypted images beyond the matrix: every cipher that QEMU can create, several key slots, what
is refused, and where the passphrases come from; no secret is ever in a line."""

from __future__ import annotations

import os
import pty
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from _pytest.mark import ParameterSet
from support import qemu, secret
from support.qemu import MiB
from support.server import command, refused, serve

from qcow2snap_core.decode import gcrypt
from qcow2snap_core.errors import ImageError
from qcow2snap_core.image.opener import Options, open_image

SECRET, OTHER = "correct horse", "battery staple"
SIZE = MiB
HASHES = ("sha256", "sha1", "sha512", "ripemd160", "sha224", "sha384", "md5")


def ciphers() -> Iterator[ParameterSet]:
    """(cipher, mode, IV generator, hash): all that QEMU 7.2 can create with AES, each hash in
    turn.  It aborts when it is asked for AES-192 in another mode than XTS; ECB has no IV."""
    number = 0
    for cipher in ("aes-128", "aes-192", "aes-256"):
        for mode in ("xts", "cbc", "ctr", "ecb"):
            for generator in ("plain64", "plain", "essiv"):
                useful = mode != "ecb" or generator == "plain64"
                if useful and (cipher != "aes-192" or mode == "xts"):
                    few = generator == "plain64" or (cipher, generator) == ("aes-256", "essiv")
                    marks = () if few else pytest.mark.long
                    what = cipher, mode, generator, HASHES[number % len(HASHES)]
                    yield pytest.param(*what, marks=marks)
                    number += 1


def luks(path: Path, **options: str) -> Path:
    """A LUKS image with one snapshot."""
    changed = {f"encrypt.{k.replace('_', '-')}": v for k, v in options.items()}
    secret.create(path, SIZE, (SECRET,), **{"encrypt.format": "luks", **changed})
    secret.io(path, (SECRET,), f"write -P 7 0 {SIZE}", "write -P 9 4k 1k", "discard 64k 64k")
    secret.take(path, (SECRET,), "s")
    secret.io(path, (SECRET,), f"write -P 1 0 {SIZE}")
    return path


@pytest.mark.parametrize(("cipher", "mode", "generator", "hash_name"), ciphers())
def test_every_cipher(
    tmp_path: Path, cipher: str, mode: str, generator: str, hash_name: str
) -> None:
    options = {"cipher_alg": cipher, "cipher_mode": mode, "ivgen_alg": generator}
    if generator == "essiv":
        # The hashed key is a key of AES in turn: of 16 or 32 bytes.
        options["ivgen_hash_alg"] = "md5" if cipher == "aes-128" else "sha256"
    path = luks(tmp_path / "disk.qcow2", hash_alg=hash_name, **options)
    with serve(file=path, passphrase=SECRET) as server:
        assert server.read("s") == secret.content(path, (SECRET,), "s")


def others() -> Iterator[ParameterSet | tuple[str, str, str]]:
    """(cipher, mode, IV generator): each other cipher, key length and mode that QEMU 7.2 can create
    and libgcrypt knows, but not all of them with each other: an image takes QEMU seconds.  CAST5
    has no blocks for XTS and no essiv."""
    yield from (("serpent-256", "xts", "plain64"), ("serpent-128", "cbc", "essiv"))
    yield from (("twofish-128", "xts", "plain64"), ("cast5-128", "cbc", "plain64"))
    for more in (
        *(("serpent-256", "xts", "essiv"), ("serpent-192", "xts", "plain64")),
        *(("twofish-256", "ctr", "essiv"), ("twofish-256", "cbc", "plain")),
        *(("twofish-128", "ecb", "plain64"), ("cast5-128", "ctr", "plain64")),
    ):
        yield pytest.param(*more, marks=pytest.mark.long)


@pytest.mark.parametrize(("cipher", "mode", "generator"), others())
def test_ciphers_of_libgcrypt(tmp_path: Path, cipher: str, mode: str, generator: str) -> None:
    options = {"cipher_alg": cipher, "cipher_mode": mode, "ivgen_alg": generator}
    if generator == "essiv":
        options["ivgen_hash_alg"] = "md5" if cipher.endswith("128") else "sha256"
    path = luks(tmp_path / "disk.qcow2", **options)
    with serve(file=path, passphrase=SECRET) as server:
        assert server.read("s") == secret.content(path, (SECRET,), "s")


def test_a_cipher_that_libgcrypt_does_not_have_is_refused(tmp_path: Path) -> None:
    path = luks(tmp_path / "disk.qcow2", cipher_alg="twofish-192", cipher_mode="xts")
    line = refused(file=path, passphrase=SECRET)
    assert "cipher 'twofish-xts-plain64' would have a key of 192 bits, which libgcrypt does" in line


def test_without_libgcrypt_a_line_names_the_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = luks(tmp_path / "disk.qcow2", cipher_alg="serpent-256")
    monkeypatch.setattr(gcrypt, "LIBRARY", "libgcrypt-that-is-not-there.so")
    with pytest.raises(ImageError, match="LUKS cipher is serpent: install libgcrypt20 "):
        open_image(str(path), Options(passphrases={0: SECRET.encode()}))


# --- Passphrases ---


@pytest.fixture(scope="module")
def disk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LUKS image; its eighth key slot is for another passphrase, slots between are free."""
    path = luks(tmp_path_factory.mktemp("luks") / "disk.qcow2")
    amend = "encrypt.state=active,encrypt.new-secret=s1,encrypt.iter-time=10,encrypt.keyslot=7"
    both = secret.objects((SECRET, OTHER))
    qemu.run("qemu-img", "amend", *both, *secret.opened(path, (SECRET,)), "-o", amend)
    return path


@pytest.mark.parametrize("passphrase", [SECRET, OTHER])
def test_any_key_slot_opens_it(disk: Path, passphrase: str) -> None:
    with serve(file=disk, passphrase=passphrase) as server:
        assert server.read("s") == secret.content(disk, (OTHER,), "s")


def test_a_key_slot_that_was_removed_opens_nothing(tmp_path: Path, disk: Path) -> None:
    path = tmp_path / "disk.qcow2"
    path.write_bytes(disk.read_bytes())
    amend = "encrypt.state=inactive,encrypt.old-secret=s0"
    where = secret.opened(path, (OTHER,))
    where[1] = where[1].replace("=s0", "=s1")
    both = secret.objects((SECRET, OTHER))
    qemu.run("qemu-img", "amend", *both, *where, "-o", amend)
    assert "the passphrase does not open it" in refused(file=path, passphrase=SECRET)
    with serve(file=path, passphrase=OTHER) as server:
        assert server.read("s") == secret.content(path, (OTHER,), "s")


def started(line: list[str], **how: Any) -> str:
    """Run nbdkit for as long as it takes to ask for the size of the only export."""
    line = [line[0], "-U", "-", *line[1:], "--run", 'nbdinfo --size "$uri"']
    done = subprocess.run(line, capture_output=True, text=True, timeout=60, check=False, **how)
    assert SECRET not in done.stdout + done.stderr
    return done.stdout + done.stderr


def test_a_passphrase_from_a_file(disk: Path, tmp_path: Path) -> None:
    (tmp_path / "key").write_text(f"{SECRET}\nmore\n")
    assert started(command(file=disk, passphrase="+key"), cwd=tmp_path) == f"{SIZE}\n"


def test_a_passphrase_from_a_descriptor(disk: Path) -> None:
    out, into = os.pipe()
    os.write(into, SECRET.encode() + b"\n")
    os.close(into)
    said = started(command(file=disk, passphrase=f"-{out}"), pass_fds=[out])
    os.close(out)
    assert said == f"{SIZE}\n"


def test_a_passphrase_from_a_terminal_is_not_echoed(disk: Path) -> None:
    line = command(file=disk, passphrase="-")
    line = [line[0], "-U", "-", *line[1:], "--run", 'nbdinfo --size "$uri"']
    child, terminal = pty.fork()
    if not child:
        os.execvp(line[0], line)
    shown, answered = b"", False
    while True:
        try:
            shown += os.read(terminal, 1000)
        except OSError:  # the other end is closed
            break
        if b"passphrase: " in shown and not answered:
            os.write(terminal, SECRET.encode() + b"\n")
            answered = True
    _, status = os.waitpid(child, 0)
    os.close(terminal)
    assert status == 0, shown
    assert str(SIZE).encode() in shown
    assert SECRET.encode() not in shown


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({}, "is encrypted: add passphrase=+FILE"),
        ({"passphrase": "wrong horse"}, "the passphrase does not open it"),
        ({"passphrase": ""}, "the passphrase does not open it"),
        ({"passphrase": "-"}, "asks on a terminal, there is none"),
        ({"passphrase": "-horse"}, "above 2"),
        ({"passphrase": "+/no/horse"}, "'/no/horse'"),
        ({"passphrase": [SECRET, SECRET]}, "passphrase= is given twice"),
        ({"passphrase": SECRET, "passphrase.x": SECRET}, "unknown key passphrase.x="),
        ({"passphrase": SECRET, "passphrase.0": SECRET}, "unknown key passphrase.0="),
    ],
)
def test_an_error_says_what_to_do_and_no_secret(
    disk: Path, keys: dict[str, Any], said: str
) -> None:
    line = refused(file=disk, **keys)
    assert said in line
    assert SECRET not in line
    assert "wrong horse" not in line


def test_a_passphrase_for_an_image_that_needs_none(tmp_path: Path) -> None:
    path = qemu.create(tmp_path / "disk.qcow2", MiB)
    line = refused(file=path, passphrase=SECRET)
    assert "is not encrypted: leave out the passphrase" in line
    assert SECRET not in line


def test_no_secret_in_the_log(disk: Path, tmp_path: Path) -> None:
    """Not even in the debug log, but for nbdkit's own line that repeats the keys given."""
    key = tmp_path / "key"
    key.write_text(OTHER)
    with serve("-v", file=disk, passphrase=f"+{key}") as server:
        server.read("s")
        assert OTHER not in server.log
        assert "passphrase" in server.log  # it is the debug log


# --- Layers ---


@pytest.fixture(scope="module")
def layers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A top and a bottom layer that are encrypted, and one between that is not."""
    directory = tmp_path_factory.mktemp("layers")
    luks(directory / "bottom.qcow2")
    qemu.create(directory / "middle.qcow2", SIZE, backing=("bottom.qcow2", "qcow2"))
    top = directory / "top.qcow2"
    options = {"encrypt.format": "aes"}
    secret.create(top, SIZE, (OTHER,), backing=("middle.qcow2", "qcow2"), **options)
    secret.io(top, (OTHER, None, SECRET), "write -P 3 10k 70k")
    secret.take(top, (OTHER, None, SECRET), "s")
    return top


def test_each_layer_may_have_its_own(layers: Path) -> None:
    keys = {"passphrase": OTHER, "passphrase.2": SECRET}
    with serve(file=layers, **keys) as server:
        assert server.read("s") == secret.content(layers, (OTHER, None, SECRET), "s")


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"passphrase.2": SECRET}, "top.qcow2' is encrypted: add passphrase="),
        ({"passphrase": OTHER}, "bottom.qcow2': the passphrase does not open it"),
        ({"passphrase": OTHER, "passphrase.2": "x"}, "bottom.qcow2': the passphrase does not"),
        ({"passphrase": OTHER, "passphrase.1": SECRET}, "bottom.qcow2': the passphrase does"),
    ],
)
def test_the_layer_whose_passphrase_is_wrong_is_named(
    layers: Path, keys: dict[str, str], said: str
) -> None:
    assert said in refused(file=layers, **keys)


def test_one_passphrase_is_for_all_layers_that_have_no_other(tmp_path: Path) -> None:
    luks(tmp_path / "bottom.qcow2")
    top = tmp_path / "top.qcow2"
    options = {"encrypt.format": "aes"}
    secret.create(top, SIZE, (SECRET,), backing=("bottom.qcow2", "qcow2"), **options)
    secret.io(top, (SECRET, SECRET), "write -P 3 10k 70k")
    secret.take(top, (SECRET, SECRET), "s")
    with serve(file=top, passphrase=SECRET) as server:
        assert server.read("s") == secret.content(top, (SECRET, SECRET), "s")
