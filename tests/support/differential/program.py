"""The commands that make a seed's image: generated from a model of it, kept as command lines.

The model knows sizes and names only, to make most commands ones that succeed.  Where it is
mistaken QEMU refuses the command, and nothing is lost.

Two faults of QEMU 7.2 are kept away from.  It loses a write-zeroes beside a copy-on-write in one
cluster with extended L2 entries, so there are no asynchronous writes.  It goes on to pack
compressed clusters into one that was freed meanwhile, so they are written by a process of their
own.
"""

from __future__ import annotations

import random
import shlex
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from support import secret
from support.qemu import KiB

from . import steps
from .geometry import Layer, random_layers

#: A command line, run in the directory of the images.  "noise NAME SEED LENGTH" and "vm-state IMAGE
#: SNAPSHOT LENGTH" are our own (:mod:`.steps`).
Step = tuple[str, ...]

_COMMAND = Path(__file__).resolve().parents[2] / "differential.py"

_NOISES = 2
_KILLED = "sigraise 9"  # as the last command of qemu-io
_NAMES = ("first", "second", "third", "a b", "2", "ümlaut", "a:b,c=d", "x%2F", "first")


@dataclass(frozen=True)
class Program:
    """What a seed does."""

    seed: int
    layers: tuple[Layer, ...]  # as they are created, the topmost first
    steps: tuple[Step, ...]
    features: frozenset[str]

    @property
    def secrets(self) -> list[str | None]:
        """The passphrases in the chain, from the top down."""
        return [layer.secret for layer in self.layers]

    def script(self) -> str:
        """The same for a shell."""
        ours = (sys.executable, str(_COMMAND), "--do")
        lines = [(*ours, *step) if step[0] in steps.OWN else step for step in self.steps]
        return "".join(f"{shlex.join(line)}\n" for line in lines)

    def with_steps(self, steps: Sequence[Step]) -> Program:
        return replace(self, steps=tuple(steps))


def generate(seed: int) -> Program:
    """Always the same one."""
    return _Generator(seed).program()


def opened(layers: Sequence[Layer], tool: Sequence[str]) -> list[str]:
    """A tool's command line as far as the image: the first of these layers."""
    secrets = [layer.secret for layer in layers]
    if not any(secrets):
        return [*tool, "-f", layers[0].fmt, layers[0].name]
    return [*tool, *secret.objects(secrets), *secret.opened(Path(layers[0].name), secrets)]


