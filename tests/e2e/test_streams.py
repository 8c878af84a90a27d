"""Standard streams that are closed or full, signals at any moment, error lines without secrets."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support import qemu
from support.qemu import MiB
from support.server import ROOT

COMMAND = [sys.executable, "-m", "qcow2snap_core"]
SECRET = "hunter2-is-no-good"


@pytest.fixture(scope="module")
def disk(tmp_path_factory):
    path = qemu.create(tmp_path_factory.mktemp("streams") / "disk.qcow2", 4 * MiB)
    qemu.io(path, "write -P 1 0 1M")
    qemu.take(path, "old")
    qemu.io(path, "write -P 2 0 1M")
    qemu.take(path, "s")
    return path


def shell(line, *arguments):
    """A shell command in which $Q is the command."""
    environment = {**os.environ, "Q": " ".join(COMMAND), "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        ["sh", "-c", line, "sh", *map(str, arguments)],
        capture_output=True,
        text=True,
        env=environment,
        timeout=60,
        check=False,
    )


# --- Streams ---


@pytest.mark.parametrize("command", ["list", "map", "diff", "check"])
def test_a_listing_that_cannot_be_written_is_an_error_in_one_line(disk, command, tmp_path):
    names = {"map": "s", "diff": "old s"}.get(command, "")
    if command == "check":  # finds something to print
        broken = tmp_path / "broken"
        broken.write_bytes(disk.read_bytes())
        qemu.patch(broken, qemu.field64(broken, 48) + 0, b"\0" * 8)
        disk = broken
    for where, why in ((">/dev/full", "no space left on device"), (">&-", "bad file descriptor")):
        done = shell(f'$Q {command} "$1" {names} {where}', disk)
        assert (done.returncode, done.stderr) == (1, f"qcow2snap: write error: {why}\n")


def test_whoever_has_read_enough_gets_no_complaint(disk):
    done = shell('$Q map "$1" s --json | true; $Q list "$1" | head -n 1', disk)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("words", ["--help", "--version", "copy --help"])
def test_help_that_cannot_be_written_is_an_error_too(words):
    for where, why in ((">/dev/full", "no space left on device"), (">&-", "bad file descriptor")):
        done = shell(f"$Q {words} {where}")
        assert (done.returncode, done.stderr) == (1, f"qcow2snap: write error: {why}\n")


def test_an_error_behind_a_lost_listing_is_the_one_line(disk, tmp_path):
    """The list of what there is, then what is damaged."""
    broken = tmp_path / "broken"
    broken.write_bytes(disk.read_bytes())
    qemu.patch(broken, 60, (3).to_bytes(4, "big"))  # of two snapshots
    said = shell('$Q list "$1"', broken)
    assert said.stdout.count("\n") > 1
    for where in (">/dev/full", ">&-"):
        done = shell(f'$Q list "$1" {where}', broken)
        assert (done.returncode, done.stderr) == (1, said.stderr)


@pytest.mark.parametrize("closed", ["2>&-", "2>/dev/full"])
def test_a_note_that_cannot_be_said_changes_nothing(disk, tmp_path, closed):
    dirty = tmp_path / "dirty"
    dirty.write_bytes(disk.read_bytes())
    qemu.patch(dirty, 79, b"\1")
    done = shell('$Q check "$1"', dirty)
    assert (done.returncode, "is marked dirty" in done.stderr) == (0, True)
    assert shell(f'$Q check "$1" {closed}', dirty).returncode == 0


@pytest.mark.parametrize("closed", [">&-", "2>&-", "<&-", ">&- 2>&- <&-", "2>/dev/full"])
def test_a_copy_is_made_whatever_is_closed(disk, tmp_path, closed):
    done = shell(f'$Q copy "$1" s "$2" {closed}', disk, tmp_path / "raw")
    assert (done.returncode, done.stderr) == (0, "")
    assert (tmp_path / "raw").read_bytes() == qemu.content(disk, "s")


def test_a_copy_is_made_and_then_its_lost_report_is_an_error(disk, tmp_path):
    done = shell('$Q copy "$1" s "$2" >/dev/full', disk, tmp_path / "raw")
    assert (done.returncode, done.stderr) == (
        1,
        "qcow2snap: write error: no space left on device\n",
    )
    assert (tmp_path / "raw").read_bytes() == qemu.content(disk, "s")


@pytest.mark.parametrize("closed", ["2>&-", ">&- 2>&-", "2>/dev/full"])
def test_an_error_without_anywhere_to_say_it_has_its_status(disk, closed):
    assert shell(f'$Q copy "$1" no-such /tmp/never {closed}', disk).returncode == 1
    assert shell(f'$Q list "$1" --no-such {closed}', disk).returncode == 2


@pytest.mark.parametrize("command", ["split", "join"])
def test_chains_are_made_whatever_is_closed(disk, tmp_path, command):
    source = disk
    if command == "join":
        shell('$Q split "$1" "$2"', disk, tmp_path / "chain")
        source = tmp_path / "chain" / "active.qcow2"
    done = shell(f'$Q {command} "$1" "$2" >&- 2>&- <&-', source, tmp_path / "out")
    assert done.returncode == 0
    top = tmp_path / "out" / "active.qcow2" if command == "split" else tmp_path / "out"
    qemu.run("qemu-img", "compare", "-q", top, disk)


# --- Signals ---


def started(*arguments):
    return subprocess.Popen(
        [*COMMAND, *map(str, arguments)],
        cwd=ROOT,
        text=True,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def until_ours(process):
    """Wait for the end of Python's own start, in which it catches Ctrl-C for a while."""
    caught = False
    while process.poll() is None:
        status = Path(f"/proc/{process.pid}/status").read_text()
        mask = int(status.partition("SigCgt:")[2].split()[0], 16)
        before, caught = caught, bool(mask >> signal.SIGINT - 1 & 1)
        if before and not caught:
            return


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("command", ["list", "map", "diff", "check", "copy", "split", "join"])
def test_a_signal_at_any_moment_leaves_no_traceback_and_nothing_half(
    disk, tmp_path, command, number
):
    """Death by the signal, which a shell calls 128 + number, or that status; or it was done."""
    out = tmp_path / "out"
    names = {
        "map": ["s"],
        "diff": ["old", "s"],
        "copy": ["s", out],
        "split": [out],
        "join": [out],
    }.get(command, [])
    rng = random.Random(f"{command}{number}")
    for _ in range(4):
        process = started(command, disk, *names)
        until_ours(process)
        time.sleep(rng.uniform(0, 0.3))
        process.send_signal(number)
        _, said = process.communicate(timeout=60)
        assert process.returncode in (-number, 128 + number, 0), said
        assert "Traceback" not in said
        assert not [name for name in os.listdir(tmp_path) if name.endswith(".part")]
        if out.is_dir():
            for file in out.iterdir():
                file.unlink()
            out.rmdir()
        elif out.exists():
            out.unlink()


