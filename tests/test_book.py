"""The built book reads well: offline, on a phone and a laptop, in light and dark."""

import base64
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections import defaultdict
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
HTML = ROOT / "_build" / "html"
WIDTHS = {"phone": 390, "laptop": 1280}
FLAGS = [
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
]


def toc_pages() -> list[str]:
    """List the documents of _toc.yml in reading order."""
    found = []

    def walk(entry):
        if "file" in entry:
            found.append(entry["file"])
        for key in ("parts", "chapters", "sections"):
            for below in entry.get(key, []):
                walk(below)

    toc = yaml.safe_load((ROOT / "_toc.yml").read_text(encoding="utf-8"))
    walk({"file": toc["root"], "parts": toc["parts"]})
    return found


PAGES = toc_pages()


@pytest.fixture(scope="module")
def built():
    if not (HTML / "index.html").exists():
        pytest.skip("the book is not built: run `make book`")


@pytest.fixture(scope="module")
def browser(built):
    path = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if path is None:
        pytest.skip("no Chromium on this machine: the pages are not opened")
    sync_api = pytest.importorskip("playwright.sync_api")
    root = ["--no-sandbox"] if hasattr(os, "geteuid") and os.geteuid() == 0 else []
    with sync_api.sync_playwright() as playwright:
        instance = playwright.chromium.launch(executable_path=path, args=FLAGS + root)
        yield instance
        instance.close()


@pytest.fixture(scope="module", params=["light", "dark"])
def tab(request, browser):
    """A tab that asks for one of the two themes, reaches no network, and records what it tried and said."""
    context = browser.new_context(color_scheme=request.param)
    tried, said = [], []

    def only_files(route):
        if route.request.url.startswith(("file:", "data:")):
            route.continue_()
        else:
            tried.append(route.request.url)
            route.abort()

    context.route("**/*", only_files)
    page = context.new_page()
    page.on("console", lambda message: said.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: said.append(str(error)))
    page.theme, page.tried, page.said = request.param, tried, said
    yield page
    context.close()


# Blocks of code or output that a window of 1280 px may cut, by what stands in them, and why.
MAY_BE_CUT = {
    "This copy names no repository": "the set-up cell, the same in all notebooks, is folded until one asks for it",
}

