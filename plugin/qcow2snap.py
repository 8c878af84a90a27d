"""nbdkit plugin that serves the internal snapshots of a qcow2 image, read-only.

    nbdkit python plugin/qcow2snap.py file=disk.qcow2 snapshot=nightly

The callbacks below are in the order of their life in nbdkit; what they do is in the package
qcow2snap_core, beside this folder in a checkout and among Python's packages when installed.
"""

import errno
import os
import sys
import threading

import nbdkit

_checkout = os.path.dirname(os.path.dirname(os.path.realpath(__file__)))
if os.path.isdir(os.path.join(_checkout, "qcow2snap_core")):
    sys.path.insert(0, _checkout)

from qcow2snap_core import __version__  # noqa: E402
from qcow2snap_core._native.loaded import ENGINE, MISSING  # noqa: E402
from qcow2snap_core.decode import codecs  # noqa: E402
from qcow2snap_core.errors import UsageError, shown  # noqa: E402
from qcow2snap_core.format.choosing import choose  # noqa: E402
from qcow2snap_core.format.snapshots import Snapshot  # noqa: E402
from qcow2snap_core.image.disk import Disk  # noqa: E402
from qcow2snap_core.image.image import Image  # noqa: E402
from qcow2snap_core.serve.exports import Export, default, exports_of, find  # noqa: E402
from qcow2snap_core.serve.malloc import share_heaps  # noqa: E402
from qcow2snap_core.serve.settings import Settings  # noqa: E402
from qcow2snap_core.serve.threadstate import KeptThreadState  # noqa: E402

API_VERSION = 2

# Requests of one connection in parallel need threads whose Python state can be kept, and an nbdkit
# that survives a client which goes away with several in flight: 1.32 aborts, 1.42 does not, and
# this function tells them apart.
PARALLEL = ENGINE is not None and ENGINE.KEEPS_THREADS and hasattr(nbdkit, "peer_tls_dn")
MOST_EXPORTS = 10_000  # nbdkit_add_export refuses more
MAX_BLOCK = 0xFFFFFFFF  # "no maximum"
MIN_PREFERRED = 4096

_settings = Settings()
_image: Image
# A table of 65,536 snapshots takes some 50 MiB in memory: for one new connection, not for each.
_one_at_a_time = threading.Lock()
_pinned: tuple[Snapshot, Disk] | None = None  # with snapshot=; the disk keeps its caches warm


def _reported(callback):
    """What it raises is one line in nbdkit's log.  pread and extents see to that themselves, since
    another call costs each request."""

    def called(*arguments):
        try:
            return callback(*arguments)
        except Exception:
            _report()
            raise

    return called


def _answered(callback):
    """The same for a client's first requests.  nbdkit sends a client that it refuses the last line
    of the log (since 1.42, and in distributions' older ones): what the client got wrong is told,
    but no path of this host."""

    def called(*arguments):
        try:
            return callback(*arguments)
        except Exception as e:
            _report()
            if not isinstance(e, UsageError | MemoryError):
                from qcow2snap_core.serve.reports import kept_from_client

                raise kept_from_client(e) from None
            raise

    return called


def _report():
    # Imported here: what it needs takes a quarter of the whole start.
    try:
        from qcow2snap_core.serve.reports import in_one_line
    except MemoryError:  # of which there may not be enough even for that
        raise MemoryError("out of memory") from None

    in_one_line()


def _preload():
    """Import what words an error while there is memory for it."""
    try:
        _report()
    except MemoryError:
        return  # the first error tries again


# Started by the first client, and long enough to keep out of the way of its first bytes.
_preloading = threading.Timer(1.0, _preload)
_preloading.daemon = True


def dump_plugin():
    from qcow2snap_core.decode import encryption

    print(f"qcow2snap_version={__version__}")
    print(f"qcow2snap_native={'no' if ENGINE is None else 'yes'}")
    optional = codecs.available()
    optional["luks"] = encryption.available()
    optional["gcrypt"] = encryption.gcrypt_available()
    for what, there in optional.items():
        print(f"qcow2snap_{what}={'yes' if there else 'no'}")
    sys.stdout.flush()


@_reported
def config(key, value):
    _settings.set(key, value)


@_reported
def config_complete():
    global _image, _pinned
    share_heaps()
    if MISSING:
        print(f"qcow2snap: {MISSING}", file=sys.stderr)
    _image = _settings.open_image()
    if _image.header.dirty:
        why = "its refcounts may be wrong, its snapshots do not depend on them"
        print(f"qcow2snap: {shown(_image.path)} is marked dirty: {why}", file=sys.stderr)
    choice = _settings.choice
    if choice is not None:
        snapshot = choose(_image.table(), choice, _image.path)
        _pinned = snapshot, _image.disk(snapshot)


def thread_model():
    if PARALLEL:
        return nbdkit.THREAD_MODEL_PARALLEL
    # One request at a time per connection, on that connection's thread: see threadstate.py.
    return nbdkit.THREAD_MODEL_SERIALIZE_REQUESTS


def _snapshots():
    """Those that are served, as of now."""
    if _pinned is None:
        return _image.snapshots
    snapshot, disk = _pinned
    disk.confirm()
    return (snapshot,)


@_answered
def list_exports(readonly, is_tls):
    with _one_at_a_time:
        return [(e.name, e.description) for e in exports_of(_snapshots())[:MOST_EXPORTS]]


@_answered
def default_export(readonly, is_tls):
    with _one_at_a_time:
        return default(exports_of(_snapshots())) or ""


class Connection:
    """One client's open export."""

    __slots__ = ("disk", "export", "kept", "reader")

    def __init__(self, export: Export) -> None:
        self.export = export
        self.disk = _image.disk(export.snapshot, export.vm_state)
        self.reader = self.disk.reader
        self.kept = None if PARALLEL else KeptThreadState()


@_answered
def open(readonly):  # noqa: A001 (nbdkit's name)
    try:
        name = nbdkit.export_name()
    except UnicodeDecodeError:
        raise UsageError("a client asked for an export name that is not UTF-8") from None
    except RuntimeError:
        name = ""  # a filter opens it before there is a client: ext2 does since 1.44
    with _one_at_a_time:
        snapshots = _snapshots()
        export = find(exports_of(snapshots), snapshots, name)
        del snapshots
        connection = Connection(export)
        if _preloading.ident is None:
            _preloading.start()
    return connection


def export_description(h):
    return h.export.description


def get_size(h):
    return h.disk.size


def block_size(h):
    return 1, max(MIN_PREFERRED, h.disk.cluster_size), MAX_BLOCK


def is_rotational(h):
    return False


def can_multi_conn(h):
    return True


def can_extents(h):
    return True


def can_cache(h):
    return nbdkit.CACHE_NATIVE


def pread(h, buf, offset, flags):
    try:
        h.disk.pread_into(buf, offset)
    except Exception:
        nbdkit.set_error(errno.EIO)
        _report()
        raise


if ENGINE is not None:
    pread = ENGINE.callback(pread)  # asks h.reader first


def extents(h, count, offset, flags):
    try:
        answer = h.disk.extents(offset, count)
        return [next(answer)] if flags & nbdkit.FLAG_REQ_ONE else list(answer)
    except Exception:
        nbdkit.set_error(errno.EIO)
        _report()
        raise


@_reported
def cache(h, count, offset, flags):
    h.disk.prefetch(offset, count)


def close(h):
    if h.kept is not None:
        h.kept.release()
