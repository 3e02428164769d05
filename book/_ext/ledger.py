"""The ledger of checks: which displayed equation of the book is checked by which test.

Every displayed equation in ``book/*.md`` has a label. A label that begins with ``eq-`` claims something, and at
least one test names it: ``@pytest.mark.checks("eq-...", how="symbolic")``. One that begins with ``def-`` defines.
"""

import ast
import functools
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import yaml
from markdown_it import MarkdownIt
from markdown_it.renderer import RendererHTML
from markdown_it.token import Token
from myst_parser.config.main import MdParserConfig
from myst_parser.parsers.mdit import create_md_parser

HOW = ("symbolic", "exact", "statistical")
LABEL = re.compile(r"(eq|def)-[a-z0-9_]+(-[a-z0-9_]+)*")
DIRECTIVE = re.compile(r"\{([^}]+)\}")
LITERAL = ("code", "code-block", "code-cell", "eval-rst", "literalinclude", "raw", "bibliography")


@dataclass(frozen=True)
class Equation:
    """A displayed equation: where it stands, and its label, or None where it has none."""

    label: str | None
    page: str
    line: int


@dataclass(frozen=True)
class Check:
    """One ``checks`` marker: the label, how it is checked, and the function that carries it."""

    label: str | None
    how: str | None
    module: str
    line: int
    function: str
    runs: bool


@functools.cache
def _parser() -> MarkdownIt:
    """The parser that the book is built with."""
    config = yaml.safe_load((Path(__file__).parents[2] / "_config.yml").read_text(encoding="utf-8"))
    options = MdParserConfig(enable_extensions=config["parse"]["myst_enable_extensions"])
    return create_md_parser(options, RendererHTML)


def equations(text: str, page: str = "") -> list[Equation]:
    """Find the displayed equations of a MyST page: ``$$``, ``{math}`` and bare amsmath environments.

    Args:
        text: the page.
        page: its name, for messages.

    Raises:
        ValueError: if a ``$$`` or a fence is never closed, or a ``$$`` stands where it displays nothing.
    """
    return list(_equations(text, page, 1))


def _equations(text: str, page: str, first: int) -> Iterator[Equation]:
    """Those of a part of a page, whose line number ``first`` it begins with."""
    lines = text.splitlines()
    for token in _parser().parse(text):
        number = first + token.map[0] if token.map else first
        if _astray(token):
            raise ValueError(f"{page}:{number}: this $$ is never closed, or does not begin and end its lines")
        if token.type in ("math_block", "math_block_label", "amsmath"):
            yield Equation(token.info if token.type == "math_block_label" else None, page, number)
        elif token.type in ("fence", "colon_fence"):
            if not lines[token.map[1] - 1].strip(" >").startswith(token.markup) or token.map[1] - token.map[0] < 2:
                raise ValueError(f"{page}:{number}: this {token.markup} is never closed")
            name = DIRECTIVE.match(token.info.strip())
            if name and name[1] == "math":
                label = re.search(r"^:label: *(\S+)", token.content, re.MULTILINE)
                yield Equation(label[1] if label else None, page, number)
            elif name and name[1] not in LITERAL:
                yield from _equations(token.content, page, number + 1)


def _astray(token: Token) -> bool:
    """Whether a ``$$`` is a part of an equation, or of a text: not of code, and not escaped."""
    if token.type == "inline":
        text = any("$" in part.content for part in token.children if part.type == "text")
        return text and "$$" in token.content.replace(r"\$", "")
    return token.type.startswith("math_block") and "$$" in token.content


def checks(source: str, module: str = "") -> list[Check]:
    """Find the ``checks`` markers of a test module, without importing it."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            continue
        names = [ast.unparse(mark.func if isinstance(mark, ast.Call) else mark) for mark in node.decorator_list]
        skipped = any(name.rpartition(".")[2] in ("skip", "skipif", "xfail") for name in names)
        skipped |= any(isinstance(n, ast.Call) and ast.unparse(n.func) == "pytest.skip" for n in ast.walk(node))
        test = node.name.startswith("test_") and not isinstance(node, ast.ClassDef)
        for name, mark in zip(names, node.decorator_list, strict=True):
            if name.rpartition(".")[2] == "checks":
                given = {keyword.arg: keyword.value for keyword in getattr(mark, "keywords", [])}
                first = mark.args[0] if getattr(mark, "args", []) else given.get("label")
                label = first.value if isinstance(first, ast.Constant) else None
                how = given.get("how")
                how = how.value if isinstance(how, ast.Constant) else None
                found.append(Check(label, how, module, mark.lineno, node.name, test and not skipped))
    return found


def problems(book: Iterable[Equation], tests: Iterable[Check]) -> list[str]:
    """List where book and tests disagree, in words that tell what to do."""
    wrong = []
    places: dict[str, Equation] = {}
    for equation in book:
        where = f"{equation.page}:{equation.line}"
        if equation.label is None:
            wrong.append(f"{where}: the equation has no label: write $$ … $$ (eq-…) or (def-…)")
        elif not LABEL.fullmatch(equation.label):
            wrong.append(f"{where}: the label {equation.label} must begin with eq- (a claim) or def-, in small letters")
        elif equation.label in places:
            first = places[equation.label]
            wrong.append(f"{where}: the label {equation.label} is taken by {first.page}:{first.line}")
        else:
            places[equation.label] = equation
    checked = set()
    for check in tests:
        where = f"{check.module}:{check.line} ({check.function})"
        if check.label is None or check.how not in HOW:
            wrong.append(f'{where}: write @pytest.mark.checks("eq-…", how=…) with how in {", ".join(HOW)}')
        elif not check.runs:
            wrong.append(f"{where}: a check stands on a test_ function that is never skipped")
        elif check.label not in places:
            wrong.append(f"{where}: the book has no equation {check.label}")
        else:
            checked.add(check.label)
    for label, equation in places.items():
        if label.startswith("eq-") and label not in checked:
            wrong.append(f"{equation.page}:{equation.line}: no test checks {label}")
    return wrong


def read(root: Path) -> tuple[list[Equation], list[Check]]:
    """Read the equations of ``book/*.md`` and the checks of ``tests/*.py`` below the root of the repository."""
    book = [
        equation
        for path in sorted((root / "book").glob("*.md"))
        for equation in equations(path.read_text(encoding="utf-8"), f"book/{path.name}")
    ]
    tests = [
        check
        for path in sorted((root / "tests").glob("*.py"))
        for check in checks(path.read_text(encoding="utf-8"), f"tests/{path.name}")
    ]
    return book, tests