class _Generator:
    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.rng = random.Random(f"program {seed}")
        self.layers = random_layers(self.rng)
        self.steps: list[Step] = []
        self.features = {f for layer in self.layers for f in layer.features()}
        self.snapshots: list[tuple[str, int]] = []  # of the layer at work: name, disk size
        self.size = 0

    def program(self) -> Program:
        rng = self.rng
        self.features.add(f"{len(self.layers)} layers")
        if len({layer.size for layer in self.layers}) > 1:
            self.features.add("layers of unequal length")
        if self.layers[-1].fmt == "raw":
            self.features.add("raw backing file")
        for n in range(_NOISES):
            self._noise(f"noise{n}", rng.randrange(1000, 100 * KiB))
        for number in reversed(range(len(self.layers))):
            chain = self.layers[number:]
            self._create(chain)
            rounds = rng.randrange(1, 5) if number == 0 else rng.randrange(2)
            for _ in range(rounds):
                self._change(chain, top=number == 0)
                self._snapshot(chain)
            if number == 0 or rng.random() < 0.8:
                self._write(chain, top=number == 0)
        return Program(self.seed, tuple(self.layers), tuple(self.steps), frozenset(self.features))

    # --- The parts ---

    def _noise(self, name: str, length: int) -> None:
        self._add("noise", name, str(self.rng.randrange(1 << 32)), str(length))

    def _create(self, chain: Sequence[Layer]) -> None:
        layer = chain[0]
        self.snapshots, self.size = [], layer.size
        if layer.fmt == "raw":
            self._add("truncate", "-s", str(layer.size), layer.name)
            return
        options = dict(layer.options)
        objects: list[str] = []
        if layer.secret is not None:
            objects = secret.objects([layer.secret])
            options["encrypt.key-secret"] = "s0"
            if options["encrypt.format"] == "luks":
                options["encrypt.iter-time"] = "10"
        backing: list[str] = []
        if len(chain) > 1:
            # -u: the size is given, and a layer with a secret could not be opened.
            backing = ["-u", "-b", chain[1].name, "-F", chain[1].fmt]
        pairs = ",".join(f"{k}={v}" for k, v in options.items())
        line = ["qemu-img", "create", "-q", *objects, "-f", "qcow2", *backing]
        self._add(*line, *(["-o", pairs] if pairs else []), layer.name, str(layer.size))

    def _change(self, chain: Sequence[Layer], *, top: bool) -> None:
        """A round of work: writes, and sometimes something rarer."""
        rng, layer = self.rng, chain[0]
        if layer.fmt == "raw":
            self._write(chain, top=top)
            return
        rare = {
            self._resize: 0.3,
            self._bitmap: 0.15 if layer.version == 3 and not layer.secret else 0,
            self._amend: 0.06 if not layer.secret else 0,
            self._vm_state: 0.12 if top and not layer.secret else 0,
            self._commit: 0.12 if top and len(chain) > 1 else 0,
            self._rebase: 0.15 if top and not any(c.secret for c in chain[1:]) else 0,
        }
        for step, chance in rare.items():
            if rng.random() < chance:
                step(chain)
        if rng.random() < 0.35 and not layer.has_data_file:
            self._compress(chain)
        self._write(chain, top=top)

    def _write(self, chain: Sequence[Layer], *, top: bool) -> None:
        commands = [self._command(chain[0]) for _ in range(self.rng.randrange(3, 12))]
        if chain[0].option("extended_l2") and self.rng.random() < 0.5:
            commands += self._neighbours(chain[0])
        if top and self.rng.random() < 0.06:  # QEMU leaves it dirty, or with leaks
            self.features.add("QEMU killed")
            commands += ["flush"] * self.rng.randrange(2) + [_KILLED]
        self._io(chain, commands)

    def _compress(self, chain: Sequence[Layer]) -> None:
        """Over clusters that were discarded, most of them: QEMU refuses it on allocated ones."""
        rng, cluster = self.rng, chain[0].cluster
        self.features.add(f"compression {chain[0].option('compression_type', 'zlib')}")
        starts = sorted({rng.randrange(-(-self.size // cluster)) for _ in range(6)})
        where = [f"{at * cluster} {min(cluster, self.size - at * cluster)}" for at in starts]
        self._io(chain, [f"discard {w}" for w in where if rng.random() < 0.8])
        self._io(chain, [f"write -c {self._data()} {w}" for w in where])

    def _snapshot(self, chain: Sequence[Layer]) -> None:
        layer = chain[0]
        if layer.fmt == "raw" or layer.has_data_file:
            return
        name = self._new_name()
        self._add(*self._img(chain, "snapshot", "-c", name))
        self.snapshots.append((name, self.size))
        kind = self.rng.random()
        if kind < 0.12:
            gone = self.rng.choice(self.snapshots)
            self.snapshots.remove(gone)
            self.features.add("snapshot deleted")
            self._add(*self._img(chain, "snapshot", "-d", gone[0]))
        elif kind < 0.25:
            name, size = self.rng.choice(self.snapshots)
            self.size = size
            self.features.add("snapshot applied")
            self._add(*self._img(chain, "snapshot", "-a", name))

    # --- What is rarer ---

    def _resize(self, chain: Sequence[Layer]) -> None:
        rng, layer = self.rng, chain[0]
        if layer.version == 2 and self.snapshots:
            return
        size = max(512, int(self.size * rng.choice((0.3, 0.7, 0.95, 1.02, 1.4, 2))) & -512)
        size = size & -layer.cluster or size if rng.random() < 0.2 else size
        options = ["-q", "--shrink"] if size < self.size else ["-q"]
        self.features.add("shrunk" if size < self.size else "grown")
        if size > self.size and rng.random() < 0.15:
            options.append(f"--preallocation={rng.choice(('metadata', 'falloc', 'full'))}")
            self.features.add("grown with preallocation")
        line = opened(chain, ["qemu-img", "resize", *options])
        self._add(*line, str(size))
        self.size = size

    def _bitmap(self, chain: Sequence[Layer]) -> None:
        name = self.rng.choice(("b0", "b1"))
        what = self.rng.choice((("--add",), ("--add", "-g", "64k"), ("--disable",), ("--remove",)))
        self.features.add("bitmaps")
        self._add("qemu-img", "bitmap", *what, chain[0].name, name)

    def _amend(self, chain: Sequence[Layer]) -> None:
        # Not to compat=0.10: QEMU 7.2 then loses what snapshots share.
        choices = ["compat=1.1"]
        if chain[0].version == 3:
            choices = ["lazy_refcounts=on", "lazy_refcounts=off", "refcount_bits=16"]
            choices += ["refcount_bits=64", "refcount_bits=8"]
        self.features.add("amended")
        self._add("qemu-img", "amend", "-q", "-o", self.rng.choice(choices), chain[0].name)

    def _vm_state(self, chain: Sequence[Layer]) -> None:
        """What savevm does: the state first, then a snapshot that says how long it is."""
        rng = self.rng
        length = rng.randrange(1, 400) * 512
        self.features.add("VM state")
        self._io(chain, [f"write -b {self._data()} 0 {length}", "write -b -P 7 0 512"])
        name = f"vm{len(self.steps)}"
        self._add(*self._img(chain, "snapshot", "-c", name))
        self.snapshots.append((name, self.size))
        self._add("vm-state", chain[0].name, name, str(length))

    def _commit(self, chain: Sequence[Layer]) -> None:
        self.features.add("commit")
        keep = self.rng.choice(([], ["-d"]))
        self._add(*opened(chain, ["qemu-img", "commit", "-q", *keep]))

    def _rebase(self, chain: Sequence[Layer]) -> None:
        rng = self.rng
        onto = Layer(
            f"other{len(self.steps)}", rng.choice(("raw", "qcow2")), rng.randrange(1, 4000) * 512
        )
        unsafe = rng.choice(([], ["-u"]))
        if rng.random() < 0.3 and len(chain) > 1:
            self.features.add("rebase to nothing")
            self._add(*opened(chain[:1], ["qemu-img", "rebase", "-q", *unsafe, "-b", ""]))
            return
        self.features.add("unsafe rebase" if unsafe else "rebase")
        model = self.snapshots, self.size
        self._create([onto])
        self._write([onto], top=False)
        self.snapshots, self.size = model
        line = ["qemu-img", "rebase", "-q", *unsafe, "-b", onto.name, "-F", onto.fmt]
        self._add(*opened(chain[:1], line))

    # --- Small ones ---

    def _command(self, layer: Layer) -> str:
        """One of qemu-io."""
        rng = self.rng
        kind = rng.random()
        if kind < 0.6:
            return f"write {self._data()} {self._range(layer)}"
        if kind < 0.72:
            return f"write -z {self._range(layer)}"
        if kind < 0.85:
            return f"write -z -u {self._range(layer)}"
        return f"discard {self._range(layer)}"

    def _neighbours(self, layer: Layer) -> Iterator[str]:
        """Data and zeros side by side, in each of some clusters with extended L2 entries."""
        grain, count = layer.grain, self.size // layer.cluster
        for n in range(min(count, self.rng.randrange(1, 40))):
            at = n * layer.cluster + self.rng.randrange(31) * grain
            yield f"write {self._data()} {at} {grain}"
            yield f"write -z {at + grain} {grain}"

    def _data(self) -> str:
        if self.rng.random() < 0.4:
            return f"-P {self.rng.randrange(1, 256)}"
        return f"-s noise{self.rng.randrange(_NOISES)}"

    def _range(self, layer: Layer) -> str:
        """Of bytes on the disk: sectors, subclusters or clusters."""
        rng = self.rng
        grain = rng.choice((512, 4096, layer.grain, layer.cluster))
        start = rng.randrange(-(-self.size // grain)) * grain
        mean = rng.choice((1, 2 * layer.grain // grain + 1, max(1, self.size // grain // 6)))
        length = grain * (1 + int(rng.expovariate(1 / mean)))
        return f"{start} {min(length, self.size - start)}"

    def _new_name(self) -> str:
        number = len(self.steps)
        return self.rng.choice((f"s{number}",) * 8 + (f"{'long' * 50}{number}",) * 2 + _NAMES)

    def _img(self, chain: Sequence[Layer], *command: str) -> Iterator[str]:
        """qemu-img snapshot, which knows no -f."""
        tool = ["qemu-img", *command]
        if any(layer.secret for layer in chain):
            yield from opened(chain, tool)
        else:
            yield from (*tool, chain[0].name)

    def _io(self, chain: Sequence[Layer], commands: Sequence[str]) -> None:
        if commands:
            pairs = [x for c in commands for x in ("-c", c)]
            self._add(*opened(chain, ["qemu-io", *pairs]))

    def _add(self, *line: str) -> None:
        self.steps.append(line)