@pytest.mark.parametrize("number", ["INT", "HUP"])
def test_what_is_ignored_stays_ignored(disk, tmp_path, number):
    """As by nohup, or in the background of a shell without job control."""
    sending = f"while kill -{number} $! 2>&-; do sleep 0.01; done"
    line = f'trap \'\' {number}; $Q copy "$1" s "$2" & {sending}; wait $!'
    done = shell(line, disk, tmp_path / "raw")
    assert (done.returncode, done.stderr) == (0, "")
    assert (tmp_path / "raw").read_bytes() == qemu.content(disk, "s")


def test_ctrl_c_at_the_prompt_for_a_passphrase(disk, tmp_path):
    primary, terminal = os.openpty()
    process = subprocess.Popen(
        [*COMMAND, "copy", str(disk), "s", str(tmp_path / "raw"), "--passphrase", "-"],
        cwd=ROOT,
        stdin=terminal,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    # getpass asks on the terminal of the session, or else on these streams.
    said = b""
    while b"passphrase" not in said:
        said += process.stderr.read1(100)
    process.send_signal(signal.SIGINT)
    _, rest = process.communicate(timeout=60)
    os.close(primary)
    os.close(terminal)
    assert process.returncode == 130
    assert b"Traceback" not in said + rest


# --- What error lines say ---


@pytest.mark.parametrize(
    "words",
    [
        ["list", "DISK", f"--passphras={SECRET}"],
        ["list", "DISK", "--passphras", SECRET],
        ["list", f"--passphrse={SECRET}", "DISK"],
        ["list", "DISK", "--passphrase.0", SECRET],
        ["list", "DISK", "--passphrase.99999", SECRET],
        ["list", "DISK", f"--json={SECRET}"],
        ["list", "DISK", "x", SECRET],
        ["--passphrase", SECRET, "list", "DISK"],
        [f"--passphrase={SECRET}", "list", "DISK"],
        [SECRET, "DISK"],
        ["mount", "DISK", "s", "/mnt", "--partition", SECRET],
        ["map", "DISK", "s", "--backing-format", SECRET],
        ["copy", "DISK", "s", "t", "--forc\nqcow2snap: all is well"],
        ["copy", "DISK", "s", "t", f"-x{SECRET}"],
    ],
)
def test_a_usage_error_is_one_line_that_repeats_no_value(disk, words):
    line = [*COMMAND, *(str(disk) if w == "DISK" else w for w in words)]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    [said] = done.stderr.splitlines()
    assert SECRET not in said
    assert said.startswith("qcow2snap: ")
    assert said.endswith("--help says what there is")


@pytest.mark.parametrize(
    "words", [["--passphras", SECRET], [f"--passphrase={SECRET}"], ["s", f"--pass={SECRET}", "-f"]]
)
def test_serve_lets_nbdkit_repeat_no_secret_either(disk, words):
    line = [*COMMAND, "serve", str(disk), *words]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, check=False, timeout=60)
    [said] = done.stderr.splitlines()
    assert (done.returncode, done.stdout) == (1, "")
    assert said.startswith("qcow2snap: nbdkit has no option --pass")
    assert said.endswith("such as passphrase=+FILE")
    assert SECRET not in said


def test_serve_leaves_nbdkit_its_abbreviations(disk):
    done = shell('$Q serve "$1" s -U - --filt=cow --run \'nbdinfo --size "$uri"\'', disk)
    assert (done.returncode, done.stdout) == (0, f"{4 * MiB}\n")


def test_options_are_not_abbreviated(disk):
    assert "unknown option --js (did you mean --json?)" in shell('$Q list "$1" --js', disk).stderr


@pytest.mark.parametrize("layer", [1, 9, 10, 200, 9999])
def test_each_layer_can_have_a_passphrase(disk, layer):
    """The image is not encrypted: that is said, so the option was understood."""
    done = shell(f'$Q copy "$1" s /tmp/never --passphrase.{layer} {SECRET}', disk)
    assert (done.returncode, "is not encrypted" in done.stderr) == (1, True)
