"""`qcow2snap take` against a running QEMU: one disk, several at one instant, the guest frozen.

QEMU is real.  The guest agent is a stand-in that writes down what it is asked: a real one would
freeze the filesystems of the machine that runs the tests.
"""

from __future__ import annotations

import json
import os
import select
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import nbd
import pytest
from support import qemu
from support.qemu import MiB
from support.relay import relayed
from support.server import ROOT

TAKE = [sys.executable, "-m", "qcow2snap_core", "take"]


@pytest.fixture
def disks(tmp_path: Path) -> list[Path]:
    names = ["first.qcow2", "with space.qcow2"]
    return [qemu.create(tmp_path / name, 4 * MiB) for name in names]


@contextmanager
def storage_daemon(tmp_path: Path, files: list[str | Path], *options: str) -> Iterator[Path]:
    """The QMP socket of a running QEMU that has been given these names of images, as the nodes
    d0, d1 and NBD exports.  It was started in the test's folder, and has left it."""
    command = ["qemu-storage-daemon", "--daemonize", *options]
    for i, file in enumerate(files):
        command += ["--blockdev", f"file,node-name=f{i},filename={file}"]
        command += ["--blockdev", f"qcow2,node-name=d{i},file=f{i}"]
        command += ["--export", f"nbd,id=e{i},node-name=d{i},name=d{i},writable=on"]
    command[2:2] = ["--nbd-server", f"addr.type=unix,addr.path={tmp_path}/nbd"]
    command += ["--chardev", f"socket,path={tmp_path}/qmp,server=on,wait=off,id=c"]
    command += ["--monitor", "chardev=c", "--pidfile", f"{tmp_path}/pid"]
    subprocess.run(command, cwd=tmp_path, check=True, timeout=60)
    pid = int((tmp_path / "pid").read_text())
    ended = os.pidfd_open(pid)
    try:
        assert os.readlink(f"/proc/{pid}/cwd") == "/"
        yield tmp_path / "qmp"
    finally:
        os.kill(pid, signal.SIGTERM)
        assert select.select([ended], [], [], 20)[0]
        os.close(ended)


@pytest.fixture
def qmp(disks: list[Path], tmp_path: Path) -> Iterator[Path]:
    """A running QEMU that was given relative names."""
    with storage_daemon(tmp_path, [disk.name for disk in disks]) as socket_path:
        yield socket_path


class Agent:
    """Answers as the guest's agent does, and remembers what it was asked."""

    def __init__(self, path: Path, fail_to_freeze: bool = False) -> None:
        self.asked: list[str] = []
        self._fail = fail_to_freeze
        self._server = socket.socket(socket.AF_UNIX)
        self._server.bind(str(path))
        self._server.listen()
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        client, _ = self._server.accept()
        with client, client.makefile("rw") as lines:
            for line in lines:
                request = json.loads(line)
                command = request["execute"]
                self.asked.append(command)
                answer: dict[str, object] = {"return": 1}
                if command == "guest-sync":
                    answer = {"return": request["arguments"]["id"]}
                elif command.endswith("freeze") and self._fail:
                    answer = {"error": {"class": "GenericError", "desc": "fs is busy"}}
                lines.write(json.dumps(answer) + "\n")
                lines.flush()

    def close(self) -> None:
        self._server.close()
        self._thread.join(10)


