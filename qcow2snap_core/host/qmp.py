"""A small client of QEMU's two JSON protocols: QMP, and the guest agent's.

The library qemu.qmp would do the first, but Debian does not package it, it is built on asyncio,
and it does not speak to the guest agent; what is needed here is a request and its answer.
Both protocols are lines of JSON; QMP also greets, negotiates and sends events in between.

Who answers may be another program, or a hostile one: what is taken from an answer was compared with
its shape before (:func:`shaped`).
"""

from __future__ import annotations

import json
import secrets
import select
import socket
import struct
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Final

from ..errors import Error, escaped, reason, shown
from ..util.interrupts import Interrupted, raise_if_interrupted

_LONGEST_LINE: Final = 64 << 20  # query-named-block-nodes of a large machine is long
#: seconds for a greeting, which no work precedes (libvirt gives the agent's as many)
_GREETING: Final = 5
_PATIENCE: Final = 0.1  # seconds until Ctrl-C is heard
_CALLED: Final = {str: "text", int: "number", list: "list", dict: "object"}


class QmpError(Error):
    """QEMU, or the guest agent, refused a command or did not answer."""


class _NoAnswer(QmpError):
    """It may come yet."""


class NotThawed(QmpError):
    """The guest's filesystems may be frozen still."""


def not_thawed(why: Error, before: BaseException | None) -> NotThawed:
    """``before`` is what had ended the time in which they were frozen, if anything had."""
    told = f"{before}; " if isinstance(before, Error) else ""
    return NotThawed(f"{told}the guest was not thawed: {why}")


def request(command: str, arguments: dict[str, Any]) -> dict[str, Any]:
    """What is sent to have a command done; ``_`` in an argument's name stands for ``-``."""
    if not arguments:
        return {"execute": command}
    named = {key.replace("_", "-"): value for key, value in arguments.items()}
    return {"execute": command, "arguments": named}


def parsed(line: bytes | str, who: str) -> dict[str, Any]:
    """What was received.  Raises QmpError."""
    try:
        message = json.loads(line)
    except (ValueError, RecursionError) as e:
        raise QmpError(f"{who} does not speak JSON: is it the right socket?") from e
    if not isinstance(message, dict):
        raise QmpError(f"{who} does not speak QMP: is it the right socket?")
    return message


def result(command: str, answer: dict[str, Any]) -> Any:
    """What the command returned.  Raises QmpError with the reason that the other side gave."""
    if "error" in answer:
        raise refusal(command, answer["error"])
    if "return" not in answer:
        raise _not_understood(command, "it has no return")
    return answer["return"]


def shaped(command: str, answer: Any, shape: Any) -> Any:
    """The answer to a command, if it has this shape: a type; a list of one shape, that all elements
    have; or a dict of shapes by key, which may be absent where ``?`` ends it, among other keys.

    Raises QmpError with what has another shape.
    """
    wrong = _misshapen(answer, shape)
    if wrong is not None:
        raise _not_understood(command, wrong)
    return answer


def _not_understood(command: str, wrong: str) -> QmpError:
    return QmpError(f"{command}: the answer cannot be understood, {wrong}: is it the right socket?")


def _misshapen(value: Any, shape: Any, where: str = "it") -> str | None:
    """What is wrong."""
    kind = _CALLED[shape if isinstance(shape, type) else type(shape)]
    if _CALLED.get(type(value)) != kind:  # True is no number
        return f"{where} is no {kind}"
    if isinstance(shape, list):
        parts = ((each, shape[0], f"an element of {where}") for each in value)
    elif isinstance(shape, dict):
        absent = next((key for key in shape if key[-1] != "?" and key not in value), None)
        if absent is not None:
            return f"{where} has no {absent}"
        keys = ((key.removesuffix("?"), each) for key, each in shape.items())
        parts = ((value[key], each, key) for key, each in keys if key in value)
    else:
        return None
    return next((wrong for part in parts if (wrong := _misshapen(*part)) is not None), None)


def refusal(command: str, error: Any) -> QmpError:
    """The other side's reason, on one line: an agent is part of the guest, which may be hostile."""
    said = error.get("desc", error) if isinstance(error, dict) else error
    return QmpError(f"{command}: {escaped(str(said))}")


