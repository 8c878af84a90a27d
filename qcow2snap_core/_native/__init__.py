"""The common case of a request in C; optional, and used through :mod:`qcow2snap_core.native`."""
