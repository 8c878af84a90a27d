"""How an error line names a setting: in the words of whoever was called.

The plugin, the command and the library open the same images and fail in the same places; what
each would have to be given is spelt ``allow-dir=DIR``, ``--allow-dir DIR`` and
``allow_dirs=['DIR']``.  So whoever raises asks the wording that the image was opened with.
"""

from __future__ import annotations

from ..typed import Final, Protocol


class Wording(Protocol):
    """How settings are written; their keys are those of the plugin."""

    def name(self, key: str) -> str:
        """A setting, without a value."""
        ...

    def given(self, key: str, value: str) -> str:
        """A setting with its value, which is one line already."""
        ...

    def flag(self, key: str) -> str:
        """A setting that is on."""
        ...

    def passphrase(self, layer: int) -> str:
        """How the passphrase of a layer is given; 0 is the image, 1 its backing file."""
        ...


def passphrase_key(layer: int) -> str:
    """The plugin's key for the passphrase of a layer."""
    return f"passphrase.{layer}" if layer else "passphrase"


class _Plugin:
    def name(self, key: str) -> str:
        return f"{key}="

    def given(self, key: str, value: str) -> str:
        return f"{key}={value}"

    def flag(self, key: str) -> str:
        return self.given(key, "true")

    def passphrase(self, layer: int) -> str:
        return self.given(passphrase_key(layer), "+FILE")


class _Command(_Plugin):
    def name(self, key: str) -> str:
        return f"--{key}"

    def given(self, key: str, value: str) -> str:
        return f"--{key} {value}"

    def flag(self, key: str) -> str:
        return self.name(key)


class _Library:
    def name(self, key: str) -> str:
        keyword = key.replace("-", "_")
        return f"{keyword}s" if key.startswith("allow-") else keyword

    def given(self, key: str, value: str) -> str:
        literal = f"'{value}'"
        return f"{self.name(key)}=" + (f"[{literal}]" if key.startswith("allow-") else literal)

    def flag(self, key: str) -> str:
        return f"{'replace' if key == 'force' else self.name(key)}=True"

    def passphrase(self, layer: int) -> str:
        return f"passphrase={{{layer}: SECRET}}" if layer else "passphrase=SECRET"


PLUGIN: Final = _Plugin()
COMMAND: Final = _Command()
LIBRARY: Final = _Library()
