"""Sentences that print or compare recorded values: the grammar on known records, then every one in the book."""

import math
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from claims import Reading, roles, spoken
from scipy import stats

from gae_core import records
from gae_core.records import less

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted(ROOT.glob("book/*.md"))


def put(folder, name, record="mnist-medium", seeds=(0, 1, 2), curves=None, **metrics):
    data, size = record.split("-")
    whole = dict.fromkeys(records.KEYS, "x") | {"model": name, "data": data, "size": size, "seeds": list(seeds)}
    whole |= {"training seconds": 12.5, "epochs": 42, "curves": curves or {}}
    whole["metrics"] = {key.replace("_", " "): records.summary(values) for key, values in metrics.items()}
    (folder / name).mkdir(exist_ok=True)
    records.write(folder / name / f"{record}.json", whole)


@pytest.fixture
def reading(tmp_path):
    put(tmp_path, "a", error=[1.0, 2.0, 3.0], loss=[-1.0, -1.0, -1.0], curves={"NLL": [[9.0] * 19 + [1, 3]] * 3})
    put(tmp_path, "b", error=[2.1, 3.0, 4.1])
    put(tmp_path, "one", seeds=[9], error=[1.0])
    put(tmp_path, "b2", error=[5.0, 1.0, 9.0])
    put(tmp_path, "five", seeds=range(5), error=[1.0, 2.0, 4.0, 5.0, 6.0])
    put(tmp_path, "c", error=[7.0, 7.0, 7.0], **{"Fréchet, N(0, I)": [210.0, 212.0, 214.0], "I(x; z)": [2.0, 2.5, 3.0]})
    put(tmp_path, "c", record="he2019-medium", error=[8.0, 8.0, 8.0])
    put(tmp_path, "c", record="he2019-full", error=[9.0, 9.0, 9.0])
    return Reading(tmp_path)


@pytest.mark.parametrize(
    ("text", "printed"),
    [
        ("a | error", "2.00 ± 0.58"),
        ("a | error; .1f", "2.0"),
        ("a | loss; .0f", "−1"),
        ("[b | error] - [a | error]", "1.067 ± 0.033"),  # of the pairs, not 0.58 * sqrt(2)
        ("[b | error] - 2 * [a | error]; .2f", "−0.93"),
        ("[a | error] / [b | error] ** 2; .3f", "0.209"),
        ("1 - [a | error] / 8; .0%", "75 %"),
        ("c@mnist | Fréchet, N(0, I); .0f", "212"),
        ("[c@mnist | I(x; z)]; .1f", "2.5"),
        ("[c@mnist | I(x; z)]", "2.50 ± 0.29"),
        ("c@he2019-full | error", "9 ± 0"),
        ("a | training seconds; .1f", "12.5"),
        ("a | last of NLL; .1f", "2.0"),
        ("a | highest of NLL; .1f", "9.0"),
        ("a | at 38 of NLL; .1f", "9.0"),  # a point every second epoch
        ("a | at 40 of NLL; .1f", "1.0"),
        ("a | at 42 of NLL; .1f", "3.0"),
        ("seeds([five | error]); .0f", "5"),
        ("seeds([five | training seconds]); .0f", "1"),
        ("a | point 1 of NLL; .1f", "9.0"),
        ("a | point 20 of NLL; .1f", "1.0"),
        ("a | point -1 of NLL; .1f", "3.0"),
        ("positive([b | error] - 3.0); .0f", "1"),
        ("max([a, b | error]); .1f", "3.1"),
        ("mean([a, b | error]); .2f", "2.53"),
        ("sqrt([c@mnist | error] + 2); .1f", "3.0"),
        ("-[a | error]; .1f", "−2.0"),
    ],
)
def test_a_value_is_printed_from_its_record(reading, text, printed):
    assert reading.say("value", text).replace("\N{NO-BREAK SPACE}", " ") == printed