def take(*arguments: object, status: int = 0) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [*TAKE, *(str(a) for a in arguments)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == status, done.stderr
    assert "Traceback" not in done.stderr
    return done


def read_through(command: str) -> bytes:
    """The bytes that a printed command serves, as a shell would run it."""
    line = f"exec {command.strip()} -U - --run 'nbdcopy \"$uri\" -'"
    done = subprocess.run(["sh", "-c", line], capture_output=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_one_disk_with_what_the_guest_had_written(
    qmp: Path, disks: list[Path], tmp_path: Path
) -> None:
    guest = nbd.NBD()
    guest.set_export_name("d0")
    guest.connect_unix(str(tmp_path / "nbd"))
    guest.pwrite(b"before" * 1000, 12345)
    command = take("--qmp", qmp, "--device", "d0", "nightly").stdout
    guest.pwrite(b"AFTER!" * 1000, 12345)
    guest.shutdown()
    assert shlex.split(command)[-2:] == [f"file={disks[0]}", "snapshot=nightly"]
    served = read_through(command)
    assert served[12345 : 12345 + 6000] == b"before" * 1000
    assert served == qemu.content(disks[0], "nightly")


@pytest.mark.parametrize("name", ["first.qcow2", "link", "../{folder}/first.qcow2"])
def test_the_command_serves_the_file_that_qemu_has_open(
    disks: list[Path], tmp_path: Path, name: str
) -> None:
    """By whatever name, which means nothing in the directory that QEMU is in by now."""
    (tmp_path / "link").symlink_to("first.qcow2")
    with storage_daemon(tmp_path, [name.format(folder=tmp_path.name), disks[1].name]) as qmp:
        command = take("--qmp", qmp, "--device", "d0", "nightly").stdout
        assert read_through(command) == qemu.content(disks[0], "nightly")


def test_a_file_that_has_lost_its_name(qmp: Path, disks: list[Path]) -> None:
    disks[0].rename(disks[0].with_name("gone"))
    qemu.create(disks[0], 4 * MiB)  # another one has it now
    command = take("--qmp", qmp, "--device", "d0", "x").stdout
    assert read_through(command) == qemu.content(disks[0].with_name("gone"), "x")
    disks[0].with_name("gone").unlink()
    done = take("--qmp", qmp, "--device", "d0", "y")
    assert done.stdout == ""
    assert "has no name here: it was " in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("absolute", [True, False])
def test_a_qemu_whose_open_files_cannot_be_seen(
    disks: list[Path], tmp_path: Path, absolute: bool
) -> None:
    """An absolute name counts if the snapshot is in that file; a relative one is not guessed."""
    name = disks[0] if absolute else disks[0].name
    with storage_daemon(tmp_path, [name]), relayed(tmp_path, tmp_path / "qmp") as relay:
        done = take("--qmp", relay, "--device", "d0", "x")
    if absolute:
        assert read_through(done.stdout) == qemu.content(disks[0], "x")
    else:
        assert done.stdout == ""
        assert done.stderr == (
            "qcow2snap: the snapshot 'x' of 'd0' was taken, but where QEMU has 'first.qcow2' is "
            "not known: no file that it has open can be read from here and has it\n"
        )


@pytest.mark.parametrize("how", [["--device", "d0", "--device", "d1"], ["--device", "d0", "d1"]])
def test_several_disks_at_one_instant(qmp: Path, disks: list[Path], how: list[str]) -> None:
    commands = take("--qmp", qmp, *how, "it's one").stdout.splitlines()
    assert [shlex.split(c)[-2] for c in commands] == [f"file={d}" for d in disks]
    for command, disk in zip(commands, disks, strict=True):
        assert command.startswith("nbdkit ")
        assert read_through(command) == qemu.content(disk, "it's one")


def test_what_is_before_the_name_is_a_device(qmp: Path) -> None:
    line = take("--qmp", qmp, "--device", "d0", "weekly", "nightly", status=1).stderr
    assert line.endswith(
        "no device 'weekly': its qcow2 ones are d0, d1; "
        "a snapshot has one name, what is before it is a device\n"
    )


def test_all_or_none(qmp: Path, disks: list[Path]) -> None:
    take("--qmp", qmp, "--device", "d1", "twice")
    said = take("--qmp", qmp, "--device", "d0", "--device", "d1", "twice", status=1).stderr
    assert "already exists" in said
    assert qemu.snapshots(disks[0]) == {}


def test_a_name_that_is_an_id_is_called_a_name(qmp: Path) -> None:
    take("--qmp", qmp, "--device", "d0", "first")
    assert take("--qmp", qmp, "--device", "d0", "1").stdout.split()[-1] == "snapshot-name=1"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--device", "nope", "x"], "QEMU has no device 'nope': its qcow2 ones are d0, d1"),
        (["--device", "f0", "x"], "device 'f0' is file, not qcow2"),
        (["--device", "d0", "--device", "d0", "x"], "given twice"),
        (["--device", "d0", ""], "name is empty"),
        (["--device", "d0", "ü" * 128], "longer than the 255 bytes of QEMU's"),
    ],
)
def test_errors_are_one_line(qmp: Path, arguments: list[str], said: str) -> None:
    line = take("--qmp", qmp, *arguments, status=1).stderr
    assert said in line
    assert line.count("\n") == 1