# Runs in the page, once it is 1280 px wide: what is wrong with it, as a list of sentences. It opens the solutions.
INSPECT = r"""
(mayBeCut) => {
  const wrong = [];
  const show = (element) => element.outerHTML.slice(0, 160);

  const place = location.href;
  for (const solution of document.querySelectorAll(".solution")) {
    const title = solution.querySelector(".admonition-title"), content = solution.querySelector("section");
    const name = title.textContent.trim();
    title.scrollIntoView({block: "center", behavior: "instant"});
    const words = document.createRange();
    words.selectNodeContents(title);
    words.setEndBefore(title.querySelector(".toggle-button"));
    const box = [...words.getClientRects()].at(-1);  // the last words: the exercise's number and name
    document.elementFromPoint(box.left + box.width / 2, box.top + box.height / 2).click();
    if (location.href !== place) wrong.push("its title leads away: " + name);
    const seen = content?.checkVisibility({visibilityProperty: true});  // its opacity takes a moment
    if (!seen || content.getBoundingClientRect().height < 20) wrong.push("does not open, or is empty: " + name);
    else if (content.innerText.trim().length < 20) wrong.push("has no text: " + name);
  }

  // Bars grow with what they stand around: beside a letter without ascender they would be lower than a capital, which
  // has 683 units.
  for (const bar of new Set([..."∥∣|‖"].flatMap((character) => {
    const code = character.codePointAt(0).toString(16).toUpperCase();
    return [...document.querySelectorAll(`mjx-container [data-c="${code}"]`)].map((glyph) => glyph.parentElement);
  }))) {
    const height = bar.getBBox().height;
    if (height && height < 683) wrong.push(`a bar of ${Math.round(height)} units: ` + bar.closest(".math").textContent);
  }

  for (const block of document.querySelectorAll("article pre")) {
    const excess = block.scrollWidth - block.clientWidth, lines = block.textContent.split("\n");
    if (excess <= 0 || mayBeCut.some((text) => block.textContent.includes(text))) continue;
    const longest = lines.reduce((a, b) => (b.length > a.length ? b : a));
    wrong.push(`${excess} px cut of a line of ${longest.length}: ${longest.trim().slice(0, 80)}`);
  }

  const body = document.body.cloneNode(true);
  for (const node of body.querySelectorAll("pre, code, script, style, noscript, mjx-container, .sig")) node.remove();
  const tex = /\\[A-Za-z([]|\$|[_^]\{|\{[A-Za-z]+\}|[A-Za-z0-9)]\^[A-Za-z0-9(]/;
  const texts = document.createTreeWalker(body, NodeFilter.SHOW_TEXT), found = [document.title];
  while (texts.nextNode()) found.push(texts.currentNode.textContent);
  for (const text of found) {
    const at = text.search(tex);
    if (at >= 0) wrong.push("TeX in the text: " + text.slice(Math.max(0, at - 40), at + 40));
  }
  for (const math of document.querySelectorAll(".math"))
    if (!math.querySelector("mjx-container svg")) wrong.push("not drawn: " + math.textContent.slice(0, 80));
  for (const node of document.querySelectorAll('[data-mjx-error], mjx-merror, [data-mml-node="merror"]'))
    wrong.push("MathJax error: " + (node.getAttribute("data-mjx-error") || show(node)));
  for (const node of document.querySelectorAll('mjx-container g[fill="red"]'))
    wrong.push("unknown command in: " + show(node.closest("mjx-container").parentElement));

  const article = document.querySelector("article").cloneNode(true);
  for (const node of article.querySelectorAll("pre, code, script, style, mjx-container")) node.remove();
  for (const raw of ["$$", "\\(", "\\[", "\\begin{", "{eq}", "{ref}", "{doc}", "{cite", "{prf:", "{func}", "{numref}"])
    if (article.textContent.includes(raw)) wrong.push("raw markup in the text: " + raw);

  for (const image of document.querySelectorAll("img")) {
    const alt = image.getAttribute("alt") || "";
    if (!alt.trim() || /\.(png|svg|jpe?g)$/.test(alt) || alt.includes("_images/")) wrong.push("no alt: " + show(image));
    if (!image.complete || !image.naturalWidth) wrong.push("not loaded: " + show(image));
    if (!image.closest("figure")?.querySelector("figcaption")?.textContent.trim())
      wrong.push("no caption: " + show(image));
    if (getComputedStyle(image).filter !== "none") wrong.push("its greys and colours are altered: " + show(image));
  }
  const shown = document.documentElement.dataset.theme;
  if (shown !== (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light"))
    wrong.push("the theme shown is " + shown);
  return wrong;
}
"""

# Runs in the page: text whose contrast with its background is below 4.5 to 1 (3 to 1 where it is large).
CONTRAST = r"""
() => {
  const context = document.createElement("canvas").getContext("2d", {willReadFrequently: true});
  const rgba = (colour) => {
    context.clearRect(0, 0, 1, 1); context.fillStyle = colour; context.fillRect(0, 0, 1, 1);
    const [r, g, b, a] = context.getImageData(0, 0, 1, 1).data; return [r, g, b, a / 255];
  };
  const over = (top, below) => [0, 1, 2].map((i) => top[i] * top[3] + below[i] * (1 - top[3])).concat(1);
  const light = (c) => [0.2126, 0.7152, 0.0722].reduce((sum, weight, i) => {
    const v = c[i] / 255; return sum + weight * (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
  }, 0);
  const background = (element) => {
    const layers = [];
    for (let e = element; e; e = e.parentElement) layers.push(rgba(getComputedStyle(e).backgroundColor));
    return layers.reverse().reduce((below, top) => over(top, below), [255, 255, 255, 1]);
  };
  const low = new Set();
  const article = document.querySelector("article");
  if (!article) return [];  // the search: a field, and what it finds
  const walker = document.createTreeWalker(article, NodeFilter.SHOW_TEXT);
  for (let node = walker.nextNode(); node; node = walker.nextNode()) {
    const element = node.parentElement, style = getComputedStyle(element);
    if (!node.textContent.trim() || !element.checkVisibility() || element.closest("mjx-assistive-mml, a.headerlink"))
      continue;
    const below = background(element), above = over(rgba(style.color), below);
    const [a, b] = [light(above), light(below)];
    const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    const size = parseFloat(style.fontSize), large = size >= 24 || (size >= 18.66 && style.fontWeight >= 700);
    if (ratio < (large ? 3 : 4.5))
      low.add(`contrast ${ratio.toFixed(1)}: <${element.localName} class="${element.className}"> ` +
              node.textContent.trim().slice(0, 40));
  }
  return [...low];
}
"""

