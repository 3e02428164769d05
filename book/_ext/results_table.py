"""Sphinx extension: tables and plots drawn from recorded runs, so that no measured number is typed by hand.

.. code-block:: none

    ```{results-table} autoencoder eae
    :record: mnist-medium
    :rows: squared error; Fréchet, N(0, I)
    The caption, in MyST.
    ```

has a column for each model, read from ``book/results/<model>/<record>.json``, and a row for each metric (all of
them without ``:rows:``); ``:transpose:`` exchanges the two. The line below it says on what the runs were made, and by
which commands.

.. code-block:: none

    ```{results-curves} vae_k1 iwae_k50
    :record: mnist-medium
    :curve: NLL of some test images
    :alt: alternative text
    The caption, in MyST.
    ```

plots a curve of each record against the epochs, or several with ``; `` between their names (``:axis: steps`` where
an epoch is a step), and

.. code-block:: none

    ```{results-all}
    ```

shows all records that there are: for each set of runs that can stand side by side a table, a plot of the metrics with
several sources of codes, and folded up what the runs cost, and a picture of samples of each model.
"""

import itertools
import os
from pathlib import Path

from docutils import nodes
from docutils.parsers.rst import directives
from docutils.statemachine import StringList
from sphinx.util.docutils import SphinxDirective

from gae_core import records

RESULTS = "book/results"


class Parsing(SphinxDirective):
    """A directive that writes MyST and has it read."""

    def parse(self, text: str) -> list[nodes.Node]:
        """Nodes of a text in MyST."""
        box = nodes.Element()
        self.state.nested_parse(StringList(text.split("\n"), self.name), self.content_offset, box)
        return box.children


class ResultsTable(Parsing):
    """The ``results-table`` directive: arguments are the models, options the record and its rows."""

    required_arguments = 1
    optional_arguments = 40
    has_content = True
    option_spec = {  # noqa: RUF012
        "record": directives.unchanged_required,
        "rows": directives.unchanged_required,
        "name": directives.unchanged,
        "transpose": directives.flag,
    }

    def run(self):
        """Return the table node and the paragraph on where the numbers come from."""
        found = []
        for model in self.arguments:
            file = f"{RESULTS}/{model}/{self.options['record']}.json"
            path = Path(self.env.srcdir) / file
            if not path.exists():
                raise self.error(f"results-table: there is no {file}; `python -m gae_core run {model}` makes it")
            self.env.note_dependency(str(path))
            found.append(records.check(path))
        rows = self.options.get("rows")
        try:
            rows = rows and [row.strip() for row in rows.split(";")]
            lines = records.table(found, rows, transpose="transpose" in self.options)
            below = self.parse(records.origin(found))
        except ValueError as error:
            raise self.error(f"results-table: {error}") from error
        table = next(node for node in self.parse(lines) if isinstance(node, nodes.table))
        caption = self.parse("\n".join(self.content))
        table.insert(0, nodes.title("", "", *(caption[0].children if caption else [])))
        self.add_name(table)
        return [table, *below]


class ResultsAll(Parsing):
    """The ``results-all`` directive: everything in ``book/results``."""

    def run(self):
        """Return what :class:`ResultsTable` and figures make of each group of records."""
        folder = Path(self.env.srcdir) / RESULTS
        self.env.note_reread()  # a new record is no change of a page that names none
        page = Path(self.env.doc2path(self.env.docname)).parent
        groups = records.groups(folder)
        if not groups:
            return self.parse("There is no recorded run yet. `python -m gae_core run all` makes them.")
        text = []
        for i, (title, group) in enumerate(groups.items()):
            stem = f"{group[0]['data']}-{group[0]['size']}"
            names = [record["model"] for record in group]
            text += [f"```{{rubric}} {title}\n```"]
            options = f":record: {stem}\n" + (":transpose:\n" if len(names) > 5 else "")
            text += [f"```{{results-table}} {' '.join(names)}\n{options}{title}: all metrics.\n```"]
            plot = Path(self.env.app.outdir).parent / "results_plots" / f"{stem}-{i}.png"
            if draw(group, plot):
                caption = "Mean over seeds with its standard error. The dashed line is what real images get."
                alt = (
                    f"Fréchet distance by source of the codes, for {', '.join(names)}; the table above has the numbers."
                )
                text.append(figure(plot, page, alt, f"{title}. {caption}"))
            more = [cost(group)]
            for name in names:
                picture = folder / name / f"{stem}.png"
                if picture.exists():
                    alt = f"Images from the model {name}, in one grid for each source of codes."
                    caption = f"{name.replace('_', ' ')}: images of its first seed from each source of codes."
                    more.append(figure(picture, page, alt, caption))
            body = "\n\n".join(more)
            text.append(f"````{{dropdown}} What the runs took{', and images' * (len(more) > 1)}\n\n{body}\n````")
        return self.parse("\n\n".join(text))


