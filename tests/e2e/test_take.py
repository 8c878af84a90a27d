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
from contextlib import contextmanager, suppress
from pathlib import Path

import nbd
import pytest
from support import qemu
from support.false_qemu import Answers, false_qemu
from support.qemu import MiB
from support.relay import relayed
from support.server import ROOT

from qcow2snap_core.host.qmp import FrozenGuest, NotThawed, Qmp, QmpError

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
    """Answers as the guest's agent does, and remembers what it was asked; ``answers`` is what it
    says to some commands instead, as JSON or lines."""

    def __init__(self, path: Path, answers: Answers | None = None) -> None:
        self.asked: list[str] = []
        self._answers = answers or {}
        self._server = socket.socket(socket.AF_UNIX)
        self._server.bind(str(path))
        self._server.listen()
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        client, _ = self._server.accept()
        with client, suppress(OSError), client.makefile("rw") as lines:
            for line in lines:
                request = json.loads(line)
                command = request["execute"]
                self.asked.append(command)
                answer: object = {"return": 1}
                if command == "guest-sync":
                    answer = {"return": request["arguments"]["id"]}
                answer = self._answers.get(command, answer)
                for each in answer if isinstance(answer, Iterator) else [answer]:
                    lines.write(each if isinstance(each, str) else json.dumps(each) + "\n")
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
    agent = Agent(tmp_path / "agent", {"guest-fsfreeze-freeze": refused("fs is busy")})
    line = take("--qmp", qmp, "--device", "d0", "--agent", tmp_path / "agent", "x", status=1).stderr
    agent.close()
    assert "fs is busy" in line
    assert agent.asked[-1] == "guest-fsfreeze-thaw"
    assert qemu.snapshots(disks[0]) == {}


def refused(why: str) -> dict[str, object]:
    return {"error": {"class": "GenericError", "desc": why}}


NODES = [{"node-name": "d0", "drv": "qcow2", "image": {"filename": "/d0.qcow2"}}]
THERE: Answers = {"qmp_capabilities": {}, "query-named-block-nodes": NODES, "query-block": []}


@pytest.mark.parametrize("thaws", [True, False])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_guest_is_thawed_when_interrupted(
    tmp_path: Path, number: signal.Signals, thaws: bool
) -> None:
    """A QEMU that never answers the snapshot command, as one that drains a stuck disk."""
    server = socket.socket(socket.AF_UNIX)
    server.bind(str(tmp_path / "qmp"))
    server.listen()
    agent = Agent(tmp_path / "agent", {} if thaws else {"guest-fsfreeze-thaw": refused("stuck")})
    process = subprocess.Popen(
        [*TAKE, "--qmp", f"{tmp_path}/qmp", "--device", "d0", "--agent", f"{tmp_path}/agent", "x"],
        cwd=ROOT,
        stderr=subprocess.PIPE,
        text=True,
    )
    client, _ = server.accept()
    with client, client.makefile("rw") as lines:
        lines.write('{"QMP": {}}\n')
        lines.flush()
        for line in lines:
            command = json.loads(line)["execute"]
            if command not in THERE:
                break
            lines.write(json.dumps({"return": THERE[command]}) + "\n")
            lines.flush()
        assert agent.asked[-1] == "guest-fsfreeze-freeze"
        process.send_signal(number)
        _, said = process.communicate(timeout=30)
    server.close()
    agent.close()
    assert process.returncode == 128 + number
    not_thawed = "qcow2snap: the guest was not thawed: guest-fsfreeze-thaw: stuck\n"
    assert said == ("" if thaws else not_thawed)
    assert agent.asked[-1] == "guest-fsfreeze-thaw"


def test_a_guest_that_is_not_thawed_is_told_with_the_command(
    qmp: Path, disks: list[Path], tmp_path: Path
) -> None:
    agent = Agent(tmp_path / "agent", {"guest-fsfreeze-thaw": refused("stuck")})
    given = ("--qmp", qmp, "--device", "d0", "--agent", tmp_path / "agent")
    done = take(*given, "x", status=1)
    agent.close()
    assert done.stderr == (
        "qcow2snap: the snapshot 'x' was taken, but the guest was not thawed: "
        "guest-fsfreeze-thaw: stuck\n"
    )
    assert read_through(done.stdout) == qemu.content(disks[0], "x")
    (tmp_path / "agent").unlink()
    agent = Agent(tmp_path / "agent", {"guest-fsfreeze-thaw": refused("stuck")})
    (line,) = take(*given, "x", status=1).stderr.splitlines()
    agent.close()
    assert "already exists" in line
    assert line.endswith("; the guest was not thawed: guest-fsfreeze-thaw: stuck")


