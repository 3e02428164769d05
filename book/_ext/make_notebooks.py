"""Make the executed notebooks: ``notebooks/<topic>.py`` (percent format) becomes ``notebooks/<topic>.ipynb``.

    python book/_ext/make_notebooks.py          every notebook
    python book/_ext/make_notebooks.py eae      one of them

The size is ``GAE_SIZE`` (default short). A notebook is written only when it ran without an error and
``problems`` finds nothing wrong with it; the test of the notebooks asks the same function. One that was made with other
data than the digits is not written over by one with the digits, which are what there is where MNIST is not.
"""

import ast
import hashlib
import json
import os
import re
import sys
import time
from pathlib import Path

import jupytext
import nbclient
import nbformat
import yaml

from gae_core import data

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOKS = ROOT / "notebooks"
MAX_BYTES = 1_500_000

# The first code cell of every notebook; the address comes from _config.yml.
SETUP = """\
# In Colab, fetch gae_core; anywhere else this cell does nothing. torch and numpy stay as they are.
import importlib.util
import subprocess
import sys
from pathlib import Path

REPOSITORY = "{repository}"  # `make notebooks` writes repository.url of _config.yml here
if "google.colab" in sys.modules and importlib.util.find_spec("gae_core") is None:
    if Path("gae_core.zip").exists():
        sys.path.insert(0, "gae_core.zip")
    elif REPOSITORY:
        subprocess.run([sys.executable, "-m", "pip", "install", "-q", "--no-deps", f"git+{{REPOSITORY}}"], check=True)
    else:
        raise RuntimeError("This copy names no repository: upload gae_core.zip, the folder gae_core zipped, beside it.")
"""
REPOSITORY_LINE = re.compile(r'^REPOSITORY = "[^"]*"', re.MULTILINE)

# Runs after the last cell and is not kept: what the notebook ran with. A notebook may set SEED and DATA.
STAMP = """
import json as _json, platform as _platform
_names = globals()
_data = next((v.name for v in list(_names.values())
              if type(v).__module__ == "gae_core.data" and isinstance(getattr(v, "name", None), str)), None)
_torch = sys.modules.get("torch")
print(_json.dumps({
    "device": str(_names["device"]) if "device" in _names else "cpu",
    "python": _platform.python_version(),
    "torch": _torch.__version__.split("+")[0] if _torch else None,
    "data": _names.get("DATA", _data),
    "seed": _names.get("SEED"),
}))
"""

MYST = re.compile(
    r"\{[a-z]+(?:[:-][a-z]+)*\}`"  # a role
    r"|^\s*(?:`{3,}|~{3,}|:{3,})\s*\{"  # a directive
    r"|^\([a-z0-9_-]+\)=\s*$"  # a target
    r"|^\$\$[ \t]*\([a-z0-9_-]+\)\s*$",  # a label after an equation
    re.MULTILINE,
)
ROOTS = "home|root|Users|work|tmp|private|content|mnt|opt|usr|var"
MACHINE_PATH = re.compile(rf"(?<![\w.:/])/(?:{ROOTS})/[\w.-]+")


def repository_url() -> str:
    """Return ``repository.url`` of _config.yml: empty while the project has no address."""
    config = yaml.safe_load((ROOT / "_config.yml").read_text(encoding="utf-8"))
    return config["repository"]["url"] or ""


def text(value) -> str:
    """Join what nbformat may store as a string or as a list of lines."""
    return value if isinstance(value, str) else "".join(value)


def cell_metadata(cell) -> dict:
    """Return the metadata that the two halves of a pair share: all but what a front end keeps for itself."""
    own = ("execution", "collapsed", "scrolled")
    return {key: value for key, value in cell["metadata"].items() if key not in own}


def same_code(one: str, other: str) -> bool:
    """Say whether two pieces of Python are the same but for layout and comments."""
    try:
        return ast.dump(ast.parse(one)) == ast.dump(ast.parse(other))
    except SyntaxError:
        return False


def problems(notebook, source, repository: str) -> list[str]:
    """List what is wrong with an executed notebook, in words that tell what to do.

    Args:
        notebook: the executed notebook.
        source: the notebook read from the ``.py`` that it is paired with.
        repository: the address that its set-up cell must carry.
    """
    again = "run `make notebooks`"
    wrong = []
    ours, theirs = notebook["cells"], source["cells"]
    if len(ours) != len(theirs):
        wrong.append(f"it has {len(ours)} cells, its .py {len(theirs)}: {again}")
    for index, (cell, written) in enumerate(zip(ours, theirs, strict=False)):
        for part in ("cell_type", "source"):
            if text(cell[part]).strip() != text(written[part]).strip():
                wrong.append(f"cell {index}: the {part} differs from the .py: {again}")
        if cell_metadata(cell) != cell_metadata(written):
            wrong.append(f"cell {index}: the metadata or tags differ from the .py: {again}")

    code = [text(cell["source"]) for cell in ours if cell["cell_type"] == "code"]
    if not code or not same_code(code[0], SETUP.format(repository=repository)):
        wrong.append("the first code cell is not the set-up cell (SETUP in book/_ext/make_notebooks.py)")
    for index, cell in enumerate(ours):
        if cell["cell_type"] == "markdown" and (found := MYST.search(text(cell["source"]))):
            wrong.append(f"cell {index}: MyST syntax {found[0].strip()!r}; write plain Markdown and $…$")
        if cell["cell_type"] == "code":
            if text(cell["source"]).strip() and cell.get("execution_count") is None:
                wrong.append(f"cell {index} was never executed: {again}")
            wrong += [f"cell {index}: {message}" for message in output_problems(cell)]
    return wrong


