"""The floors of the package: a module imports from floors below its own, and the mathematics can be copied alone."""

import ast
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MATHEMATICS = ("gaussian", "entropy", "normalization", "densities", "chains", "information", "energy")
FLOORS = [
    {*MATHEMATICS, "seeds"},
    {"nets", "data", "parallel", "text", "training"},
    {"models", "languages"},
    {"train", "metrics", "plots", "records"},
    {"studies"},
    {"__main__"},
]
FILES = sorted((ROOT / "gae_core").rglob("*.py"))


def room(name):
    """The second part of a dotted name: gae_core.models.eae is in the room models."""
    return name.split(".")[1] if "." in name else name


def floor(name):
    found = [i for i, rooms in enumerate(FLOORS) if room(name) in rooms]
    assert found, f"{name} is on no floor: add {room(name)} to FLOORS here, and to MATHEMATICS if it is"
    return found[0]


def imports(path, top_level=False):
    """Dotted names that a file imports; ``from gae_core import data`` counts as gae_core.data."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in tree.body if top_level else ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}: relative import"
            bare = node.module == "gae_core"
            yield from ([f"gae_core.{alias.name}" for alias in node.names] if bare else [node.module])


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_down(path):
    relative = path.relative_to(ROOT).with_suffix("")
    if relative.name == "__init__":  # the face of a folder: what is in it, or nothing
        assert all(name.startswith(".".join(relative.parent.parts)) for name in imports(path) if "gae_core" in name)
        return
    own = ".".join(relative.parts)
    for name in imports(path):
        if name.startswith("gae_core"):
            below = floor(name) < floor(own)
            same = room(name) == room(own)
            door = room(own) == "__main__"
            assert below or same or door, f"{own} imports {name}, which is not on a floor below"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_a_file_can_be_read_at_one_sitting(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 350, f"split {path.name}"


@pytest.mark.parametrize("name", MATHEMATICS)
def test_a_file_of_mathematics_needs_torch_alone(name):
    allowed = {"torch", *sys.stdlib_module_names}
    found = {n.split(".")[0] for n in imports(ROOT / "gae_core" / f"{name}.py", top_level=True)}
    assert found <= allowed, f"{name} imports {found - allowed} on loading"


def test_what_the_readme_hands_out_alone_are_the_files_of_mathematics():
    section = (
        (ROOT / "README.md").read_text(encoding="utf-8").split("## One file for your project")[1].split("\n## ")[0]
    )
    alone = re.findall(r"^\| `gae_core/(\w+)\.py` \|", section, re.MULTILINE)
    assert sorted(alone) == sorted(MATHEMATICS)


def test_models_need_torch_and_the_package_alone():
    allowed, known = {"torch", *sys.stdlib_module_names}, set()
    waiting = sorted((ROOT / "gae_core" / "models").glob("*.py"))
    while waiting:
        path = waiting.pop()
        known.add(path)
        for name in imports(path, top_level=True):
            if name.startswith("gae_core"):
                file = ROOT.joinpath(*name.split(".")).with_suffix(".py")
                waiting += [file] if file.exists() and file not in known else []
            else:
                assert name.split(".")[0] in allowed, f"{path.name} imports {name} on loading"
    assert len(known) > len(list((ROOT / "gae_core" / "models").glob("*.py")))


def test_the_readmes_snippet_runs_on_copied_files(tmp_path, monkeypatch):
    for name in ("entropy", "normalization"):
        (tmp_path / f"{name}.py").write_text((ROOT / "gae_core" / f"{name}.py").read_text(encoding="utf-8"))
        monkeypatch.delitem(sys.modules, name, raising=False)
    snippet = (ROOT / "README.md").read_text(encoding="utf-8").split("```python\n")[1].split("```")[0]
    monkeypatch.syspath_prepend(tmp_path)
    import torch

    names = {"encoder": torch.nn.Linear(5, 2), "decoder": torch.nn.Linear(2, 5), "batch": torch.randn(20, 5), "dim": 2}
    exec(snippet, names)
    names["loss"].backward()
    assert names["encoder"].weight.grad.abs().sum() > 0
    for name in ("entropy", "normalization"):
        assert Path(sys.modules[name].__file__).parent == tmp_path
    # The loss has a floor: codes that are spread a thousand times as wide gain nothing.
    before = names["loss"].item()
    with torch.no_grad():
        for parameter in names["encoder"].parameters():
            parameter.mul_(1000)
    exec(snippet, names)
    assert names["loss"].item() == pytest.approx(before, abs=1e-2)
