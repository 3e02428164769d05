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
an epoch is a step; ``:panels:`` gives each curve a panel of its own),

.. code-block:: none

    ```{results-plane} text_plain text_bn_0.7
    :record: he2019-medium
    :axes: MI; NLL
    :alt: alternative text
    The caption, in MyST.
    ```

places each record in the plane of two metrics, with its standard errors and its name, and

.. code-block:: none

    ```{results-all}
    ```

shows all records that there are: for each set of runs that can stand side by side a table, a plot of the metrics with
several sources of codes, and folded up what the runs cost, and a picture of samples of each model.
"""

import itertools
import os
from pathlib import Path

from claims import Reading, spoken
from docutils import nodes
from docutils.parsers.rst import directives
from docutils.statemachine import StringList
from sphinx.util.docutils import SphinxDirective

from gae_core import records
from gae_core.studies import registry

RESULTS = "book/results"
FRECHET, REAL = "Fréchet, ", "Fréchet, real images"


class Parsing(SphinxDirective):
    """A directive that writes MyST and has it read."""

    def parse(self, text: str) -> list[nodes.Node]:
        """Nodes of a text in MyST."""
        box = nodes.Element()
        self.state.nested_parse(StringList(text.split("\n"), self.name), self.content_offset, box)
        return box.children

    def alt(self) -> str:
        """The alternative text, with what its roles print.

        Raises:
            ValueError: if one of them cannot be printed.
        """
        reading = Reading(Path(self.env.srcdir) / RESULTS)
        text = spoken(self.options["alt"], reading)
        for path in reading.read:
            self.env.note_dependency(str(path))
        return text


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
                line = " The dashed line is what real images get." if REAL in group[0]["metrics"] else ""
                caption = f"{title}. Mean over seeds with its standard error.{line}"
                text.append(figure(plot, page, plotted(group), caption))
            more = [cost(group)]
            for record in group:
                picture = folder / record["model"] / f"{stem}.png"
                if picture.exists():
                    try:
                        alt, caption = pictured(record, about(record["model"]))
                    except ValueError as error:
                        raise self.error(f"results-all: {error}") from error
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
    option_spec["panels"] = directives.flag

    def run(self):
        """Return the figure."""
        stem, curve = self.options["record"], self.options["curve"]
        source = Path(self.env.srcdir)
        paths = [source / RESULTS / model / f"{stem}.json" for model in self.arguments]
        for path in paths:
            self.env.note_dependency(str(path))
        try:
            found = [records.check(path) for path in paths]
            names = "-".join([*self.arguments, *"".join(c if c.isalnum() else " " for c in curve).split()])
            plot = Path(self.env.app.outdir).parent / "results_plots" / f"{stem}-curves-{names}.png"
            draw = draw_panels if "panels" in self.options else draw_curves
            draw(found, curve, plot, axis=self.options.get("axis", "epochs"))
            alt = self.alt()
        except (KeyError, OSError, ValueError) as error:
            raise self.error(f"results-curves: {curve!r} of {', '.join(self.arguments)}: {error}") from error
        page = Path(self.env.doc2path(self.env.docname)).parent
        return self.parse(figure(plot, page, alt, "\n".join(self.content)))


class ResultsPlane(Parsing):
    """The ``results-plane`` directive: arguments are the models, options the record, two metrics, and text."""

    required_arguments = 1
    optional_arguments = 40
    has_content = True
    option_spec = dict.fromkeys(("record", "axes", "alt"), directives.unchanged_required)

    def run(self):
        """Return the figure."""
        stem, axes = self.options["record"], [axis.strip() for axis in self.options["axes"].split(";")]
        paths = [Path(self.env.srcdir) / RESULTS / model / f"{stem}.json" for model in self.arguments]
        for path in paths:
            self.env.note_dependency(str(path))
        plot = Path(self.env.app.outdir).parent / "results_plots" / f"{stem}-plane-{self.arguments[0]}.png"
        try:
            draw_plane([records.check(path) for path in paths], *axes, plot)
            alt = self.alt()
        except (KeyError, OSError, TypeError, ValueError) as error:
            raise self.error(f"results-plane: {axes} of {', '.join(self.arguments)}: {error}") from error
        page = Path(self.env.doc2path(self.env.docname)).parent
        return self.parse(figure(plot, page, alt, "\n".join(self.content)))


def figure(path: Path, page: Path, alt: str, caption: str) -> str:
    """A figure in MyST."""
    return f"```{{figure}} {Path(os.path.relpath(path, page)).as_posix()}\n:alt: {alt}\n\n{caption}\n```"


def about(name: str) -> str:
    """What a model or study is, in the words of ``python -m gae_core list``; its name where it is no longer there."""
    return registry.STUDIES[name].about if name in registry.STUDIES else name.replace("_", " ")


def short(value: float) -> str:
    """A number to three digits, or all of those before the point."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def pictured(record: dict, what: str) -> tuple[str, str]:
    """What the picture of a record shows: the text for those who cannot see it, and the caption.

    Args:
        record: of a run that has left a picture.
        what: the model, see :func:`about`.

    Raises:
        ValueError: for a topic whose pictures are not described here.
    """
    name, topic, data, metrics = (record.get(key) for key in ("model", "topic", "data", "metrics"))
    title = name.replace("_", " ")

    def of(metric: str, unit: str = "") -> str:
        """A metric of the first seed, whose picture is kept, in brackets; empty where it is not measured."""
        return f" ({short(metrics[metric]['by seed'][0])}{unit})" if metric in metrics else ""

    def measured(**values: str) -> str:
        """Metrics of the first seed as sentences, each after its word; without those that are not measured."""
        found = [(word, of(metric)[2:-1]) for word, metric in values.items() if metric in metrics]
        return "".join(f" {word.replace('_', ' ')}: {value}." for word, value in found)

    def panels(names: list[str], kind: str) -> str:
        number = ("No", "One", "Two", "Three", "Four", "Five", "Six")[len(names)]
        return f"{number} {kind}{'s' * (len(names) != 1)}, from left to right: {'; '.join(names)}."

    if topic in (None, "image models"):  # gae_core.studies.image_models.sample_sources
        sources = {
            "N(0, I)": "decoded codes from N(0, I)",
            "one Gaussian": "from one Gaussian fitted to the codes of training images",
            "mixture of ten": "from a fitted mixture of ten Gaussians",
            "reconstructions": "reconstructions of test images",
        }
        shown = panels([text + of(FRECHET + key) for key, text in sources.items()], "grid")
        shown += " Each has 64 images; in brackets the Fréchet distance."
        caption = "images decoded from codes of three distributions, and reconstructions"
    elif topic == "vae":
        shown = f"Four rows of 16 images: means of p(x | z) at codes z from N(0, I) in {record['dim']} dimensions."
        shown += measured(Fréchet_distance="Fréchet, N(0, I)")
        caption = "images decoded from codes of N(0, I)"
    elif name == "bn_vae_estimates":
        shown = "Three panels, a model each: the estimated NLL against the number of draws, a curve for each proposal."
        caption = "one model's likelihood by what its codes are drawn from"
    elif topic == "bn_vae":
        shown = f"Four rows of 16 black and white samples of a model with {record['dim']} codes."
        shown += measured(Active_codes="active units", KL_in_nats="KL")
        caption = "samples"
    elif topic == "cvae":
        shown = "A row of ten images for each class: means of p(x | z, y), where y is the class of the row."
        shown += measured(Share_that_a_classifier_takes_for_it="share of the label asked for")
        caption = "a class in each row"
    elif topic == "denoising":
        shown = f"A row for each of five chains: what it restores, every {record['every']} steps, from left to right."
        shown += measured(Mean_number_of_steps_until_the_label_changes="steps until the label changes")
        caption = "what five chains restore on their way"
    elif topic == "family":
        grids = [
            *(["test images", "their reconstructions"] if "squared error a pixel" in metrics else []),
            *(["samples" + of("Fréchet, own")] if "Fréchet, own" in metrics else []),
            *(
                ["samples from a density fitted to codes" + of("Fréchet, fitted")]
                if "Fréchet, fitted" in metrics
                else []
            ),
            *(["test images, right half filled in"] if "squared error of a missing pixel" in metrics else []),
        ]
        shown = panels(grids, "grid") + " Each has 32 images; in brackets the Fréchet distance of samples."
        caption = ", ".join(grid.partition(" (")[0] for grid in grids)
    elif topic == "image_prior":
        keys = [key for key in metrics if key.startswith("PSNR of ") and "at the end" not in key]
        pictures = [key.removeprefix("PSNR of ").removesuffix(", dB") + of(key, " dB") for key in keys]
        shown = panels(["the photograph itself", *pictures], "picture")
        caption = "the photograph, what the network makes of it, and other methods"
    elif topic == "meg" and data == "plane":
        shown = "Left, samples as dots over crosses at the modes."
        shown += measured(Modes_found="modes of 25", Samples_of_high_quality_in_per_cent="high quality, %")
        shown += " Right, the density that belongs to the learned energy, in colours on a logarithmic scale."
        caption = "samples, and the density that belongs to the energy"
    elif topic == "meg" and "prevalence" in metrics:
        shown = "Left, a grid of 64 samples; right, 64 images that it was trained on."
        shown += measured(AUROC_of_the_energy="AUROC, energy", AUROC_of_its_slope="AUROC, slope²")
        caption = "samples beside training data"
    elif topic == "meg":
        count = next(key for key in metrics if key.startswith("modes of "))  # 10, 100 or 1,000: a power for each digit
        digits = count.count("0")
        shown = panels([f"digit {i + 1}" for i in range(digits)], "grid")
        shown += f" They are the channels of 64 samples. Seen by a classifier: {of(count)[2:-1]} {count[6:]} modes."
        caption = "the digits of each sample, channel by channel"
    else:
        raise ValueError(f"say in pictured() what a picture of the topic {topic!r} shows, that of {name}")
    return f"{shown} Run {title}: {what}; {data}, size {record['size']}.", f"{title}: {caption}; first seed."


