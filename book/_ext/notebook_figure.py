"""Sphinx extension: show a figure of an executed notebook in a chapter.

.. code-block:: none

    ```{notebook-figure} eae fig-eae-samples
    :alt: what the picture shows, for those who cannot see it
    :width: 80%
    The caption, in MyST.
    ```

takes the PNG of the cell of ``notebooks/eae.ipynb`` whose ``mystnb`` metadata has that figure name. In the
chapter the figure is the target ``fig-eae-samples-chapter``; the name itself stays with the notebook's page.
"""

import base64
import json
import os
from pathlib import Path

from docutils import nodes
from docutils.parsers.rst import directives
from sphinx.util.docutils import SphinxDirective

PNG = "image/png"


def figures(notebook: dict) -> dict[str, str | None]:
    """Map each figure name in a notebook to its PNG, base64-encoded; None where the cell has drawn none."""
    found = {}
    for cell in notebook["cells"]:
        name = cell["metadata"].get("mystnb", {}).get("figure", {}).get("name")
        if name:
            outputs = [output.get("data", {}) for output in cell.get("outputs", [])]
            images = [data[PNG] for data in outputs if PNG in data]
            found[name] = "".join(images[-1]) if images else None
    return found


class NotebookFigure(SphinxDirective):
    """The ``notebook-figure`` directive: arguments are the topic and the name of the figure."""

    required_arguments = 2
    has_content = True
    option_spec = {  # noqa: RUF012
        "alt": directives.unchanged_required,
        "width": directives.length_or_percentage_or_unitless,
    }

    def run(self):
        """Write the PNG beside the build and return the figure node that shows it."""
        topic, name = self.arguments
        book = f"notebooks/{topic}.ipynb"
        make = f"run `make notebooks NOTEBOOK={topic}`"
        if not self.options.get("alt"):
            raise self.error(f"notebook-figure {name}: give it an :alt: text")
        if not self.content:
            raise self.error(f"notebook-figure {name}: the caption is missing")
        path = Path(self.env.srcdir) / book
        if not path.exists():
            raise self.error(f"notebook-figure {name}: there is no {book}; {make}")
        self.env.note_dependency(str(path))
        found = figures(json.loads(path.read_text(encoding="utf-8")))
        if name not in found:
            known = ", ".join(sorted(found)) or "none"
            raise self.error(f"notebook-figure: {book} has no figure {name}; it has: {known}")
        if found[name] is None:
            raise self.error(f"notebook-figure: the cell of {name} in {book} holds no PNG; {make}")

        image = Path(self.env.app.outdir).parent / "notebook_figures" / f"{name}.png"
        image.parent.mkdir(parents=True, exist_ok=True)
        image.write_bytes(base64.b64decode(found[name]))
        page = Path(self.env.doc2path(self.env.docname)).parent
        picture = nodes.image(uri=Path(os.path.relpath(image, page)).as_posix(), alt=self.options["alt"])
        if "width" in self.options:
            picture["width"] = self.options["width"]

        text = nodes.Element()
        self.state.nested_parse(self.content, self.content_offset, text)
        if not text.children or not isinstance(text[0], nodes.paragraph):
            raise self.error(f"notebook-figure {name}: the caption must begin with a paragraph")
        caption = nodes.caption(text[0].rawsource, "", *text[0].children)
        figure = nodes.figure("", picture, caption)
        if len(text) > 1:
            figure += nodes.legend("", *text.children[1:])
        figure["names"].append(nodes.fully_normalize_name(f"{name}-chapter"))
        self.set_source_info(figure)
        self.state.document.note_explicit_target(figure, figure)
        return [figure]


def setup(app):
    """Register the directive."""
    app.add_directive("notebook-figure", NotebookFigure)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
