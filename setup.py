"""For pip: the native engine, which is left out where it cannot be compiled.  All else is in
pyproject.toml."""

import sys
from glob import glob

from setuptools import Extension, setup

engine = Extension(
    "qcow2snap_core._native.engine",
    sorted(glob("qcow2snap_core/_native/*.c")),
    depends=["qcow2snap_core/_native/engine.h"],
    extra_compile_args=["-std=gnu11", "-fvisibility=hidden"],
    py_limited_api=True,
    optional=True,
)
if "t" in sys.abiflags:  # free-threaded: see qcow2snap_core/_native/loaded.py
    setup()
else:
    setup(ext_modules=[engine], options={"bdist_wheel": {"py_limited_api": "cp311"}})
