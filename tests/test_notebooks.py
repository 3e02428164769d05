"""The notebooks are what `make notebooks` would make of their text: paired, executed, readable anywhere."""

import copy
import shutil
import subprocess
import sys
import types
from pathlib import Path

import jupytext
import make_notebooks
import nbformat
import pytest
from make_notebooks import MAX_BYTES, SETUP, problems, repository_url, set_cell_ids

FOLDER = Path(__file__).resolve().parents[1] / "notebooks"
TOPICS = sorted(path.stem for path in FOLDER.glob("*.py"))
REAL_RUN = subprocess.run


def test_there_are_notebooks_and_each_has_both_halves():
    assert TOPICS, "notebooks/ holds no .py"
    assert TOPICS == sorted(path.stem for path in FOLDER.glob("*.ipynb")), "run `make notebooks`"


@pytest.mark.parametrize("topic", TOPICS)
def test_notebook_is_in_order(topic):
    path = FOLDER / f"{topic}.ipynb"
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    source = jupytext.read(path.with_suffix(".py"), fmt="py:percent")
    wrong = problems(notebook, source, repository_url())
    assert not wrong, "\n" + "\n".join(wrong)
    assert path.stat().st_size <= MAX_BYTES, f"{path.stat().st_size:,} bytes: smaller figures"
    assert {"device", "python", "torch", "size", "seconds"} <= notebook["metadata"]["gae"].keys()


@pytest.mark.parametrize("topic", TOPICS)
def test_lines_of_code_fit_the_page(topic):
    """Of 84 characters, but for the set-up cell, which a page shows folded."""
    notebook = nbformat.read(FOLDER / f"{topic}.ipynb", as_version=4)
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"][1:]
    assert not [line for cell in cells for line in cell["source"].splitlines() if len(line) > 84]


HEADER = """\
# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Title, $x^2$

# %% tags=["hide-input"]
"""
BODY = """
# %% tags=["nbval-check-output"]
print(1 + 1)

# %% mystnb={"figure": {"name": "fig-t-x", "caption": "A line."}, "image": {"alt": "A line"}}
draw()
"""


@pytest.fixture
def pair():
    """A notebook that is in order, as (executed, source)."""
    source = jupytext.reads(HEADER + SETUP.format(repository="") + BODY, fmt="py:percent")
    executed = copy.deepcopy(source)
    code = [cell for cell in executed["cells"] if cell["cell_type"] == "code"]
    for count, cell in enumerate(code, start=1):
        cell["execution_count"] = count
    code[1]["outputs"] = [nbformat.v4.new_output("stream", name="stdout", text="2\n")]
    code[2]["outputs"] = [nbformat.v4.new_output("display_data", data={"image/png": "aGk=", "text/plain": "<>"})]
    return executed, source


def test_a_good_pair_has_no_problems(pair):
    assert problems(*pair, repository="") == []


def spoil_markdown(text):
    def spoil(executed, source):
        executed["cells"][0]["source"] = source["cells"][0]["source"] = text

    return spoil


def spoil_output(**output):
    def spoil(executed, source):
        executed["cells"][2]["outputs"] = [nbformat.v4.new_output(**output)]

    return spoil


def spoil_both_metadata(executed, source):
    for notebook in (executed, source):
        notebook["cells"][3]["metadata"]["mystnb"] = {"figure": {"name": "fig-t-x", "caption": "A line."}}


def spoil_figure(executed, source):
    value = nbformat.v4.new_output("execute_result", data={"text/plain": "[<Line2D>]"}, execution_count=3)
    executed["cells"][3]["outputs"].append(value)


SPOILT = {
    "source": (lambda e, s: e["cells"][2].update(source="print(3)"), "the source differs"),
    "type": (lambda e, s: e["cells"][0].update(cell_type="raw"), "the cell_type differs"),
    "tags": (lambda e, s: e["cells"][2]["metadata"].pop("tags"), "the metadata or tags differ"),
    "lost cell": (lambda e, s: e["cells"].pop(), "it has 3 cells"),
    "not executed": (lambda e, s: e["cells"][2].update(execution_count=None), "never executed"),
    "error": (spoil_output(output_type="error", ename="E", evalue="v", traceback=[]), "raised E"),
    "stderr": (spoil_output(output_type="stream", name="stderr", text="50%|"), "wrote to stderr"),
    "path": (spoil_output(output_type="stream", name="stdout", text="at /home/me/x.py"), "path of the machine"),
    "no alt": (spoil_both_metadata, "no image.alt"),
    "value beside the figure": (spoil_figure, "more than its one figure"),
    "role": (spoil_markdown("see {eq}`eq-a`"), "MyST syntax"),
    "domain role": (spoil_markdown("see {cite:t}`a2020`"), "MyST syntax"),
    "directive": (spoil_markdown("```{note}\nhi\n```"), "MyST syntax"),
    "colon fence": (spoil_markdown(":::{note}\nhi\n:::"), "MyST syntax"),
    "target": (spoil_markdown("(here)=\n# Title"), "MyST syntax"),
    "label": (spoil_markdown("$$\na\n$$ (eq-a)"), "MyST syntax"),
}


