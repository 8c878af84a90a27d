"""The common case of a request in C; optional, loaded by :mod:`qcow2snap_core._native.loaded`."""