def output_problems(cell) -> list[str]:
    """List what is wrong with the outputs of one code cell."""
    wrong = []
    drawn = 0
    for output in cell.get("outputs", []):
        kind = output["output_type"]
        if kind == "error":
            wrong.append(f"raised {output['ename']}: {output['evalue']}")
            continue
        if kind == "stream" and output["name"] == "stderr":
            wrong.append(f"wrote to stderr: {text(output['text'])[:200]!r}")
        data = {"text/plain": output["text"]} if kind == "stream" else output.get("data", {})
        drawn += any(mime.startswith("image/") for mime in data)
        for mime, value in data.items():
            if mime.startswith("text/") and (found := MACHINE_PATH.search(text(value))):
                wrong.append(f"its output names a path of the machine: {found[0]}")
    if drawn:
        mystnb = cell["metadata"].get("mystnb", {})
        for group, key in (("figure", "name"), ("figure", "caption"), ("image", "alt")):
            if not mystnb.get(group, {}).get(key):
                wrong.append(f"draws an image but its mystnb metadata has no {group}.{key}")
        if sum(output["output_type"] != "stream" for output in cell["outputs"]) > 1:
            wrong.append("shows more than its one figure: split the cell, or end it with plt.show()")
    return wrong


def set_cell_ids(notebook) -> None:
    """Give each cell an id that follows from its content, so that making a notebook again changes no id."""
    seen: dict[str, int] = {}
    for cell in notebook["cells"]:
        digest = hashlib.sha256(f"{cell['cell_type']}\n{cell['source']}".encode()).hexdigest()[:12]
        seen[digest] = seen.get(digest, 0) + 1
        cell["id"] = digest if seen[digest] == 1 else f"{digest}-{seen[digest]}"


def execute(notebook, size: str):
    """Execute a notebook in place and stamp its metadata with what it ran with."""
    environment = {**os.environ, "GAE_SIZE": size, "MPLBACKEND": "module://matplotlib_inline.backend_inline"}
    stamp = nbformat.v4.new_code_cell(STAMP)
    notebook["cells"].append(stamp)
    client = nbclient.NotebookClient(
        notebook,
        timeout=None,
        record_timing=False,
        coalesce_streams=True,
        extra_arguments=["--log-level=ERROR"],
        resources={"metadata": {"path": str(NOTEBOOKS)}},
    )
    start = time.perf_counter()
    client.execute(env=environment)
    seconds = time.perf_counter() - start
    ran_with = json.loads(notebook["cells"].pop()["outputs"][0]["text"])
    notebook["metadata"]["gae"] = {**ran_with, "size": size, "seconds": round(seconds, 1)}


def fallback_problems(there: Path, notebook) -> list[str]:
    """Say what is wrong if a notebook fell back to the digits, and the one that is there ran on other data."""
    if not there.exists():
        return []
    before = nbformat.read(there, as_version=4)["metadata"].get("gae", {}).get("data")
    now = notebook["metadata"]["gae"]["data"]
    if now != "digits" or before in (None, "digits"):
        return []
    return [
        f"it ran on the digits, and {there.name} on {before}: it is left as it is, its captions speak of {before}. "
        f"Name the folder that has {before} with GAE_DATA, or fetch it: python -m gae_core data {before} "
        f"(for the digits after all, remove {there.name} first)"
    ]


def make(path: Path, size: str, repository: str) -> list[str]:
    """Make the executed notebook of one ``.py``; return its problems, and write it when there are none."""
    source = path.read_text(encoding="utf-8")
    addressed = REPOSITORY_LINE.sub(f'REPOSITORY = "{repository}"', source)
    if addressed != source:
        path.write_text(addressed, encoding="utf-8")
    notebook = jupytext.reads(addressed, fmt="py:percent")
    set_cell_ids(notebook)
    try:
        execute(notebook, size)
    except nbclient.exceptions.CellExecutionError as error:
        return [f"a cell raised an error\n{error}"]
    wrong = problems(notebook, jupytext.reads(addressed, fmt="py:percent"), repository)
    wrong += fallback_problems(path.with_suffix(".ipynb"), notebook)
    written = nbformat.writes(notebook, version=nbformat.NO_CONVERT) + "\n"
    if len(written.encode()) > MAX_BYTES:
        wrong.append(f"it is {len(written.encode()):,} bytes, at most {MAX_BYTES:,}: smaller figures")
    if not wrong:
        nbformat.validate(notebook)
        path.with_suffix(".ipynb").write_text(written, encoding="utf-8")
    return wrong


def main(names: list[str]) -> int:
    """Make the notebooks of these names, or all; return the exit status."""
    paths = [NOTEBOOKS / f"{name}.py" for name in names] or sorted(NOTEBOOKS.glob("*.py"))
    if not paths:
        print("There is no notebook in notebooks/.")
        return 1
    try:
        size = data.size_from_environment("short")
    except ValueError as error:
        print(error)
        return 1
    failed = 0
    for path in paths:
        if not path.exists():
            print(f"There is no notebooks/{path.name}.")
            return 1
        start = time.perf_counter()
        wrong = make(path, size, repository_url())
        print(f"{path.stem:20} {size:6} {time.perf_counter() - start:6.1f} s  {'FAILED' if wrong else 'ok'}")
        for message in wrong:
            print(f"    {message}")
        failed += bool(wrong)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