class _JsonSocket:
    """Lines of JSON over a Unix socket.  A context manager."""

    def __init__(self, path: str, timeout: float) -> None:
        self._path = path
        self._timeout = timeout
        self._ahead = b""  # of what has been received, behind the last line
        self._unanswered = 0  # commands whose answer was not waited for
        self._interruptible = True
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket.settimeout(timeout)
        try:
            self._socket.connect(path)
        except OSError as e:
            self._socket.close()
            raise QmpError(f"cannot connect to {shown(path)}: {reason(e)}") from e

    def close(self) -> None:
        self._socket.close()

    def _send(self, message: dict[str, Any]) -> None:
        try:
            self._socket.sendall(json.dumps(message).encode() + b"\n")
        except OSError as e:
            raise QmpError(f"{shown(self._path)}: {reason(e)}") from e

    def _deadline(self, most: float = float("inf")) -> float:
        """Until when all is waited for that comes before an answer, and the answer: who talks for
        ever does not answer either."""
        return time.monotonic() + min(self._timeout, most)

    def _receive(self, deadline: float) -> dict[str, Any]:
        try:
            line = self._line(deadline)
        except TimeoutError as e:
            raise _NoAnswer(
                f"{shown(self._path)} does not answer: is another program using it? "
                f"a socket serves one at a time"
            ) from e
        except OSError as e:
            raise QmpError(f"{shown(self._path)}: {reason(e)}") from e
        if not line.strip():
            raise QmpError(f"{shown(self._path)} was closed by the other side")
        # The agent marks an answer that follows a reset with a byte that is no JSON.
        return parsed(line.lstrip(b"\xff"), shown(self._path))

    def _line(self, deadline: float) -> bytes:
        """The next one; empty when the other side has closed.  Raises OSError, Interrupted."""
        received = [self._ahead]
        length = len(self._ahead)
        while b"\n" not in received[-1] and length < _LONGEST_LINE:
            if self._interruptible:
                raise_if_interrupted()
            left = deadline - time.monotonic()
            if left <= 0:
                raise TimeoutError
            if not select.select((self._socket,), (), (), min(left, _PATIENCE))[0]:
                continue
            received.append(self._socket.recv(1 << 16))
            if not received[-1]:
                return b""
            length += len(received[-1])
        line, _, self._ahead = b"".join(received).partition(b"\n")
        return line

    def execute(self, command: str, **arguments: Any) -> Any:
        """What the command returns.  Raises QmpError with the reason that the other side gave."""
        self._send(request(command, arguments))
        deadline = self._deadline()
        while True:
            try:
                answer = self._receive(deadline)
            except (_NoAnswer, Interrupted):
                self._unanswered += 1
                raise
            if "return" in answer or "error" in answer:  # and no event
                if not self._unanswered:
                    return result(command, answer)
                self._unanswered -= 1

    @contextmanager
    def to_the_end(self) -> Iterator[None]:
        """In this block answers are waited for, however long they take and whatever signal
        comes."""
        before = self._interruptible, self._timeout
        self._interruptible, self._timeout = False, float("inf")
        try:
            yield
        finally:
            self._interruptible, self._timeout = before


class Qmp(_JsonSocket):
    """A connection to a running QEMU."""

    def __init__(self, path: str, timeout: float = 60) -> None:
        """Connect and negotiate.  Raises QmpError."""
        super().__init__(path, timeout)
        try:
            if "QMP" not in self._receive(self._deadline(_GREETING)):
                raise QmpError(f"{shown(path)} does not speak QMP: is it the right socket?")
            self.execute("qmp_capabilities")
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Qmp:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, e: BaseException | None, tb: TracebackType | None
    ) -> None:
        self.close()

    def process(self) -> int:
        """The process that listens on the socket; 0 if it is not to be seen from here."""
        size = struct.calcsize("3i")
        peer = self._socket.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, size)
        pid: int = struct.unpack("3i", peer)[0]
        return pid


class FrozenGuest(_JsonSocket):
    """The guest's filesystems, frozen through its agent for the length of a ``with`` block, at the
    end of which NotThawed may be raised."""

    def __init__(self, path: str, timeout: float = 60) -> None:
        """Connect; nothing is frozen yet.  Raises QmpError when no agent answers."""
        super().__init__(path, timeout)
        # Whatever an earlier client left unread comes before the answer to this number.
        number = secrets.randbelow(1 << 31)
        try:
            self._send({"execute": "guest-sync", "arguments": {"id": number}})
            deadline = self._deadline(_GREETING)
            while self._receive(deadline).get("return") != number:
                pass
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> FrozenGuest:
        try:
            self.execute("guest-fsfreeze-freeze")
        except BaseException as e:
            # It may have frozen some of them, or all and been interrupted before it said so.
            self._thaw(e)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, e: BaseException | None, tb: TracebackType | None
    ) -> None:
        self._thaw(e)

    def _thaw(self, before: BaseException | None) -> None:
        self._interruptible = False  # whatever came before this
        try:
            self.execute("guest-fsfreeze-thaw")
        except QmpError as e:
            raise not_thawed(e, before) from e
        finally:
            self.close()
