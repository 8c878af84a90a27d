"""What of typing is needed while the program runs, without typing.

A server should answer at once, and importing typing, with re, enum and contextlib below it,
takes as long as Python itself takes to start.  Annotations are never evaluated here, so all that
is left are base classes.  The type checker sees the real ones.
"""

from __future__ import annotations

__all__ = ["TYPE_CHECKING", "Any", "Final", "Generic", "NamedTuple", "Protocol", "TypeVar"]

TYPE_CHECKING = False  # what type checkers take for true

if TYPE_CHECKING:
    from typing import Any, Final, Generic, NamedTuple, Protocol, TypeVar
else:
    from collections import namedtuple

    Any = Final = object

    class Protocol:
        """A base that says nothing."""

    class Generic:
        """A base that may be given types: ``Pool[int]`` is ``Pool``."""

        def __class_getitem__(cls, types):
            return cls

    def TypeVar(name, *constraints, **bound):
        return name

    class _NamedTupleMaker(type):
        def __new__(cls, name, bases, body):
            if not bases:
                return super().__new__(cls, name, bases, body)
            fields = body.get("__annotations__", {})
            defaults = [body.pop(f) for f in fields if f in body]
            base = namedtuple(name, fields, defaults=defaults, module=body["__module__"])
            return type(name, (base,), {"__slots__": (), **body})

    class NamedTuple(metaclass=_NamedTupleMaker):
        """A tuple whose fields are the class's annotations, with defaults for the last ones."""