# Runs in the page: what is wider than the window, or is cut off with no way to scroll to it, or fades without a reason.
TOO_WIDE = r"""
() => {
  const wrong = [];
  const show = (element) => element.outerHTML.slice(0, 160);
  const width = document.documentElement.clientWidth, scroll = document.scrollingElement.scrollWidth;
  const right = (element) => element.getBoundingClientRect().right;
  if (scroll > width) {
    const out = [...document.querySelectorAll("article *")].filter((element) => right(element) > width + 1);
    const names = out.slice(-3).map((element) => element.outerHTML.slice(0, 120));
    wrong.push(`${scroll} px wide, the window ${width}: ` + names.join(" | "));
  }
  for (const formula of document.querySelectorAll("article mjx-container svg")) {
    if (right(formula) <= width || !formula.checkVisibility()) continue;
    const scrolls = (box) => ["auto", "scroll"].includes(getComputedStyle(box).overflowX) && right(box) <= width + 1;
    let box = formula.parentElement;
    while (box !== document.body && !scrolls(box)) box = box.parentElement;
    if (box === document.body)
      wrong.push("formula cut off: " + formula.closest(".math, mjx-container").outerHTML.slice(0, 160));
  }
  for (const box of document.querySelectorAll(".more"))
    if (box.scrollWidth <= box.clientWidth) wrong.push("fades though all of it is there: " + show(box));
  for (const box of document.querySelectorAll("article div.math mjx-container"))
    if (box.scrollWidth > box.clientWidth + 1 && !box.matches(".more")) wrong.push("does not fade: " + show(box));
  return wrong;
}
"""


@pytest.mark.pages
@pytest.mark.parametrize("document", [*PAGES, "search", "genindex", "prf-prf", "py-modindex"])
def test_page(tab, document):
    path = HTML / f"{document}.html"
    assert path.exists(), "the toc names this page, the build has none"
    tab.tried.clear()
    tab.said.clear()
    tab.set_viewport_size({"width": WIDTHS["laptop"], "height": 800})
    tab.goto(path.as_uri(), wait_until="load")
    tab.evaluate("async () => { if (window.MathJax) { await MathJax.startup?.promise; } }")
    if 'class="math' in path.read_text(encoding="utf-8"):
        tab.wait_for_selector("mjx-container svg", state="attached", timeout=20_000)
        tab.evaluate("() => MathJax.startup.promise")
    wrong = tab.evaluate(INSPECT, list(MAY_BE_CUT)) if document in PAGES else []
    wrong += tab.evaluate(CONTRAST)
    for name, width in WIDTHS.items():
        tab.set_viewport_size({"width": width, "height": 800})
        for _ in range(30):  # the layout, what watches it, and what that changes take frames, on a busy machine many
            tab.evaluate("() => new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")
            if not (cut := tab.evaluate(TOO_WIDE)):
                break
        wrong += [f"{name}: {message}" for message in cut]
    wrong += [f"asks the network for {url}" for url in tab.tried]
    wrong += [f"console: {message}" for message in tab.said]
    assert not wrong, f"{document}, {tab.theme}:\n" + "\n".join(wrong)


def test_no_page_loads_anything_from_elsewhere(built):
    loads = re.compile(
        r"<(?:script|img|iframe|source)\b[^>]*\bsrc=\"(?:https?:)?//|<link\b[^>]*\bhref=\"(?:https?:)?//"
    )
    for path in HTML.rglob("*.html"):
        found = loads.search(path.read_text(encoding="utf-8"))
        assert not found, f"{path.relative_to(HTML)}: {found[0]}"


def test_the_notation_names_pages_that_use_the_symbol():
    text = (ROOT / "book" / "notation.md").read_text(encoding="utf-8").split("(notation-many)=")[1]
    rows = re.findall(r"^\| \$(.+?)\$ \| (.*) \|$", text, re.MULTILINE)
    looked = 0
    for symbol, meanings in rows:
        for part in re.findall(r"[^;(]*\([^()]*\{doc\}[^()]*\)", meanings):
            for topic in re.findall(r"\{doc\}`[^`<]+<(\w+)>`", part):
                page = (ROOT / "book" / f"{topic}.md").read_text(encoding="utf-8")
                formulas = " ".join(re.findall(r"\$\$.+?\$\$|\$[^$\n]+\$", page, re.DOTALL))
                if not symbol.startswith("\\"):  # a letter stands alone: no letter of a command, or of a word
                    formulas = re.sub(r"\\[A-Za-z]+", " ", formulas)
                found = re.search(rf"(?<![A-Za-z\\]){re.escape(symbol)}(?![A-Za-z])", formulas)
                assert found, f"{symbol} is not on the page {topic}"
                looked += 1
    assert looked == text.count("{doc}") - 1 > 50  # the one more is below the table


