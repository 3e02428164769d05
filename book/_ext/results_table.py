"""Sphinx extension: a table drawn from recorded runs, so that no measured number is typed by hand.

.. code-block:: none

    ```{results-table} autoencoder eae
    :record: mnist-medium
    :rows: squared error; Fréchet, N(0, I)
    The caption, in MyST.
    ```

has a column for each model, read from ``book/results/<model>/<record>.json``, and a row for each metric. The
line below it says on what the runs were made, and by which commands.
"""

import json
import math
from pathlib import Path

from docutils import nodes
from docutils.parsers.rst import directives
from docutils.statemachine import StringList
from sphinx.util.docutils import SphinxDirective


def cell(metric: dict) -> str:
    """Mean and standard error, rounded to the first two digits of the error (three of the mean where there is none)."""
    mean, error = metric["mean"], metric["standard error"]
    smallest = error or abs(mean) / 10
    digits = 0 if smallest == 0 else max(0, 1 - math.floor(math.log10(smallest)))
    text = f"{mean:,.{digits}f}"
    return text if error is None else f"{text} ± {error:.{digits}f}"


class ResultsTable(SphinxDirective):
    """The ``results-table`` directive: arguments are the models, options the record and its rows."""

    required_arguments = 1
    optional_arguments = 20
    has_content = True
    option_spec = {  # noqa: RUF012
        "record": directives.unchanged_required,
        "rows": directives.unchanged_required,
        "name": directives.unchanged,
    }

    def run(self):
        """Return the table node and the paragraph on where the numbers come from."""
        records = {}
        for model in self.arguments:
            file = f"book/results/{model}/{self.options['record']}.json"
            path = Path(self.env.srcdir) / file
            if not path.exists():
                raise self.error(f"results-table: there is no {file}; `python -m gae_core run {model}` makes it")
            self.env.note_dependency(str(path))
            records[model] = json.loads(path.read_text(encoding="utf-8"))
        rows = [row.strip() for row in self.options["rows"].split(";")]
        for model, record in records.items():
            if missing := [row for row in rows if row not in record["metrics"]]:
                raise self.error(f"results-table: {model} has no {missing}; it has {list(record['metrics'])}")

        lines = ["| | " + " | ".join(model.replace("_", " ") for model in records) + " |"]
        lines.append("|---|" + "---:|" * len(records))
        lines += [f"| {row} | " + " | ".join(cell(r["metrics"][row]) for r in records.values()) + " |" for row in rows]
        box = nodes.Element()
        self.state.nested_parse(StringList(lines, "results-table"), self.content_offset, box)
        table = next(box.findall(nodes.table))
        text = nodes.Element()
        self.state.nested_parse(self.content, self.content_offset, text)
        table.insert(0, nodes.title("", "", *(text[0].children if text.children else [])))
        self.add_name(table)
        return [table, nodes.paragraph("", "", *self._origin(list(records.values())))]

    @staticmethod
    def _origin(records: list[dict]) -> list[nodes.Node]:
        first = records[0]
        alike = ("device", "epochs", "seeds", "data", "torch", "date")
        if any(r[key] != first[key] for r in records for key in alike[:4]):
            raise ValueError(f"results-table: the records differ in one of {', '.join(alike[:4])}: not one table")
        seconds = sum(r["training seconds"] for r in records)
        told = (
            f"Device: {first['device']}. Data: {first['data']}. Epochs: {first['epochs']}. "
            f"Seeds: {', '.join(map(str, first['seeds']))}. Training in all: {seconds / 60:.0f} minutes. "
            f"torch {first['torch']}, {first['date']}. Made by "
        )
        out: list[nodes.Node] = [nodes.Text(told)]
        for i, record in enumerate(records):
            out += [nodes.Text(", " if i else ""), nodes.literal("", record["command"])]
        return [*out, nodes.Text(".")]


def setup(app):
    """Register the directive."""
    app.add_directive("results-table", ResultsTable)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
