"""Sphinx extension: what a docstring writes in short is a link or a formula on the page of the code.

A label such as ``eq-knn_entropy-ball`` becomes a link to the equation. The build fails when the book has no equation of
that label, so that code and text cannot drift apart. A power in running text, such as e^{-U} or R^d, is drawn as one.
"""

import re

LABEL = re.compile(r"``((?:eq|def)-[a-z0-9_-]+)``")
POWER = re.compile(
    r"``[^`]+``|`[^`]+`"  # quoted, or the argument of a role
    r"|^(?P<indent> *)\.\. math::.*(?:\n(?:(?P=indent) +\S.*| *$))*"  # a displayed formula
    r"|(?P<power>\b[A-Za-z]\^(?:\{[^{}]*\}|\w\b))",
    re.MULTILINE,
)


def written_out(text: str) -> str:
    """Rewrite the labels and powers of a docstring; what is quoted or stands in a formula stays."""
    text = LABEL.sub(r"equation :eq:`\1`", text)
    return POWER.sub(lambda found: f":math:`{found['power']}`" if found["power"] else found[0], text)


def link_labels(app, what, name, obj, options, lines):
    """Rewrite the lines of one docstring."""
    lines[:] = written_out("\n".join(lines)).split("\n")


def setup(app):
    """Register the extension."""
    app.connect("autodoc-process-docstring", link_labels)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