@pytest.mark.parametrize(
    ("text", "holds"),
    [
        ("less([a | error], [b | error])", True),  # with every seed by one
        ("less([b | error], [a | error])", False),
        ("[a | error] < [b2 | error]", True),
        ("less([a | error], [b2 | error])", False),
        ("level([a | error], [b2 | error])", True),
        ("level([a | error], [b | error])", False),
        ("level([a | error], [b, b2 | error])", False),  # must be with each
        ("level([b2 | error], [a, b | error])", True),
        ("[c@mnist | I(x; z)] < [b | error]", True),
        ("less([a | error], [five | error])", False),  # seed by seed, of those that both have: 0, 0, 1
        ("near([a | error], 2.1, .11)", True),
        ("near([a | error], 2.2, .1)", False),
        ("less([a | error], [a, b | error])", False),  # must hold for each
        ("less([a | error] - 1, [a, b | error])", True),
        ("[a, b | error] < [c@mnist | error]", True),
        ("[a, b | error] < 3", False),
        ("1 < [a | error] <= 2", True),
        ("not [a | error] > 2 and [b | error] > 3", True),
        ("[a | error] > 2 or [b | error] > 3", True),
        ("[b* | error] > 3", True),
        ("by_seed([a | error]) >= 1", True),
        ("by_seed([a | error]) > 1", False),
        ("log([c@mnist | error]) < 2", True),
        ("less([b | error], [c@mnist | error])", True),  # the same with each of three seeds: exact
        ("less(exact([one | error]) - 2, [b | error])", True),
        ("less([b | error], exact([one | error]))", False),
        ("less(exact([one | error]), [c@mnist | error])", True),
    ],
)
def test_a_claim_is_printed_if_it_holds(reading, text, holds):
    assert reading.evaluate(text) is holds
    if holds:
        assert reading.say("claim", f"two thirds; {text}") == "two thirds"
    else:
        with pytest.raises(ValueError, match="the records do not say 'two thirds'"):
            reading.say("claim", f"two thirds; {text}")


