"""Configuration of the documentation site; `make docs` builds it in out/docs."""

from __future__ import annotations

import importlib.metadata
import os
import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # notebooks use the embedded model only
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
# tqdm asks for ipywidgets, which a static page has no use for.
os.environ.setdefault("PYTHONWARNINGS", "ignore:IProgress not found")

project = "avl-analysis"
author = "The avl-analysis contributors"
copyright = "the avl-analysis contributors, Apache-2.0"
release = importlib.metadata.version("avl-analysis")
extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
]
html_theme = "furo"
html_title = "avl-analysis"
html_static_path = ["_static"]
html_css_files = ["site.css"]
exclude_patterns = ["_build", "Thumbs.db"]

myst_enable_extensions = ["colon_fence", "deflist", "fieldlist"]
myst_heading_anchors = 3
nb_execution_mode = "force"
nb_execution_timeout = 600
nb_execution_raise_on_error = True
nb_execution_in_temp = True
nb_merge_streams = True
nb_execution_show_tb = True

autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_default_options = {"members": True, "show-inheritance": True}
napoleon_google_docstring = True
napoleon_numpy_docstring = False
# Types of other projects are written as they are; there is no network to look their pages up.
suppress_warnings = ["ref.python", "mystnb.unknown_mime_type"]


def setup(app):  # type: ignore[no-untyped-def]
    """Write the generated pages and pictures before the sources are read."""
    import generate

    app.connect("builder-inited", lambda _: generate.main(HERE))
    # before sphinx.ext.viewcode, which is at 500
    app.connect("html-collect-pages", _forget_modules_without_source, priority=400)


def _forget_modules_without_source(app):  # type: ignore[no-untyped-def]
    """Its list of modules would link to pages that viewcode does not write (`builtins`)."""
    modules = getattr(app.env, "_viewcode_modules", {})
    for name in [name for name, entry in modules.items() if not entry]:
        del modules[name]
    return []