class Pictures(HTMLParser):
    """The images of a page: file, alternative text, caption."""

    def __init__(self):
        super().__init__()
        self.found, self.inside = [], False

    def handle_starttag(self, tag, attrs):
        if tag == "img":
            self.found.append([dict(attrs)["src"], dict(attrs).get("alt") or "", ""])
        self.inside |= tag == "figcaption"

    def handle_endtag(self, tag):
        self.inside &= tag != "figcaption"

    def handle_data(self, data):
        if self.inside:
            self.found[-1][2] += data


def words(text: str) -> str:
    return " ".join(re.findall(r"\w+", text.casefold()))


def test_every_picture_has_an_alternative_text_of_its_own(built):
    wrong, of = [], defaultdict(set)
    for document in PAGES:
        page = Pictures()
        page.feed((HTML / f"{document}.html").read_text(encoding="utf-8"))
        for file, alt, caption in page.found:
            path = (HTML / document).parent / unquote(file)
            of[words(alt)].add(hashlib.sha256(path.read_bytes()).hexdigest())
            if len(alt.split()) < 8:
                wrong.append(f"{document}: {file} is described in {len(alt.split())} words: {alt!r}")
            if words(alt) in words(caption) or words(caption) in words(alt):
                wrong.append(f"{document}: {file} is described by its caption: {alt!r}")
    wrong += [f"{len(pictures)} pictures share the text {alt!r}" for alt, pictures in of.items() if len(pictures) > 1]
    assert of and not wrong, "\n".join(wrong)


def test_every_exercise_with_a_solution_shows_it(built):
    for path in (ROOT / "book").glob("*.md"):
        page = (HTML / "book" / f"{path.stem}.html").read_text(encoding="utf-8")
        started = re.findall(r"^`{3,}\{solution-start\} (ex-\S+)", path.read_text(encoding="utf-8"), re.MULTILINE)
        shown = re.findall(r'class="solution [^>]*>\s*<p class="admonition-title">.*?href="#(ex-[^"]+)"', page)
        assert shown == started, path.stem


def test_the_code_page_has_every_module():
    page = (ROOT / "book" / "api.md").read_text(encoding="utf-8")
    files = {".".join(path.relative_to(ROOT).with_suffix("").parts) for path in (ROOT / "gae_core").rglob("*.py")}
    modules = {name for name in files if "__" not in name} - {"gae_core.metrics"}
    face = {name for name in modules if name.startswith("gae_core.metrics.")}  # shown as one
    assert set(re.findall(r"automodule:: (\S+)", page)) == modules - face | {"gae_core.metrics"}


def test_every_page_of_the_book_is_in_the_toc():
    files = {f"book/{path.stem}" for path in (ROOT / "book").glob("*.md")}
    files |= {f"notebooks/{path.stem}" for path in (ROOT / "notebooks").glob("*.py")}
    assert set(PAGES) == files


PIXEL = base64.b64encode(
    bytes.fromhex(
        "89504e470d0a1a0a0000000d4948445200000001000000010806000000"
        "1f15c4890000000d49444154789c6360606060000000050001a5f645400000000049454e44ae426082"
    )
).decode()


@pytest.fixture
def figure_page(tmp_path):
    """A function that builds a page with one notebook-figure; it returns the status, messages and HTML."""

    def cell(name, outputs):
        return {"cell_type": "code", "metadata": {"mystnb": {"figure": {"name": name}}}, "outputs": outputs}

    (tmp_path / "notebooks").mkdir()
    cells = [cell("fig-t-x", [{"data": {"image/png": PIXEL}}]), cell("fig-t-empty", [])]
    (tmp_path / "notebooks" / "t.ipynb").write_text(json.dumps({"cells": cells}))

    def build(directive):
        (tmp_path / "index.md").write_text(f"# Page\n\n{{numref}}`fig-t-x-chapter`\n\n{directive}\n")
        options = ["-D", "extensions=myst_parser,notebook_figure", "-D", "numfig=1", "-D", "suppress_warnings=ref"]
        command = [sys.executable, "-m", "sphinx", "-C", "-q", "-W", "--keep-going", *options, ".", "out/html"]
        environment = {**os.environ, "PYTHONPATH": str(ROOT / "book" / "_ext")}
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        page = tmp_path / "out" / "html" / "index.html"
        return done.returncode, done.stderr, page.read_text(encoding="utf-8") if page.exists() else ""

    return build