@pytest.mark.parametrize("name", SPOILT)
def test_what_is_wrong_is_found(pair, name):
    spoil, message = SPOILT[name]
    spoil(*pair)
    assert any(message in line for line in problems(*pair, repository=""))


def test_the_set_up_cell_must_carry_the_address(pair):
    assert any("set-up cell" in line for line in problems(*pair, repository="https://example.org/book"))


def test_cell_ids_follow_from_the_content(pair):
    executed, source = pair
    executed["cells"].append(copy.deepcopy(executed["cells"][2]))
    for notebook in (executed, source):
        set_cell_ids(notebook)
    ids = [cell["id"] for cell in executed["cells"]]
    assert ids[:-1] == [cell["id"] for cell in source["cells"]]
    assert len(set(ids)) == len(ids)


def test_making_writes_the_address_runs_and_stamps(tmp_path):
    text = HEADER + SETUP.format(repository="old") + '\n# %%\nSEED = 7\nimport os\nprint(os.environ["GAE_SIZE"])\n'
    path = tmp_path / "t.py"
    path.write_text(text)
    assert make_notebooks.make(path, "short", "https://example.org/book") == []
    assert 'REPOSITORY = "https://example.org/book"' in path.read_text()
    notebook = nbformat.read(path.with_suffix(".ipynb"), as_version=4)
    assert notebook["cells"][-1]["outputs"][0]["text"] == "short\n"
    assert len(notebook["cells"]) == 3
    assert notebook["metadata"]["gae"]["seed"] == 7
    assert notebook["metadata"]["gae"]["size"] == "short"


IMAGES = """
# %%
import os
from gae_core import data
images = data.Images(os.environ["IMAGES"], None, None, None, None)
"""


@pytest.mark.parametrize(
    ("before", "now", "written"),
    [
        ("mnist", "digits", False),
        ("mnist", "mnist", True),
        ("digits", "mnist", True),
        ("digits", "digits", True),
        ("mnist", "fashion_mnist", True),
    ],
)
def test_digits_do_not_take_the_place_of_other_data(before, now, written, tmp_path, monkeypatch):
    path = tmp_path / "t.py"
    path.write_text(HEADER + SETUP.format(repository="") + IMAGES)
    monkeypatch.setenv("IMAGES", before)
    assert make_notebooks.make(path, "short", "") == []
    content = path.with_suffix(".ipynb").read_bytes()
    assert nbformat.reads(content.decode(), as_version=4)["metadata"]["gae"]["data"] == before
    monkeypatch.setenv("IMAGES", now)
    wrong = make_notebooks.make(path, "short", "")
    if written:
        assert wrong == []
        assert nbformat.read(path.with_suffix(".ipynb"), as_version=4)["metadata"]["gae"]["data"] == now
    else:
        assert len(wrong) == 1 and "GAE_DATA" in wrong[0] and "python -m gae_core data mnist" in wrong[0]
        assert path.with_suffix(".ipynb").read_bytes() == content


def test_a_size_that_is_mistyped_runs_nothing(monkeypatch, capsys):
    monkeypatch.setenv("GAE_SIZE", "Short")
    monkeypatch.setattr(make_notebooks, "make", lambda *a: pytest.fail("it ran"))
    assert make_notebooks.main(["eae"]) == 1
    assert "GAE_SIZE must be short or full" in capsys.readouterr().out


def test_a_notebook_with_an_error_is_not_written(tmp_path):
    path = tmp_path / "t.py"
    path.write_text(HEADER + SETUP.format(repository="") + "\n# %%\n1 / 0\n")
    assert "ZeroDivisionError" in make_notebooks.make(path, "short", "")[0]
    assert not path.with_suffix(".ipynb").exists()


@pytest.fixture
def colab(monkeypatch, tmp_path):
    """The set-up cell as Colab would run it, where gae_core is not installed; returns (run, commands, folder)."""
    commands = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", list(sys.path))
    monkeypatch.setitem(sys.modules, "google.colab", types.ModuleType("google.colab"))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setattr("subprocess.run", lambda command, **options: commands.append(command))
    return lambda address: exec(SETUP.format(repository=address), {}), commands, tmp_path


def test_set_up_takes_an_uploaded_package_before_any_other(colab):
    run, commands, folder = colab
    shutil.make_archive(str(folder / "gae_core"), "zip", FOLDER.parent, "gae_core")
    run("https://example.org/book")
    assert sys.path[0] == "gae_core.zip" and not commands
    code = 'import sys; sys.path.insert(0, "gae_core.zip"); import gae_core.entropy as e; print(e.__file__)'
    told = REAL_RUN([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=True).stdout
    assert "gae_core.zip" in told


def test_set_up_installs_from_the_projects_own_address_alone_and_nothing_else(colab):
    run, commands, _ = colab
    run("https://example.org/book")
    (command,) = commands
    assert "--no-deps" in command and command[-1] == "git+https://example.org/book"


def test_set_up_without_an_address_says_what_to_do(colab):
    run, commands, _ = colab
    with pytest.raises(RuntimeError, match=r"upload gae_core\.zip"):
        run("")
    assert not commands


def test_set_up_does_nothing_elsewhere(colab, monkeypatch):
    run, commands, _ = colab
    monkeypatch.delitem(sys.modules, "google.colab")
    before = list(sys.path)
    run("")
    assert sys.path == before and not commands