def plotted(group: list[dict]) -> str:
    """What :func:`draw` draws of a group, for those who cannot see it."""
    found = [
        (metric["mean"], key.removeprefix(FRECHET), record["model"].replace("_", " "))
        for record in group
        for key, metric in record["metrics"].items()
        if key in shared(group)
    ]
    names = ", ".join(record["model"].replace("_", " ") for record in group)
    ends = " and ".join(
        f"the {word} is {short(value)} ({model}, {row})"
        for word, (value, row, model) in (("smallest", min(found)), ("largest", max(found)))
    )
    rows = "; ".join(key.removeprefix(FRECHET) for key in shared(group))
    return f"Dots with error bars on a logarithmic axis: the Fréchet distance of {names} for {rows}. " + (
        f"Of {len(found)} dots {ends}." if len(found) > 1 else f"The one dot is at {short(found[0][0])}."
    )


def shared(group: list[dict]) -> list[str]:
    """The Fréchet distances that all records of a group have, that of real images apart."""
    keys = [key for key in group[0]["metrics"] if all(key in record["metrics"] for record in group)]
    return [key for key in keys if key.startswith(FRECHET) and key != REAL]


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

    if not (rows := shared(group)):
        return False
    fig, ax = plt.subplots(figsize=(7, 1.2 + 0.5 * len(rows)), layout="constrained")
    for i, record in enumerate(group):
        found = [record["metrics"][row] for row in rows]
        at = [y + 0.15 * (i - (len(group) - 1) / 2) for y in range(len(rows))]
        error = [m["standard error"] or 0 for m in found]
        label = record["model"].replace("_", " ")
        ax.errorbar([m["mean"] for m in found], at, xerr=error, fmt="o", ms=4, capsize=3, label=label)
    if REAL in group[0]["metrics"]:
        ax.axvline(group[0]["metrics"][REAL]["mean"], color="grey", linestyle="--", linewidth=1)
    ax.set(yticks=range(len(rows)), yticklabels=[row.removeprefix(FRECHET) for row in rows], xscale="log")
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


