"""JSON that somebody else may have written, read strictly: what is not as it was asked for is a
ValueError, and nothing is guessed."""

from __future__ import annotations

import json
from collections.abc import Set
from typing import Any, Final

_MOST_DIGITS: Final = 20  # of -(1 << 63), and of (1 << 64) - 1


def loads(raw: bytes) -> Any:
    """What ASCII text says; no field of an object is there twice, and what Python alone takes for
    JSON is refused, and so is UTF-8."""
    try:
        return json.loads(
            raw.decode("ascii"), object_pairs_hook=_object, parse_int=_int, parse_constant=_no
        )
    except UnicodeDecodeError:
        raise ValueError("it is not ASCII") from None
    except json.JSONDecodeError:  # in words of Python's
        raise ValueError("it is no JSON, or only a part of it") from None
    except RecursionError:
        raise ValueError("it is nested too deep") from None


def fields(value: Any, names: Set[str], what: str) -> dict[str, Any]:
    """An object that has exactly these fields; ``what`` is whose they are."""
    if not isinstance(value, dict) or set(value) != names:
        raise ValueError(f"its fields are not those of a {what}")
    return value


def integer(value: Any, least: int, limit: int = 1 << 63) -> int:
    """A whole number from ``least`` to below ``limit``."""
    if type(value) is not int or not least <= value < limit:
        raise ValueError("a number is out of bounds")
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a field is there twice")
    return found


def _int(digits: str) -> int:
    if len(digits) > _MOST_DIGITS:
        raise ValueError("a number is out of bounds")
    return int(digits)


def _no(constant: str) -> None:
    raise ValueError(f"{constant} is no number")