def test_notebook_figure_is_numbered_described_and_captioned(figure_page):
    status, messages, page = figure_page("```{notebook-figure} t fig-t-x\n:alt: A dot\nThe *caption*.\n```")
    assert status == 0, messages
    assert 'id="fig-t-x-chapter"' in page
    assert 'alt="A dot"' in page
    assert "_images/fig-t-x.png" in page
    assert "The <em>caption</em>." in page
    assert 'href="#fig-t-x-chapter"' in page


@pytest.mark.parametrize(
    ("directive", "message"),
    [
        ("```{notebook-figure} other fig-t-x\n:alt: A\nCaption.\n```", "there is no notebooks/other.ipynb"),
        (
            "```{notebook-figure} t fig-t-y\n:alt: A\nCaption.\n```",
            "has no figure fig-t-y; it has: fig-t-empty, fig-t-x",
        ),
        ("```{notebook-figure} t fig-t-empty\n:alt: A\nCaption.\n```", "holds no PNG"),
        ("```{notebook-figure} t fig-t-x\nCaption.\n```", "give it an :alt:"),
        ("```{notebook-figure} t fig-t-x\n:alt: A\n```", "the caption is missing"),
    ],
)
def test_notebook_figure_says_what_is_missing(figure_page, directive, message):
    status, messages, _ = figure_page(directive)
    assert status != 0
    assert message in messages


@pytest.mark.parametrize("url", ["", "https://github.com/example/project"])
def test_a_notebook_opens_in_colab_where_the_project_has_an_address(url, tmp_path):
    for name in ("_ext", "_static", "references.bib"):
        (tmp_path / "book").mkdir(exist_ok=True)
        (tmp_path / "book" / name).symlink_to(ROOT / "book" / name)
    config = yaml.safe_load((ROOT / "_config.yml").read_text(encoding="utf-8"))
    config["repository"]["url"] = url
    (tmp_path / "_config.yml").write_text(yaml.safe_dump(config), encoding="utf-8")
    (tmp_path / "_toc.yml").write_text("{format: jb-book, root: index, chapters: [{file: notebooks/small}]}")
    (tmp_path / "index.md").write_text("# The book\n")
    notebook = {"cells": [{"cell_type": "markdown", "metadata": {}, "source": "# A notebook"}], "metadata": {}}
    (tmp_path / "notebooks").mkdir()
    (tmp_path / "notebooks" / "small.ipynb").write_text(json.dumps(notebook | {"nbformat": 4, "nbformat_minor": 5}))
    command = [str(Path(sys.executable).with_name("jupyter-book")), "build", str(tmp_path), "-n", "-W", "--quiet"]
    subprocess.run(command, check=True, capture_output=True)
    page = (tmp_path / "_build" / "html" / "notebooks" / "small.html").read_text(encoding="utf-8")
    found = re.findall(r'href="([^"]*colab[^"]*)"', page)
    path = "/github/example/project/blob/main/notebooks/small.ipynb"
    assert found == ([f"https://colab.research.google.com{path}"] if url else [])


def test_a_docstring_is_written_out_for_the_page():
    from docstring_equations import written_out

    assert written_out("see ``eq-a_b``") == "see equation :eq:`eq-a_b`"
    assert written_out("e^{-U} on R^d") == ":math:`e^{-U}` on :math:`R^d`"
    for same in ("``e^{-U}``", ":math:`a +\n e^{-U}`", ".. math::\n\n    x^{2} +\n\n    e^{x}", "snake_case * n"):
        assert written_out(same) == same


def recorded_pictures():
    from gae_core import records

    return [
        (record, path)
        for group in records.groups().values()
        for record in group
        if (path := records.RESULTS / record["model"] / f"{record['data']}-{record['size']}.png").exists()
    ]