def test_a_qemu_that_ends_behind_the_snapshot(tmp_path: Path) -> None:
    replies = THERE | {"query-named-block-nodes": (NODES,), "blockdev-snapshot-internal-sync": {}}
    with false_qemu(tmp_path / "qmp", replies):
        said = take("--qmp", tmp_path / "qmp", "--device", "d0", "x").stderr
    assert said == (
        "qcow2snap: the snapshot 'x' of 'd0' was taken, but where QEMU has '/d0.qcow2' is not "
        f"known: '{tmp_path}/qmp' was closed by the other side\n"
    )


FORGED = "no\nqcow2snap: all is well\x1b[2J"
ODD_ERRORS = {
    "lines": (refused(FORGED), r"no\nqcow2snap: all is well\x1b[2J"),
    "a number": ({"error": 5}, "5"),
    "no reason": ({"error": {}}, "{}"),
    "a reason that is none": ({"error": {"desc": ["\n"]}}, r"['\n']"),
    "too deep": ("[" * 100_000 + "\n", "does not speak JSON"),
}


@pytest.mark.parametrize("case", ODD_ERRORS)
def test_what_a_guest_says_is_one_line(qmp: Path, tmp_path: Path, case: str) -> None:
    answer, said = ODD_ERRORS[case]
    agent = Agent(tmp_path / "agent", {"guest-fsfreeze-freeze": answer})
    done = take("--qmp", qmp, "--device", "d0", "--agent", tmp_path / "agent", "x", status=1)
    agent.close()
    (line,) = done.stderr.splitlines()
    assert said in line
    assert line.isprintable()
    assert agent.asked[-1] == "guest-fsfreeze-thaw"


def test_a_socket_that_another_program_holds_is_told_soon(qmp: Path, tmp_path: Path) -> None:
    """The next client of QEMU's is only queued; so is that of a chardev with an agent."""
    begun = time.monotonic()
    with Qmp(str(qmp)), socket.socket(socket.AF_UNIX) as nobody:
        nobody.bind(f"{tmp_path}/agent")
        nobody.listen()
        words = [*TAKE, "--qmp", str(qmp), "--device", "d0", "x"]
        with subprocess.Popen(words, stderr=subprocess.PIPE, text=True) as process:
            with pytest.raises(QmpError, match="does not answer: is another"):
                FrozenGuest(f"{tmp_path}/agent")
            _, line = process.communicate(timeout=30)
        assert process.returncode == 1
        assert time.monotonic() - begun < 30
    assert f"'{qmp}' does not answer: is another program using it?" in line


def test_a_late_answer_is_not_taken_for_that_of_the_thaw(tmp_path: Path) -> None:
    """The guest has frozen after all, and remains so."""

    def late() -> Iterator[object]:
        time.sleep(1)
        yield {"return": 1}

    answers = {"guest-fsfreeze-freeze": late(), "guest-fsfreeze-thaw": refused("stuck")}
    agent = Agent(tmp_path / "agent", answers)
    said = pytest.raises(NotThawed, match="the guest was not thawed: guest-fsfreeze-thaw: stuck")
    with said, FrozenGuest(f"{tmp_path}/agent", 0.7):
        raise AssertionError
    agent.close()


@pytest.mark.parametrize("command", ["guest-sync", "guest-fsfreeze-freeze", "guest-fsfreeze-thaw"])
def test_a_guest_that_talks_for_ever_does_not_answer(tmp_path: Path, command: str) -> None:
    def talk() -> Iterator[object]:
        end = time.monotonic() + 5
        while time.monotonic() < end:
            yield {"event": "talk"}
            time.sleep(0.01)

    agent = Agent(tmp_path / "agent", {command: talk()})
    begun = time.monotonic()
    with pytest.raises(QmpError, match="does not answer"), FrozenGuest(f"{tmp_path}/agent", 0.5):
        pass
    assert time.monotonic() - begun < 4
    agent.close()