def test_no_qemu_behind_the_socket(tmp_path: Path) -> None:
    line = take("--qmp", tmp_path / "none", "--device", "d0", "x", status=1).stderr
    assert line.startswith("qcow2snap: cannot connect to ")


def test_usage_errors(tmp_path: Path) -> None:
    take("--qmp", tmp_path / "qmp", "x", status=2)


def test_the_guest_is_frozen_around_it(qmp: Path, disks: list[Path], tmp_path: Path) -> None:
    agent = Agent(tmp_path / "agent")
    take("--qmp", qmp, "--device", "d0", "--agent", tmp_path / "agent", "x")
    agent.close()
    assert agent.asked == ["guest-sync", "guest-fsfreeze-freeze", "guest-fsfreeze-thaw"]
    assert list(qemu.snapshots(disks[0])) == ["x"]


def test_the_guest_is_thawed_when_qemu_refuses(qmp: Path, tmp_path: Path) -> None:
    take("--qmp", qmp, "--device", "d0", "x")
    agent = Agent(tmp_path / "agent")
    take("--qmp", qmp, "--device", "d0", "--agent", tmp_path / "agent", "x", status=1)
    agent.close()
    assert agent.asked[-1] == "guest-fsfreeze-thaw"


def test_a_guest_that_does_not_freeze_is_thawed_and_gets_no_snapshot(
    qmp: Path, disks: list[Path], tmp_path: Path
) -> None:
    agent = Agent(tmp_path / "agent", fail_to_freeze=True)
    line = take("--qmp", qmp, "--device", "d0", "--agent", tmp_path / "agent", "x", status=1).stderr
    agent.close()
    assert "fs is busy" in line
    assert agent.asked[-1] == "guest-fsfreeze-thaw"
    assert qemu.snapshots(disks[0]) == {}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_guest_is_thawed_when_interrupted(tmp_path: Path, number: signal.Signals) -> None:
    """A QEMU that never answers the snapshot command, as one that drains a stuck disk."""
    server = socket.socket(socket.AF_UNIX)
    server.bind(str(tmp_path / "qmp"))
    server.listen()
    agent = Agent(tmp_path / "agent")
    process = subprocess.Popen(
        [*TAKE, "--qmp", f"{tmp_path}/qmp", "--device", "d0", "--agent", f"{tmp_path}/agent", "x"],
        cwd=ROOT,
        stderr=subprocess.PIPE,
        text=True,
    )
    client, _ = server.accept()
    nodes = [{"node-name": "d0", "drv": "qcow2", "image": {"filename": "/d0.qcow2"}}]
    replies = {"qmp_capabilities": {}, "query-named-block-nodes": nodes, "query-block": []}
    with client, client.makefile("rw") as lines:
        lines.write('{"QMP": {}}\n')
        lines.flush()
        for line in lines:
            command = json.loads(line)["execute"]
            if command not in replies:
                break
            lines.write(json.dumps({"return": replies[command]}) + "\n")
            lines.flush()
        assert agent.asked[-1] == "guest-fsfreeze-freeze"
        process.send_signal(number)
        _, said = process.communicate(timeout=30)
    server.close()
    agent.close()
    assert process.returncode == 128 + number
    assert said == ""
    assert agent.asked[-1] == "guest-fsfreeze-thaw"


def test_a_machine_s_device_has_no_node_name_of_its_own(disks: list[Path], tmp_path: Path) -> None:
    """`-drive id=` as of old: the node has a generated name, the device is what people know."""
    drive = f"if=none,id=disk0,format=qcow2,file={disks[1]}"
    machine = ["-M", "none", "-S", "-nodefaults", "-display", "none", "-drive", drive]
    monitor = ["-qmp", f"unix:{tmp_path}/qmp,server=on,wait=off", "-pidfile", f"{tmp_path}/pid"]
    process = subprocess.Popen(["qemu-system-x86_64", *machine, *monitor])
    try:
        deadline = time.monotonic() + 30
        while not (tmp_path / "pid").exists():
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.01)
        command = take("--qmp", tmp_path / "qmp", "--device", "disk0", "x").stdout
        assert shlex.split(command)[-2] == f"file={disks[1]}"
        assert list(qemu.snapshots(disks[1])) == ["x"]
    finally:
        process.terminate()
        process.wait(20)
