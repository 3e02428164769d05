"""Sphinx extension: the book brings its own MathJax, so that its mathematics is drawn without a network.

The files come from the installed package sphinx-mathjax-offline. They are copied into the finished book and
not kept in a static folder of the source, because jupyter-book loads every script of such a folder on every
page.
"""

import shutil
from importlib.metadata import files
from pathlib import Path

PACKAGE = "sphinx-mathjax-offline"
MAIN = "static/mathjax/tex-svg.js"
EXTENSIONS = "static/mathjax/input/tex/extensions/"  # fetched by tex-svg.js when a page uses such a command


def copy_mathjax(app, exception):
    """Copy MathJax and its TeX extensions below ``_static/mathjax`` of a finished HTML build."""
    if exception is not None or app.builder.format != "html":
        return
    target = Path(app.outdir) / "_static" / "mathjax"
    for entry in files(PACKAGE) or []:
        name = entry.as_posix().partition("/")[2]
        if name == MAIN or (name.startswith(EXTENSIONS) and name.endswith(".js")):
            destination = target / name.removeprefix("static/mathjax/")
            if not destination.exists():
                destination.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(entry.locate(), destination)


def setup(app):
    """Register the extension."""
    app.connect("build-finished", copy_mathjax)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
