"""``python3 -m qcow2snap_core`` is the command ``qcow2snap``."""

import sys

from .cli import command

sys.exit(command())