def draw_panels(found: list[dict], curve: str, path: Path, *, axis: str = "epochs") -> None:
    """Draw each curve in a panel of its own, on a logarithmic axis where its values are powers of ten apart."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot as plt

    names = curve.split("; ")
    rows = -(-len(names) // 2)
    fig, axes = plt.subplots(rows, 2, figsize=(9, 2.6 * rows), layout="constrained", squeeze=False)
    for ax, name in zip(axes.flat, names, strict=False):
        every = [value for record in found for values in record["curves"][name] for value in values]
        for i, record in enumerate(found):
            for seed, values in enumerate(record["curves"][name]):
                epochs = [record["epochs"] * (step + 1) / len(values) for step in range(len(values))]
                label = record["model"].replace("_", " ") if seed == 0 else None
                ax.plot(epochs, values, ".-", color=f"C{i}", markersize=4, linewidth=1, label=label)
        if min(every) > 0 and max(every) > 1000 * min(every):
            ax.set_yscale("log")
        ax.set(xlabel=axis, title=name)
    fig.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=4, fontsize=8)
    for ax in axes.flat[len(names) :]:
        ax.remove()
    path.parent.mkdir(parents=True, exist_ok=True)
    fig.savefig(path, dpi=100)
    plt.close(fig)


def draw_plane(found: list[dict], x: str, y: str, path: Path) -> None:
    """Draw each record at its two metrics, with standard errors, and write its name beside it."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot as plt

    fig, ax = plt.subplots(figsize=(7.5, 4.5), layout="constrained")
    labels = [record["model"].partition("_")[2].replace("_", " ") for record in found]
    kinds = list(dict.fromkeys(label.split()[0] for label in labels))
    for record, label in zip(found, labels, strict=True):
        across, up, colour = record["metrics"][x], record["metrics"][y], f"C{kinds.index(label.split()[0])}"
        error = {"xerr": across["standard error"] or 0, "yerr": up["standard error"] or 0}
        ax.errorbar(across["mean"], up["mean"], **error, fmt="o", ms=4, capsize=2, color=colour)
        ax.annotate(label, (across["mean"], up["mean"]), (4, 4), textcoords="offset points", fontsize=9)
    ax.set(xlabel=f"{x}, nats", ylabel=f"{y}, nats")
    path.parent.mkdir(parents=True, exist_ok=True)
    fig.savefig(path, dpi=150)
    plt.close(fig)


def setup(app):
    """Register the directives."""
    app.add_directive("results-table", ResultsTable)
    app.add_directive("results-all", ResultsAll)
    app.add_directive("results-curves", ResultsCurves)
    app.add_directive("results-plane", ResultsPlane)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
