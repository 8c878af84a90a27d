"""A real machine in qemu-system: 16 MiB of memory, QEMU's BIOS and no operating system."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

MEMORY = 16 << 20


class Vm:
    """Spoken to over QMP on its standard input and output."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process
        self.events: list[dict[str, Any]] = []  #: that came before an answer
        self._answer()  # the greeting
        self.qmp("qmp_capabilities")

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, "QEMU has ended"
        return json.loads(line)

    def qmp(self, command: str, **arguments: object) -> Any:
        assert self._process.stdin is not None
        asked = {"execute": command, "arguments": arguments}
        self._process.stdin.write(json.dumps(asked) + "\n")
        self._process.stdin.flush()
        while True:
            answer = self._answer()
            assert "error" not in answer, answer
            if "return" in answer:
                return answer["return"]
            self.events.append(answer)

    def hmp(self, line: str) -> str:
        return self.qmp("human-monitor-command", **{"command-line": line})

    def registers(self) -> str:
        return self.hmp("info registers")

    def memory(self, directory: Path, at: int = 0, size: int = MEMORY) -> bytes:
        """The guest's memory, as its processor sees it."""
        out = directory / "memory"
        self.qmp("pmemsave", val=at, size=size, filename=str(out))
        try:
            return out.read_bytes()
        finally:
            out.unlink()

    def run_a_little(self) -> None:
        """Until the BIOS has left the place where the processor starts."""
        before = self.registers()
        self.qmp("cont")
        deadline = time.monotonic() + 60
        while self.registers() == before:
            assert time.monotonic() < deadline, "the BIOS does not run"
        self.qmp("stop")

    def save(self, name: str) -> None:
        said = self.hmp(f"savevm {name}")
        assert not said, said

    def migrate(self, uri: str) -> None:
        """Send the machine somewhere, and wait until it is there."""
        self.qmp("migrate", uri=uri)
        deadline = time.monotonic() + 60
        while (status := self.qmp("query-migrate")["status"]) != "completed":
            assert status != "failed", self.qmp("query-migrate")
            assert time.monotonic() < deadline, "it is never there"
            time.sleep(0.01)

    def wait_until_loaded(self) -> None:
        deadline = time.monotonic() + 60
        while self.qmp("query-status")["status"] == "inmigrate":
            assert time.monotonic() < deadline, "the incoming state never ends"
            time.sleep(0.01)


@contextmanager
def machine(disk: Path, *arguments: str, kind: str = "pc", memory: int = MEMORY) -> Iterator[Vm]:
    """A machine that stands still, with one disk."""
    line = ["qemu-system-x86_64", "-M", kind, "-accel", "tcg", "-m", f"{memory}b"]
    line += ["-S", "-display", "none", "-nodefaults", "-qmp", "stdio"]
    line += ["-drive", f"if=ide,file={disk},format=qcow2", *arguments]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(line, text=True, **pipes) as process:  # type: ignore[call-overload]
        try:
            vm = Vm(process)
            yield vm
            vm.qmp("quit")
            assert process.wait(60) == 0
        finally:
            if process.poll() is None:
                process.kill()