def test_the_text_of_a_recorded_picture_says_what_is_in_it():
    from results_table import about, pictured

    numbers = {"One": 1, "Two": 2, "Three": 3, "Four": 4, "Five": 5, "Six": 6}
    texts = set()
    for record, path in recorded_pictures():
        alt, _ = pictured(record, about(record["model"]))
        texts.add(alt)
        assert about(record["model"]) in alt and record["data"] in alt and record["size"] in alt
        if found := re.match(r"(\w+) (?:grids?|pictures), from left to right: (.*?)\. ", alt):
            width = int.from_bytes(path.read_bytes()[16:20], "big")  # of the PNG; a panel is 2.4 inches of 100 pixels
            panels = found[2].count(";") + 1
            assert numbers[found[1]] == panels and width // 240 == (panels if "pictures" in alt else min(4, panels)), (
                alt
            )
    assert len(texts) == len(recorded_pictures()) > 0
    with pytest.raises(ValueError, match="topic 'new'"):
        pictured({"model": "m", "topic": "new", "data": "d", "metrics": {}}, "a model")


def test_the_sources_of_codes_stand_in_the_text_in_their_order():
    """The order that the text tells is that in which the study draws its panels."""
    import torch
    from results_table import pictured

    from gae_core import data
    from gae_core.studies import image_models

    rows = torch.rand(400, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    images = data.Images("digits", rows, torch.zeros(400).long(), rows[:8], torch.zeros(8).long())
    recipe = image_models.recipe("autoencoder", "digits", "short")
    model = image_models.build(recipe, (1, 8, 8), 0).eval()
    sources = image_models.sample_sources(model, images, recipe, n=8, seed=0)
    metrics = {f"Fréchet, {name}": {"by seed": [i + 1.0]} for i, name in enumerate(sources)}
    alt, _ = pictured({"model": "m", "data": "digits", "size": "short", "metrics": metrics}, "a model")
    assert [int(value) for value in re.findall(r"\((\d+)\)", alt)] == [1, 2, 3, 4]


def test_the_plot_of_a_group_shows_what_all_of_its_records_have(tmp_path):
    from results_table import draw

    def record(*names):
        return {"model": "m", "metrics": {f"Fréchet, {n}": {"mean": 1.0, "standard error": None} for n in names}}

    assert not draw([record("codes"), record()], tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()
    assert draw([record("codes", "samples"), record("codes")], tmp_path / "one.png")


def test_each_curve_has_a_panel_and_steep_ones_a_logarithmic_axis(tmp_path, monkeypatch):
    from matplotlib import pyplot as plt
    from results_table import draw_panels

    def record(model, steep):
        return {"model": model, "epochs": 4, "curves": {"flat": [[1, 2], [2, 1]], "steep": [steep, steep]}}

    monkeypatch.setattr(plt, "close", lambda figure: None)
    draw_panels([record("one_a", [1, 2]), record("one_b", [5, 5000])], "flat; steep", tmp_path / "p.png")
    figure = plt.gcf()
    monkeypatch.undo()
    plt.close("all")
    flat, steep = figure.axes
    assert (flat.get_title(), steep.get_title()) == ("flat", "steep")
    assert (flat.get_yscale(), steep.get_yscale()) == ("linear", "log")
    assert [list(line.get_ydata()) for line in steep.lines] == [[1, 2], [1, 2], [5, 5000], [5, 5000]]
    assert list(flat.lines[0].get_xdata()) == [2, 4]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["one a", "one b"]


def test_the_plane_has_each_record_at_its_two_metrics(tmp_path, monkeypatch):
    from matplotlib import pyplot as plt
    from results_table import draw_plane

    def record(model, mi, nll):
        metric = {key: {"mean": value, "standard error": 0.1} for key, value in (("MI", mi), ("NLL", nll))}
        return {"model": model, "metrics": metric}

    monkeypatch.setattr(plt, "close", lambda figure: None)
    draw_plane([record("text_plain", 0.0, 38.3), record("text_bn_0.7", 2.0, 38.2)], "MI", "NLL", tmp_path / "p.png")
    written = {text.get_text(): text.xy for text in plt.gcf().axes[0].texts}
    monkeypatch.undo()
    plt.close("all")
    assert written == {"plain": (0.0, 38.3), "bn 0.7": (2.0, 38.2)}
    with pytest.raises(KeyError):
        draw_plane([record("text_plain", 0.0, 38.3)], "KL", "NLL", tmp_path / "q.png")
