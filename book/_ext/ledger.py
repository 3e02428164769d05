"""The ledger of checks: which displayed equation of the book is checked by which test.

Every displayed equation in ``book/*.md`` has a label. A label that begins with ``eq-`` claims something, and at
least one test names it: ``@pytest.mark.checks("eq-...", how="symbolic")``. One that begins with ``def-`` defines.
"""

import ast
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

HOW = ("symbolic", "exact", "statistical")
LABEL = re.compile(r"(eq|def)-[a-z0-9_]+(-[a-z0-9_]+)*")
FENCE = re.compile(r"\s*(?P<mark>`{3,}|~{3,}|:{3,})\s*(?:\{(?P<directive>[^}]+)\})?(?P<rest>.*)")
AMSMATH = re.compile(r"\s*\\begin\{((?:equation|align|alignat|gather|multline|flalign|eqnarray)\*?)\}")
INLINE_CODE = re.compile(r"(?<!`)(`+)(?!`).*?(?<!`)\1(?!`)")
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


def equations(text: str, page: str = "") -> list[Equation]:
    """Find the displayed equations of a MyST page: ``$$``, ``{math}`` and bare amsmath environments.

    Args:
        text: the page.
        page: its name, for messages.

    Raises:
        ValueError: if a ``$$`` or a fence is never closed.
    """
    found: list[Equation] = []
    fences: list[tuple[str, bool, int]] = []  # the marks that opened it, whether its body is literal, its line
    lines = iter(enumerate(text.splitlines(), start=1))
    for number, line in lines:
        fence = FENCE.fullmatch(line)
        if fence:
            mark, rest = fence["mark"], fence["rest"].strip()
            bare = not fence["directive"] and not rest
            if fences and bare and mark[0] == fences[-1][0][0] and len(mark) >= len(fences[-1][0]):
                fences.pop()
                continue
            if fences and fences[-1][1]:
                continue
            if mark[0] == ":" or "`" not in rest:  # else it is inline code
                name = (fence["directive"] or "").strip()
                if name == "math":
                    found.append(Equation(_math_label(lines, mark, page, number), page, number))
                else:
                    literal = name in LITERAL or (not name and mark[0] != ":")
                    fences.append((mark, literal, number))
                continue
        if (fences and fences[-1][1]) or line.startswith("%"):
            continue
        if environment := AMSMATH.match(line):
            found.append(Equation(None, page, number))
            end = f"\\end{{{environment[1]}}}"
            while end not in line:
                _, line = _next(lines, end, page, number)
            continue
        rest = _without_code(line)
        while "$$" in rest:
            start = number
            rest = rest.split("$$", 1)[1]
            while "$$" not in rest:
                number, rest = _next(lines, "$$", page, start)
            rest = rest.split("$$", 1)[1]
            label = re.match(r"\s*\(([^)\s]+)\)", rest)
            found.append(Equation(label[1] if label else None, page, start))
            rest = _without_code(rest)
    if fences:
        raise ValueError(f"{page}:{fences[-1][2]}: this {fences[-1][0]} is never closed")
    return found


def _without_code(line: str) -> str:
    return INLINE_CODE.sub("", line.replace(r"\$", ""))


def _next(lines, wanted: str, page: str, start: int) -> tuple[int, str]:
    for number, line in lines:
        return number, line
    raise ValueError(f"{page}:{start}: {wanted} is missing: what opens here is never closed")


def _math_label(lines, mark: str, page: str, start: int) -> str | None:
    label = None
    while True:
        _, line = _next(lines, mark, page, start)
        if line.strip().startswith(mark) and not line.strip().strip(mark[0]):
            return label
        if option := re.fullmatch(r"\s*:label:\s*(\S+)\s*", line):
            label = option[1]


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
