"""Sphinx extension: a label such as ``eq-knn_entropy-ball`` in a docstring becomes a link to the equation.

The build fails when the book has no equation of that label, so that code and text cannot drift apart.
"""

import re

LABEL = re.compile(r"``((?:eq|def)-[a-z0-9_-]+)``")


def link_labels(app, what, name, obj, options, lines):
    """Rewrite the labels in the lines of one docstring."""
    lines[:] = [LABEL.sub(r"equation :eq:`\1`", line) for line in lines]


def setup(app):
    """Register the extension."""
    app.connect("autodoc-process-docstring", link_labels)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