def test_a_name_that_qemu_has_cut_off(tmp_path: Path) -> None:
    """As it does with one that is longer than a path (bdrv_refresh_filename)."""
    name = 'json:{"driver": "qcow2", "file": {"driver": "file", "filename": "/disk...'
    nodes = [NODES[0] | {"image": NODES[0]["image"] | {"filename": name}}]
    replies = THERE | {"query-named-block-nodes": nodes, "blockdev-snapshot-internal-sync": {}}
    with false_qemu(tmp_path / "qmp", replies):
        done = take("--qmp", tmp_path / "qmp", "--device", "d0", "x")
    assert done.stderr.startswith("qcow2snap: the snapshot 'x' of 'd0' was taken, but where QEMU")
    assert len(done.stderr.splitlines()) == 1


def test_what_qemu_says_of_its_nodes_is_one_line(tmp_path: Path) -> None:
    nodes = [*NODES, NODES[0] | {"node-name": "a\nb"}]
    nodes.append(NODES[0] | {"node-name": "c", "drv": "x\x1b[2J"})
    with false_qemu(tmp_path / "qmp", THERE | {"query-named-block-nodes": nodes}):
        said = take("--qmp", tmp_path / "qmp", "--device", "d1", "x", status=1).stderr
    assert said.endswith(r"its qcow2 ones are a\nb, d0" + "\n")
    (tmp_path / "qmp").unlink()
    with false_qemu(tmp_path / "qmp", THERE | {"query-named-block-nodes": nodes}):
        said = take("--qmp", tmp_path / "qmp", "--device", "c", "x", status=1).stderr
    assert r"device 'c' is x\x1b[2J, not qcow2" in said


def snapshot(**more: object) -> dict[str, object]:
    return {"id": "1", "name": "x", "vm-state-size": 0, **dict.fromkeys(CLOCKS, 0), **more}


CLOCKS = "date-sec", "date-nsec", "vm-clock-sec", "vm-clock-nsec"
NODE = "query-named-block-nodes"
MISSHAPEN: dict[str, tuple[str, object, str]] = {
    "an object": (NODE, {}, "it is no list"),
    "null": (NODE, None, "it is no list"),
    "a list of lists": (NODE, [[]], "an element of it is no object"),
    "no name": (NODE, [{}], "an element of it has no node-name"),
    "a number": (NODE, [NODES[0] | {"node-name": 3}], "node-name is no text"),
    "no image": (NODE, [NODES[0] | {"image": []}], "image is no object"),
    "a driver": (NODE, [NODES[0] | {"drv": ["qcow2"]}], "drv is no text"),
    "a path": (NODE, [NODES[0] | {"image": {"filename": None}}], "filename is no text"),
    "snapshots": (
        NODE,
        [NODES[0] | {"image": {"filename": "x", "snapshots": {"x": 1}}}],
        "snapshots is no list",
    ),
    "a date": (
        NODE,
        [NODES[0] | {"image": {"filename": "x", "snapshots": [snapshot(**{"date-sec": True})]}}],
        "date-sec is no number",
    ),
    "devices": ("query-block", [{"device": "d0", "inserted": [1]}], "inserted is no object"),
}


@pytest.mark.parametrize("case", MISSHAPEN)
def test_an_answer_of_another_shape_is_one_line(tmp_path: Path, case: str) -> None:
    command, answer, why = MISSHAPEN[case]
    with false_qemu(tmp_path / "qmp", THERE | {command: answer}):
        said = take("--qmp", tmp_path / "qmp", "--device", "d0", "x", status=1).stderr
    assert said == (
        f"qcow2snap: {command}: the answer cannot be understood, {why}: is it the right socket?\n"
    )


@pytest.mark.parametrize(
    "after", [[], [[]], [NODES[0] | {"image": {"filename": 'json:["x"]', "snapshots": []}}]]
)
def test_what_is_odd_after_the_snapshot_does_not_hide_it(tmp_path: Path, after: object) -> None:
    replies = THERE | {NODE: (NODES, after), "blockdev-snapshot-internal-sync": {}}
    with false_qemu(tmp_path / "qmp", replies):
        done = take("--qmp", tmp_path / "qmp", "--device", "d0", "x")
    assert done.stderr.startswith("qcow2snap: the snapshot 'x' of 'd0' was taken, but where QEMU")
    assert len(done.stderr.splitlines()) == 1


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
