"""NBD URIs, and libnbd's Python module, which is loaded when it is first needed."""

from __future__ import annotations

import errno
import os

from ..errors import UsageError, escaped
from ..typed import Any, Final
from .local import from_here

#: Seconds for which a server may be silent when it should answer, unless a user says otherwise.
PATIENCE: Final = 30.0

_BYTES: Final[Any] = {"errors": "surrogateescape"}  # names of files need not be UTF-8


def libnbd() -> Any:
    """The module nbd.  Raises UsageError that names the package when it is missing."""
    try:
        import nbd
    except ImportError:
        raise UsageError("libnbd's Python module is missing: install python3-libnbd") from None
    return nbd


def message_of(error: Any, uri: str = "") -> str:
    """What one of its errors says, without the name of the C function, nor what is secret in the
    URI: one that it cannot parse it repeats."""
    if error.errnum == errno.ESHUTDOWN:  # for which libc has the words of a socket
        return "the server is shutting down"
    text = str(error.string).partition(": ")[2] or str(error.string)
    return escaped(text.replace(uri, without_secrets(uri)) if uri else text)


def is_uri(path: str) -> bool:
    """Whether it names an NBD export rather than a file.  ``./nbd://x`` is a file."""
    scheme, separator, _ = path.partition("://")
    name, plus, transport = scheme.partition("+")
    if not separator or name not in ("nbd", "nbds"):
        return False
    return not plus or (transport.isascii() and transport.isalpha() and transport.islower())


def refuse_url(path: str) -> None:
    """Raises UsageError for the URL of something else than an NBD export, unless a file has that
    name.  The line has the scheme alone: behind it may be a password."""
    scheme, found, _ = path.partition("://")
    plain = scheme.isascii() and scheme[:1].isalpha() and scheme.replace("+", "").isalnum()
    if found and plain and not is_uri(path) and not os.path.lexists(path):
        raise UsageError(
            f"{scheme}:// is no URI of an NBD export: let nbdkit serve it, with its plugin curl, "
            f"ssh or S3, and give the URI of that, as docs/remote.md shows"
        )


def without_secrets(uri: str) -> str:
    """The URI without user, password and names of key files, or a path, on one line."""
    if not is_uri(uri):
        return escaped(uri)
    head, _, query = uri.partition("?")
    scheme, _, rest = head.partition("://")
    host, slash, export = rest.partition("/")
    socket = [f"?{field}" for field in query.split("&") if field.startswith("socket=")]
    return escaped(f"{scheme}://{host.rpartition('@')[2]}{slash}{export}{''.join(socket)}")


def absolute(uri: str) -> str:
    """The URI with absolute names of files, since nbdkit changes directory."""
    from urllib.parse import quote, unquote

    head, mark, query = uri.partition("?")
    fields = []
    for field in query.split("&"):
        key, equals, value = field.partition("=")
        if key in ("socket", "tls-certificates", "tls-psk-file") and value:
            value = quote(from_here(unquote(value, **_BYTES)), **_BYTES)
        fields.append(f"{key}{equals}{value}")
    return f"{head}{mark}{'&'.join(fields)}"
