"""One idea, one name, in every room: what a new model lacks is said by name."""

import ast
import re
from pathlib import Path

import pytest
import yaml

from gae_core.studies import registry
from gae_core.studies.family_map import MAP

ROOT = Path(__file__).parents[1]
PART_OF = {"local_linear": "gae", "text_vae": "bn_vae_text"}  # models of another one's chapter
ROW = {"bn_vae": "vae", "bn_vae_text": "vae"}  # chapters whose models stand in another one's row of the map
PARTS = ("__init__", "likelihoods")  # of models, none themselves
MODELS = sorted(path.stem for path in (ROOT / "gae_core" / "models").glob("*.py") if path.stem not in PARTS)
CHAPTERS_OF_MODELS = sorted({PART_OF.get(name, name) for name in MODELS})


def lacks(topic, root=ROOT, studies=registry.STUDIES, places=MAP):
    """What a model with a chapter of its own does not have yet."""
    toc = yaml.safe_load((root / "_toc.yml").read_text(encoding="utf-8"))
    listed = re.findall(r"'file': '([^']+)'", str(toc))
    intro = (root / "book" / "intro.md").read_text(encoding="utf-8")
    rooms = {
        f"book/{topic}.md": (root / "book" / f"{topic}.md").exists(),
        f"notebooks/{topic}.py": (root / "notebooks" / f"{topic}.py").exists(),
        f"tests/test_{topic}.py": (root / "tests" / f"test_{topic}.py").exists(),
        f"book/{topic} in _toc.yml": f"book/{topic}" in listed,
        f"notebooks/{topic} in _toc.yml": f"notebooks/{topic}" in listed,
        f"a link to {topic} in the table of book/intro.md": bool(
            re.search(rf"^\|.*\{{doc\}}`(?:[^`<]*<)?{topic}>?`", intro, re.MULTILINE)
        ),
        f"a study of {topic} in gae_core/studies/registry.py": any(
            topic in (name.removeprefix("family_"), study.topic) for name, study in studies.items()
        ),
        f"a place of {topic} in gae_core/studies/family_map.py": any(
            ROW.get(topic, topic) == place.chapter for place in places
        ),
    }
    return [what for what, there in rooms.items() if not there]


@pytest.mark.parametrize("topic", CHAPTERS_OF_MODELS)
def test_a_model_is_in_every_room(topic):
    missing = lacks(topic)
    assert not missing, f"{topic} lacks: {'; '.join(missing)}"


def test_a_new_model_is_told_what_it_lacks():
    missing = lacks("no_such_model")
    assert len(missing) == 8 and all("no_such_model" in what for what in missing)


def test_every_file_of_studies_is_in_the_registry():
    for path in (ROOT / "gae_core" / "studies").glob("*.py"):
        names = {
            target.id
            for node in ast.parse(path.read_text(encoding="utf-8")).body
            if isinstance(node, ast.Assign | ast.AnnAssign)
            for target in (node.targets if isinstance(node, ast.Assign) else [node.target])
            if isinstance(target, ast.Name)
        }
        if "STUDIES" in names and path.stem != "registry":
            assert any(topic.__name__.endswith(f".{path.stem}") for topic in registry.TOPICS), path.name
