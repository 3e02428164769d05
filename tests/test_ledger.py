"""The ledger of checks holds: every displayed equation is labelled, every claim is checked by a test."""

import ast
import re
from pathlib import Path

import ledger
import numpy as np
import pytest
from helpers import assert_z
from ledger import Check, Equation, checks, equations, problems

ROOT = Path(__file__).resolve().parents[1]


def test_every_equation_is_labelled_and_every_claim_checked():
    book, tests = ledger.read(ROOT)
    assert book, "the book has no displayed equation"
    wrong = problems(book, tests)
    assert not wrong, "\n" + "\n".join(wrong)


def test_every_theorem_has_a_proof():
    """It follows at once, or after words alone. A theorem without one would make the first page false."""
    proved = 0
    for path in sorted((ROOT / "book").glob("*.md")):
        text = path.read_text(encoding="utf-8")
        for opening in re.finditer(r"^(`{3,})\{prf:(theorem|lemma|proposition|corollary)\}(.*)$", text, re.MULTILINE):
            after = text[text.index(f"\n{opening[1]}\n", opening.end()) + len(opening[1]) + 2 :]
            between = re.split(r"^`{3,}\{prf:proof\}", after, maxsplit=1, flags=re.MULTILINE)[0]
            assert not re.search(r"^(#|`{3}|\$\$|$)", between.strip() + "-", re.MULTILINE), f"{path.name}:{opening[3]}"
            proved += 1
    assert proved


def test_a_simulation_is_compared_with_its_standard_error():
    for path in sorted((ROOT / "tests").glob("test_*.py")):
        source = path.read_text(encoding="utf-8")
        for node in ast.walk(ast.parse(source)):
            marks = getattr(node, "decorator_list", [])
            if any("how='statistical'" in ast.unparse(mark) for mark in marks):
                text = ast.unparse(node)
                assert "assert_z" in text or ".std(" in text, f"{path.name}: {node.name}"


def labels(text):
    return [equation.label for equation in equations(text)]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("$$ a = b $$ (eq-t-a)", ["eq-t-a"]),
        ("$$\na = b\n$$ (def-t-a)\n", ["def-t-a"]),
        ("$$\na = b\n$$\n", [None]),
        ("$$ a $$ (eq-t-a)\n$$ b $$ (eq-t-b)", ["eq-t-a", "eq-t-b"]),
        ("> $$ a $$ (eq-t-a)\n>\n> ```{math}\n> b\n> ```", ["eq-t-a", None]),
        ("```{math}\n:label: eq-t-a\na = b\n```", ["eq-t-a"]),
        (":::{math}\na = b\n:::", [None]),
        ("````{prf:theorem} T\n:label: thm-a\n```{math}\n:label: eq-t-a\na\n```\n$$ b $$\n````", ["eq-t-a", None]),
        (":::{prf:proof}\n$$\na\n$$ (eq-t-a)\n:::\n$$ b $$", ["eq-t-a", None]),
        ("\\begin{align}\na &= b\\\\\nb &= c\n\\end{align}\n$$ a $$ (eq-t-a)", [None, "eq-t-a"]),
        ("- item\n\n  $$\n  a\n  $$ (eq-t-a)", ["eq-t-a"]),
    ],
)
def test_equations_are_found(text, expected):
    assert labels(text) == expected


@pytest.mark.parametrize(
    "text",
    [
        "inline $a = b$ only",
        "```python\nx = '$$ a $$'\n```",
        "~~~\n$$ a $$\n~~~",
        "```{code-block} text\n$$ a $$\n```",
        "````\n```{math}\na\n```\n````",
        "the code `$$ a $$` and ``$$ `b` $$``",
        "% a comment: $$ a $$",
        r"a price of \$\$5",
    ],
)
def test_what_is_no_displayed_equation_is_ignored(text):
    assert labels(text) == []


@pytest.mark.parametrize("text", ["$$ a", "$$\na\n", "```{math}\na\n", "```python\n$$", ":::{note}\n"])
def test_what_is_never_closed_is_an_error(text):
    with pytest.raises(ValueError, match="never closed"):
        equations(text, "page.md")


