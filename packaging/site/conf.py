"""Sphinx's configuration for the site; build.py has what goes into it."""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from qcow2snap_core import __version__  # noqa: E402

project = "qcow2snap"
copyright = "2026, the qcow2snap contributors"  # noqa: A001 (Sphinx's name)
version = release = __version__

extensions = ["myst_parser"]
myst_heading_anchors = 3
# The documents show what programs print, which is not always what a highlighter expects.
suppress_warnings = ["misc.highlighting_failure"]
highlight_language = "none"
smartquotes = False  # "--json" is to stay what one types

html_theme = "furo"
html_title = f"qcow2snap {version}"
html_copy_source = False
html_show_sphinx = False
