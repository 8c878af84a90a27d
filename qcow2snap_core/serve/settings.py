"""The plugin's keys: what may be given, and what each value must be."""

from __future__ import annotations

from collections.abc import Callable

from ..errors import UsageError, escaped
from ..format.choosing import Choice
from ..image.image import Image
from ..image.opener import BACKING_FORMATS, Options, open_image
from ..storage.libnbd import absolute, is_uri, refuse_url
from ..storage.local import from_here
from ..typed import Final, TypeVar
from ..util.passphrase import read_passphrase
from ..util.units import parse_seconds, parse_size
from ..util.wording import PLUGIN

ALIASES: Final = {"snapshot.id": "snapshot-id", "snapshot.name": "snapshot-name"}
KEYS: Final = (
    "file",
    "snapshot",
    "snapshot-id",
    "snapshot-name",
    "allow-dir",
    "allow-file",
    "backing-format",
    "passphrase",
    "passphrase.N",
    "l2-cache-size",
    "cluster-cache-size",
    "remote-timeout",
)

_T = TypeVar("_T")


class Settings:
    """Collects ``KEY=VALUE`` as nbdkit hands them over, one at a time."""

    def __init__(self) -> None:
        self._values: dict[str, str] = {}
        self._sizes: dict[str, int] = {}
        self._remote_timeout = Options().remote_timeout
        self._allowed: dict[str, list[str]] = {"allow-dir": [], "allow-file": []}
        self._passphrases: dict[int, bytes] = {}

    def set(self, key: str, value: str) -> None:
        """Take one key.  Raises UsageError that names it when it or its value is wrong."""
        if not is_key(key):
            raise UsageError(f"unknown key {key}=: the keys are {', '.join(KEYS)}")
        key = ALIASES.get(key, key)
        layer = _layer(key)
        if key in self._allowed:
            self._allowed[key].append(_from_here(key, value))
            return
        if key in self._values:
            raise UsageError(f"{key}= is given twice: give it once")
        self._values[key] = "" if layer is not None else value
        if layer is not None:
            try:
                self._passphrases[layer] = read_passphrase(key, value)
            except KeyboardInterrupt:
                raise UsageError(f"{key}=-: no passphrase was entered") from None
        elif key == "file":
            self._values[key] = _from_here(key, value)
        elif key == "backing-format" and value not in BACKING_FORMATS:
            raise UsageError(f"{key}={escaped(value)}: give raw or qcow2")
        elif key == "remote-timeout":
            self._remote_timeout = _parsed(key, value, parse_seconds)
        elif key.endswith("-size"):
            self._sizes[key] = _parsed(key, value, parse_size)

    @property
    def choice(self) -> Choice | None:
        """The one snapshot to serve, or None for all."""
        choice = Choice(*map(self._values.get, ("snapshot", "snapshot-id", "snapshot-name")))
        return None if choice == Choice() else choice

    def open_image(self) -> Image:
        """Raises UsageError when ``file=`` is missing, and what :func:`.open_image` raises."""
        if "file" not in self._values:
            raise UsageError("no image is given: add file=disk.qcow2")
        options = Options(
            allow_dirs=tuple(self._allowed["allow-dir"]),
            allow_files=tuple(self._allowed["allow-file"]),
            backing_format=self._values.get("backing-format"),
            passphrases=self._passphrases,
            l2_cache_size=self._sizes.get("l2-cache-size", Options().l2_cache_size),
            cluster_cache_size=self._sizes.get("cluster-cache-size", Options().cluster_cache_size),
            remote_timeout=self._remote_timeout,
            words=PLUGIN,
        )
        return open_image(self._values["file"], options)


def is_key(key: str) -> bool:
    """Whether the plugin has such a key."""
    return _layer(key) is not None or key in {*KEYS, *ALIASES} - {"passphrase.N"}


def _layer(key: str) -> int | None:
    """Whose passphrase a key gives: 0 is the image, 1 its backing file, and so on."""
    name, dot, number = key.partition(".")
    if name != "passphrase" or not dot:
        return 0 if name == "passphrase" else None
    plain = number.isascii() and number.isdigit() and not number.startswith("0")
    return int(number) if plain and len(number) <= 4 else None


def _parsed(key: str, value: str, parse: Callable[[str], _T]) -> _T:
    try:
        return parse(value)
    except UsageError as e:
        raise UsageError(f"{key}=: {e}") from e


def _from_here(key: str, value: str) -> str:
    """Absolute, because nbdkit changes directory when it goes into the background."""
    if not value:
        raise UsageError(f"{key}= is empty: give a path")
    if key == "file":
        refuse_url(value)
    return absolute(value) if key == "file" and is_uri(value) else from_here(value)
