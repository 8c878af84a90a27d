"""An nbdkit plugin that serves a file and lies: nbdkit's evil filter, which Debian 12 lacks.

    nbdkit python evil.py file=disk.qcow2 bits=200 seed=1 [when=PATH] [where=OFFSET-END,…] [rays=1]

``bits`` of the file are the other way round, always the same ones; with ``rays`` others in each
read.  ``when``: only while that file is there.  ``where``: in these ranges alone.
"""

import itertools
import os
import random

API_VERSION = 2
_keys = {}
_reads = itertools.count()


def config(key, value):
    _keys[key] = value


def thread_model():
    import nbdkit

    return nbdkit.THREAD_MODEL_PARALLEL


def open(readonly):  # noqa: A001 (nbdkit's name)
    return os.open(_keys["file"], os.O_RDONLY)


def close(h):
    os.close(h)


def get_size(h):
    return os.fstat(h).st_size


def _ranges(size):
    if "where" not in _keys:
        return [(0, size)]
    return [tuple(map(int, part.split("-"))) for part in _keys["where"].split(",")]


def _flips(size):
    """(offset, bit) of each."""
    rng = random.Random(f"{_keys['seed']} {next(_reads) if 'rays' in _keys else 0}")
    ranges = _ranges(size)
    for _ in range(int(_keys["bits"])):
        begin, end = rng.choice(ranges)
        yield rng.randrange(begin, end), rng.randrange(8)


def pread(h, buf, offset, flags):
    data = bytearray(os.pread(h, len(buf), offset))
    if "when" not in _keys or os.path.exists(_keys["when"]):
        for at, bit in _flips(os.fstat(h).st_size):
            if offset <= at < offset + len(data):
                data[at - offset] ^= 1 << bit
    buf[:] = data