class ResultsCurves(Parsing):
    """The ``results-curves`` directive: arguments are the models, options the record, its curve and the text for it."""

    required_arguments = 1
    optional_arguments = 40
    has_content = True
    option_spec = dict.fromkeys(("record", "curve", "axis", "alt"), directives.unchanged_required)

    def run(self):
        """Return the figure."""
        stem, curve = self.options["record"], self.options["curve"]
        source = Path(self.env.srcdir)
        paths = [source / RESULTS / model / f"{stem}.json" for model in self.arguments]
        for path in paths:
            self.env.note_dependency(str(path))
        try:
            found = [records.check(path) for path in paths]
            plot = Path(self.env.app.outdir).parent / "results_plots" / f"{stem}-curves-{'-'.join(self.arguments)}.png"
            draw_curves(found, curve, plot, axis=self.options.get("axis", "epochs"))
        except (KeyError, OSError, ValueError) as error:
            raise self.error(f"results-curves: no {curve!r} of {', '.join(self.arguments)}: {error}") from error
        page = Path(self.env.doc2path(self.env.docname)).parent
        return self.parse(figure(plot, page, self.options["alt"], "\n".join(self.content)))


def figure(path: Path, page: Path, alt: str, caption: str) -> str:
    """A figure in MyST."""
    return f"```{{figure}} {Path(os.path.relpath(path, page)).as_posix()}\n:alt: {alt}\n\n{caption}\n```"


def cost(group: list[dict]) -> str:
    """What the runs of a group took, as a table in Markdown."""
    of = {r.get("peak memory of", "") for r in group}
    whose = f" of {of.pop()}" if len(of) == 1 and "" not in of else ""
    lines = [f"| | samples a second | training, s | peak memory{whose}, MiB | commit |", "|---|---:|---:|---:|---|"]
    for r in group:
        peak = r["peak memory, MiB"]
        lines.append(
            f"| {r['model'].replace('_', ' ')} | {r['samples a second']:,.0f} | {r['training seconds']:,.0f} "
            f"| {'–' if peak is None else f'{peak:,.0f}'} | {r['commit'] or '–'} |"
        )
    return "\n".join(lines)


def draw(group: list[dict], path: Path) -> bool:
    """Draw the Fréchet distances that all of a group have, with standard errors; False if there are none."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot as plt

    start, real = "Fréchet, ", "Fréchet, real images"
    shared = [key for key in group[0]["metrics"] if all(key in record["metrics"] for record in group)]
    rows = [key for key in shared if key.startswith(start) and key != real]
    if not rows:
        return False
    fig, ax = plt.subplots(figsize=(7, 1.2 + 0.5 * len(rows)), layout="constrained")
    for i, record in enumerate(group):
        found = [record["metrics"][row] for row in rows]
        at = [y + 0.15 * (i - (len(group) - 1) / 2) for y in range(len(rows))]
        error = [m["standard error"] or 0 for m in found]
        label = record["model"].replace("_", " ")
        ax.errorbar([m["mean"] for m in found], at, xerr=error, fmt="o", ms=4, capsize=3, label=label)
    if real in group[0]["metrics"]:
        ax.axvline(group[0]["metrics"][real]["mean"], color="grey", linestyle="--", linewidth=1)
    ax.set(yticks=range(len(rows)), yticklabels=[row.removeprefix(start) for row in rows], xscale="log")
    ax.set_xlabel("Fréchet distance in the features of the classifier")
    ax.invert_yaxis()
    ax.legend(fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    fig.savefig(path, dpi=100)
    plt.close(fig)
    return True


def draw_curves(found: list[dict], curve: str, path: Path, *, axis: str = "epochs") -> None:
    """Draw a curve of each record and seed against the epochs, or several with "; " between their names."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot as plt

    fig, ax = plt.subplots(figsize=(6.5, 3.4), layout="constrained")
    names = curve.split("; ")
    for i, (record, name) in enumerate(itertools.product(found, names)):
        model = record["model"].replace("_", " ")
        text = model if len(names) == 1 else name if len(found) == 1 else f"{model}: {name}"
        for seed, values in enumerate(record["curves"][name]):
            epochs = [record["epochs"] * (step + 1) / len(values) for step in range(len(values))]
            ax.plot(epochs, values, ".-", color=f"C{i}", markersize=4, label=text if seed == 0 else None)
    ax.set(xlabel=axis, ylabel=curve if len(names) == 1 else None)
    ax.legend(fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    fig.savefig(path, dpi=100)
    plt.close(fig)


def setup(app):
    """Register the directives."""
    app.add_directive("results-table", ResultsTable)
    app.add_directive("results-all", ResultsAll)
    app.add_directive("results-curves", ResultsCurves)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