def test_what_does_not_hold_is_told_with_its_values(reading):
    with pytest.raises(ValueError, match=r"\[a \| error\] = 2 > \[b \| error\] = 3.06"):
        reading.say("claim", "worse; [a | error] > [b | error]")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[none | error]", "must be one record, got 0"),
        ("[c | error]", "must be one record, got 3: there are he2019-full, he2019-medium, mnist-medium"),
        ("[c@he2019 | error]", "must be one record, got 2"),
        ("[a | eror]", "no 'eror', it has error, loss"),
        ("[a | last of loss]", "no 'last of loss'"),
        ("[a | at 41 of NLL]", "must name one of 21 points of a curve over 42 epochs"),
        ("[a | at 0 of NLL]", "must name one of 21 points"),
        ("[a | at 44 of NLL]", "must name one of 21 points"),
        ("[a | point 1 of loss]", "no 'point 1 of loss'"),
        ("[a | point 0 of NLL]", "no 'point 0 of NLL'"),
        ("[a | point 22 of NLL]", "point 22 must be one of the 21"),
        ("[a | point -22 of NLL]", "point -22 must be one of the 21"),
        ("less([one | error], [b | error])", "3 seeds or more"),  # of one seed nothing follows
        ("[one | error] < [b | error] and [none | error] > 0", "must be one record, got 0"),
        ("[a | error] < [b | error] or [none | error] > 0", "must be one record, got 0"),
        ("not ([a | error] or [b | error])", "must be conditions"),
        ("not less([a, b | error], [b | error])", "could mean two things"),
        ("near([a | error], 2, [a, b | error])", "one distance, got 2"),
        ("[a | error] <", "no expression"),
        ("[a | error] + [five | error]", "cannot be paired"),
        ("__import__('os')", "no part of an expression"),
        ("[a | error].mean", "no part of an expression"),
        ("[a, b | error] < [a, b, c@mnist | error]", "2 and 3"),
        ("'a'", "no part"),
        ("less([a | error])", "cannot be worked out"),
        ("[a | error] + ([b | error] < 3) > 1", "cannot be worked out"),
        ("[b | error] / ([a | error] - 2) > 1", "cannot be worked out"),
    ],
)
def test_what_cannot_be_read_is_refused(reading, text, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        reading.say("claim", f"so; {text}")


def test_a_value_is_one_number(reading):
    for text in ("[a, b | error]", "[a | error] < 3"):
        with pytest.raises(ValueError, match="must be one quantity"):
            reading.say("value", text)


def test_a_claim_without_a_condition_holds_nothing(reading):
    with pytest.raises(ValueError, match="no expression"):
        reading.say("claim", "a third less")


def test_roles_are_found_across_lines():
    text = "It is {value}`a | error`, {claim}`a third\nless; [a | error] <\n 3` of {eq}`eq-a`."
    assert list(roles(text)) == [("value", "a | error"), ("claim", "a third less; [a | error] < 3")]


def test_roles_are_found_in_a_table_of_markdown():
    assert list(roles(r"| cell | {claim}`less; [a \| error] < 3` |")) == [("claim", "less; [a | error] < 3")]


def test_roles_are_spoken_where_only_words_can_stand(reading):
    text = "It ends at {value}`a | error; .0f`, {claim}`below three; [a | error] < 3`."
    assert spoken(text, reading) == "It ends at 2, below three."
    with pytest.raises(ValueError, match="the records do not say 'above three'"):
        spoken("It is {claim}`above three; [a | error] > 3`.", reading)


def test_less_is_the_paired_t_test():
    generator = torch.Generator().manual_seed(0)
    for shift in (0.0, 0.5, 2.0, -2.0):
        a = torch.randn(5, generator=generator).double().numpy()
        b = a + shift + torch.randn(5, generator=generator).double().numpy()
        found = stats.ttest_rel(b, a, alternative="two-sided")
        assert less(a, b) == (found.pvalue < 0.05 and found.statistic > 0)
    shared = torch.randn(5, generator=generator).double().numpy() * 100
    above = shared + np.array([1, 1.1, 0.9, 1, 1.2])
    assert less(shared, above) and not less(above, shared)
    assert less([1.0], [1.1, 1.15, 1.2]) and not less([1.0], [0.5, 1.2, 1.6])
    # of two seeds nothing follows; and pairs must be pairs
    for a, b in (
        ([1.0, 1.0], [5.0, 5.1]),
        ([1.0], [2.0]),
        ([1.0, 2, 3], [1.0, 2, 3, 4]),
        ([1.0, 2, math.nan], [1.0] * 3),
    ):
        with pytest.raises(ValueError, match="a and b"):
            less(a, b)


BOOK = Reading(ROOT / "book" / "results")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_what_a_chapter_says_of_the_records_is_so(page):
    wrong = []
    for role, text in roles(page.read_text(encoding="utf-8")):
        try:
            BOOK.say(role, text)
        except ValueError as error:
            wrong.append(f"{role} {text!r}: {error}")
    assert not wrong, "\n".join(wrong)


TYPED = re.compile(r"(?<![\w.,/^_-])\d*\.\d+(?!\w|\.\d)|\d+ ?%")
NOT_PROSE = re.compile(
    r"(?s)(`{3,})(?!`).*?(?<!`)\1(?!`)|:::.*?:::|\$\$.*?\$\$|\$[^$]*\$"
    r"|\{\w[\w:]*\}`[^`]*`|`[^`]*`|\]\([^)]*\)|^\|.*?$",
    re.M,
)


def sections_with_tables(text):
    """The sections of a chapter that have a table of records, without what is no prose."""
    for section in re.split(r"(?m)^(?=#+ )", text):
        if re.search(r"\{results-(table|curves|plane)\}", section):
            yield NOT_PROSE.sub(" ", section)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_no_number_under_a_table_of_records_is_typed_by_hand(page):
    for section in sections_with_tables(page.read_text(encoding="utf-8")):
        assert not TYPED.findall(section), section[:80]


def test_a_typed_number_is_found():
    table = "## Runs\n\n```{results-table} a\n:rows: b 0.5\n```\n\n"
    (section,) = sections_with_tables(f"# A 0.1\n\n{table}It is $0.3$, {{value}}`a | b; .1f` and `0.7`.\n## B 0.2\n")
    assert not TYPED.findall(section)
    theorem = "````{prf:theorem} T\n```{math}\n0.5\n```\n````\n\n"  # whose fences are longer than those within
    (section,) = sections_with_tables(f"{table}{theorem}It is {{claim}}`so; [a | b] < .5`, {{value}}`a | b; .1f`.\n")
    assert not TYPED.findall(section)
    for typed in ("0.3", ".25", "12 %", "1.5 nats", "0.3. It"):
        (section,) = sections_with_tables(f"{table}It is {typed} here.")
        assert TYPED.findall(section)


@pytest.mark.parametrize(
    ("condition", "status", "shown"), [("[a | x] < 3", 0, "a third less"), ("[a | x] > 3", 1, "the records do not say")]
)
def test_the_build_fails_where_the_records_say_otherwise(tmp_path, condition, status, shown):
    (tmp_path / "book" / "results").mkdir(parents=True)
    put(tmp_path / "book" / "results", "a", x=[1.0, 2.0, 3.0])
    escaped = condition.replace("|", r"\|")
    text = f"# Page\n\nIt is {{claim}}`a third less; {condition}`, {{value}}`a | x; .1f` of it.\n"
    text += f"\n| a | b |\n|---|---|\n| in a cell | {{claim}}`much less; {escaped}` |\n"
    (tmp_path / "index.md").write_text(text, encoding="utf-8")
    command = [sys.executable, "-m", "sphinx", "-C", "-q", "-W", "-D", "extensions=myst_parser,claims", ".", "out"]
    paths = f"{ROOT / 'book' / '_ext'}{os.pathsep}{ROOT}"
    done = subprocess.run(
        command, cwd=tmp_path, env={**os.environ, "PYTHONPATH": paths}, capture_output=True, text=True
    )
    assert bool(done.returncode) == bool(status), done.stderr
    page = tmp_path / "out" / "index.html"
    assert shown in (done.stderr if status else page.read_text(encoding="utf-8"))
    assert status or '<span class="recorded">2.0</span>' in page.read_text(encoding="utf-8")


@pytest.mark.parametrize(("condition", "fails"), [("[a | x] < 3", False), ("[a | x] > 3", True)])
def test_the_alternative_text_of_curves_says_what_the_records_say(tmp_path, condition, fails):
    (tmp_path / "book" / "results").mkdir(parents=True)
    put(tmp_path / "book" / "results", "a", x=[1.0, 2.0, 3.0], curves={"loss": [[4.0, 2.0]] * 3})
    record = tmp_path / "book" / "results" / "a" / "mnist-medium.json"
    record.write_text(record.read_text(encoding="utf-8").replace('"epochs": "x"', '"epochs": 2'), encoding="utf-8")
    text = f"It falls to {{value}}`a | point 2 of loss; .0f`, {{claim}}`less; {condition}`."
    options = f":record: mnist-medium\n:curve: loss\n:alt: {text}"
    (tmp_path / "index.md").write_text(f"# Page\n\n```{{results-curves}} a\n{options}\nLoss.\n```\n", encoding="utf-8")
    extensions = "extensions=myst_parser,claims,results_table"
    command = [sys.executable, "-m", "sphinx", "-C", "-q", "-W", "-D", extensions, ".", "out/html"]
    paths = f"{ROOT / 'book' / '_ext'}{os.pathsep}{ROOT}"
    done = subprocess.run(
        command, cwd=tmp_path, env={**os.environ, "PYTHONPATH": paths}, capture_output=True, text=True
    )
    assert bool(done.returncode) == fails, done.stderr
    if fails:
        assert "the records do not say" in done.stderr
    else:
        assert 'alt="It falls to 2, less."' in (tmp_path / "out" / "html" / "index.html").read_text(encoding="utf-8")