@pytest.mark.parametrize("text", ["words $$ a $$ words", "$$ a $$ (eq-t-a) and $$ b $$ (eq-t-b)"])
def test_an_equation_amid_a_line_is_an_error(text):
    """The page shows dollars there."""
    with pytest.raises(ValueError, match=r"page\.md:1: this \$\$ is never closed, or does not begin and end its lines"):
        equations(text, "page.md")


def test_line_numbers_point_at_the_equation():
    assert equations("one\n\n$$\na\n$$ (eq-t-a)\n\n$$ b $$", "p") == [
        Equation("eq-t-a", "p", 3),
        Equation(None, "p", 7),
    ]
    assert equations("- item\n\n  ````{prf:proof} P\n  :label: l\n\n  ```{math}\n  a\n  ```\n  ````", "p") == [
        Equation(None, "p", 6)
    ]


def found(source):
    return [(check.label, check.how, check.function, check.runs) for check in checks(source)]


def test_markers_are_found_in_functions_and_methods():
    source = """
import pytest
@pytest.mark.checks("eq-t-a", how="symbolic")
@pytest.mark.checks("eq-t-b", how="exact")
def test_one(): pass
class TestTwo:
    @pytest.mark.parametrize("x", [1])
    @pytest.mark.checks("eq-t-c", how="statistical")
    def test_two(self, x): pass
def test_three(): pass
"""
    assert found(source) == [
        ("eq-t-a", "symbolic", "test_one", True),
        ("eq-t-b", "exact", "test_one", True),
        ("eq-t-c", "statistical", "test_two", True),
    ]


@pytest.mark.parametrize(
    "source",
    [
        "@pytest.mark.checks('eq-t-a', how='exact')\ndef helper(): pass",
        "@pytest.mark.skip\n@pytest.mark.checks('eq-t-a', how='exact')\ndef test_a(): pass",
        "@pytest.mark.xfail(strict=False)\n@pytest.mark.checks('eq-t-a', how='exact')\ndef test_a(): pass",
        "@pytest.mark.checks('eq-t-a', how='exact')\ndef test_a():\n    pytest.skip('no')",
    ],
)
def test_a_check_that_never_runs_does_not_count(source):
    wrong = problems([Equation("eq-t-a", "p", 1)], checks(source))
    assert any("never skipped" in message for message in wrong)
    assert any("no test checks eq-t-a" in message for message in wrong)


def check(label, how="exact"):
    return Check(label, how, "tests/test_t.py", 1, "test_t", True)


def test_agreement_has_no_problems():
    book = [Equation("eq-t-a", "p", 1), Equation("def-t-b", "p", 2)]
    assert problems(book, [check("eq-t-a")]) == []


@pytest.mark.parametrize(
    ("book", "tests", "message"),
    [
        ([Equation(None, "p", 7)], [], "p:7: the equation has no label"),
        ([Equation("thm-t-a", "p", 1)], [], "must begin with eq-"),
        ([Equation("eq-t-a", "p", 1)], [], "no test checks eq-t-a"),
        ([Equation("def-t-a", "p", 1), Equation("def-t-a", "q", 2)], [], "taken by p:1"),
        ([], [check("eq-t-a")], "the book has no equation eq-t-a"),
        ([Equation("eq-t-a", "p", 1)], [check("eq-t-a", how="by eye")], "how in symbolic"),
        ([Equation("eq-t-a", "p", 1)], [check("eq-t-a", how=None)], "how in symbolic"),
        ([Equation("eq-t-a", "p", 1)], [check(None)], "how in symbolic"),
    ],
)
def test_disagreement_is_reported(book, tests, message):
    assert any(message in line for line in problems(book, tests))


def test_assert_z_passes_at_the_mean_and_fails_away_from_it():
    values = np.random.default_rng(0).normal(2.0, 1.0, size=400)
    assert_z(values, 2.0)
    with pytest.raises(AssertionError, match="z = "):
        assert_z(values, 2.5)


@pytest.mark.parametrize("values", [[1.0] * 7, [1.0] * 20, [1.0] * 9 + [float("nan")], np.zeros((3, 9))])
def test_assert_z_refuses_values_without_a_standard_error(values):
    with pytest.raises(ValueError):
        assert_z(values, 1.0)
