r"""Sphinx extension: sentences that say what the records say, or the build fails.

``{value}`` prints from records what stands before the semicolon, ``{claim}`` its words if the condition holds::

    {value}`eae | Fréchet, N(0, I)`                         212.3 ± 1.9
    {value}`[eae | squared error] / [vae | squared error]; .2f`   1.13
    {claim}`a third less; near([eae | NLL] / [vae | NLL], 2/3, .03)`   a third less

``[name | metric]`` is a metric of ``book/results/<name>/<record>.json`` by its seeds. ``name@he2019`` says which
record, or ``name@mnist-full``, where a name has several. ``[a, b_* | metric]`` are those of several names, for each of
which a comparison must hold. ``[name | last of NLL]`` is the mean of the last tenth of a curve, ``[name | highest of
NLL]`` its largest value, ``[name | at 400 of NLL]`` the one after 400 epochs (or steps, where these are counted),
``[name | point 8 of NLL]`` its eighth value, ``point -1`` the very last; ``[name | training seconds]`` an entry of the
record itself.

Arithmetic is done seed by seed, so that a difference has the error of a paired one; ``<`` compares means;
``less(a, b)`` is what the chapters call *clearly*, :func:`gae_core.records.less`, of the seeds that both have (what is
the same with each of two seeds or more counts as exact, and ``exact(x)`` says of one seed that nothing is random);
``level(a, b)`` that neither is clearly less; ``near(a, b, by)`` that they are no further apart than that. ``min``,
``max``, ``mean``, ``abs``, ``sqrt``, ``log``, ``by_seed`` (each seed's value), ``seeds`` (how many there are) and
``positive`` (with how many of them a quantity is above 0) are there too. ``{value}`` takes a format after the
semicolon, as Python's: ``.2f``, ``.0%``, ``,.0f``; without one it prints mean and standard error.

In a table of Markdown ``\|`` stands for ``|``. In the ``:alt:`` of curves and planes of records roles may stand too.
"""

import ast
import dataclasses
import functools
import math
import operator
import re
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path

from docutils import nodes
from sphinx.util import logging
from sphinx.util.docutils import SphinxRole

from gae_core import records

ROLE = re.compile(r"\{(value|claim)\}`([^`]+)`")
CURVE = re.compile(r"(last|highest|at (\d+)|point (-?[1-9]\d*)) of (.+)")
REFERENCE = re.compile(r"\[([^\[\]|]+?) \| ([^\[\]]+?)\]")
SEMICOLON = re.compile(r";(?![^\[\]]*\])")  # outside of a reference: there is a metric I(x; z)
MATHS = {
    **{ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv},
    ast.Pow: operator.pow,
}
ORDER = {ast.Lt: operator.lt, ast.LtE: operator.le, ast.Gt: operator.gt, ast.GtE: operator.ge, ast.Eq: operator.eq}


@dataclasses.dataclass(frozen=True)
class Quantity:
    """A number, or one for each seed, all of them paired in arithmetic."""

    by_seed: tuple[float, ...]
    seeds: tuple[int, ...] | None = None  # None: a number, in which nothing is random

    @property
    def mean(self) -> float:
        return statistics.fmean(self.by_seed)

    @property
    def exact(self) -> bool:
        """Whether nothing is random in it: a number, or the same with each of two seeds or more."""
        return not self.seeds or (len(self.seeds) > 1 and len(set(self.by_seed)) == 1)

    def with_(self, other: "Quantity", operation: Callable[[float, float], float]) -> "Quantity":
        """Combine two, seed by seed."""
        if self.seeds and other.seeds and self.seeds != other.seeds:
            if not self.exact and not other.exact:
                raise ValueError(f"seeds {self.seeds} and {other.seeds} cannot be paired: compare means with mean(...)")
            constant = dataclasses.replace(self if self.exact else other, seeds=None)
            return Quantity.with_(*((constant, other) if self.exact else (self, constant)), operation)
        n = max(len(q.by_seed) if q.seeds else 1 for q in (self, other))
        a, b = ((q.by_seed if q.seeds else q.by_seed[:1] * n) for q in (self, other))
        return Quantity(tuple(operation(x, y) for x, y in zip(a, b, strict=True)), self.seeds or other.seeds)


def clearly_less(a: Quantity, b: Quantity) -> bool:
    """:func:`gae_core.records.less` of the seeds that both have."""
    if a.exact and b.exact:
        return a.mean < b.mean
    if a.exact or b.exact:
        return records.less(*(q.by_seed[:1] if q.exact else q.by_seed for q in (a, b)))
    both = [seed for seed in a.seeds if seed in b.seeds]
    return records.less(*([q.by_seed[q.seeds.index(seed)] for seed in both] for q in (a, b)))


Quantities = list[Quantity]  # of several names; a comparison must hold for each


class Reading:
    """What expressions say of the records in a folder.

    Args:
        folder: holds ``<name>/<record>.json``.

    Attributes:
        read: the records that were, by path.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.read, self.several = folder, {}, False
        self.functions = {
            "less": lambda a, b: self._each(clearly_less, a, b),
            "exact": lambda a: [dataclasses.replace(q, seeds=None, by_seed=q.by_seed[:1]) for q in a],
            "level": lambda a, b: self._each(lambda x, y: not clearly_less(x, y) and not clearly_less(y, x), a, b),
            "near": self._near,
            "min": lambda *args: [min((q for a in args for q in a), key=lambda q: q.mean)],
            "max": lambda *args: [max((q for a in args for q in a), key=lambda q: q.mean)],
            "mean": lambda a: [Quantity((statistics.fmean(q.mean for q in a),))],
            "seeds": lambda a: [Quantity((float(len(q.by_seed) if q.seeds else 1),)) for q in a],
            "by_seed": lambda a: [Quantity((v,)) for q in a for v in sorted(q.by_seed)],
            "positive": lambda a: [Quantity((float(sum(v > 0 for v in q.by_seed)),)) for q in a],
            **{
                name: functools.partial(self._map, function)
                for name, function in {"abs": abs, "sqrt": math.sqrt, "log": math.log}.items()
            },
        }

    def _files(self, name: str) -> Iterator[Path]:
        name, _, stem = name.partition("@")
        folders = sorted(self.folder.glob(name)) if "*" in name else [self.folder / name]
        for folder in folders:
            files = [p for p in sorted(folder.glob("*.json")) if not p.name.endswith(".part.json")]
            if stem:
                files = [p for p in files if stem in (p.stem, p.stem.rpartition("-")[0])]
            if "*" in name and not files:
                continue
            if len(files) != 1:
                there = ", ".join(p.stem for p in sorted(folder.glob("*.json"))) or "none"
                raise ValueError(f"{name}@{stem} must be one record, got {len(files)}: there are {there}")
            yield files[0]

    def _record(self, path: Path) -> dict:
        if path not in self.read:
            self.read[path] = records.check(path)
        return self.read[path]

    def look_up(self, names: str, metric: str) -> Quantities:
        """The metric of each of some names, by seed.

        Raises:
            ValueError: if there is no such record, or it has no such metric.
        """
        found = []
        for path in [path for name in names.split(",") for path in self._files(name.strip())]:
            record = self._record(path)
            curve = CURVE.fullmatch(metric)
            if metric in record["metrics"]:
                values = record["metrics"][metric]["by seed"]
            elif curve and curve[4] in record.get("curves", {}):
                values = [self._of_curve(curve, c, record["epochs"]) for c in record["curves"][curve[4]]]
            elif isinstance(record.get(metric), int | float):
                found.append(Quantity((float(record[metric]),)))
                continue
            else:
                raise ValueError(f"{path.parent.name} has no {metric!r}, it has {', '.join(record['metrics'])}")
            found.append(Quantity(tuple(values), tuple(record["seeds"])))
        return found

    @staticmethod
    def _of_curve(what: re.Match, curve: list[float], epochs: int) -> float:
        if what[1] == "last":
            return statistics.fmean(curve[-max(1, len(curve) // 10) :])
        if what[1] == "highest":
            return max(curve)
        if what[3]:
            if abs(at := int(what[3])) > len(curve):
                raise ValueError(f"point {at} must be one of the {len(curve)} that the curve has")
            return curve[at - (at > 0)]
        points = int(what[2]) * len(curve)  # as the curves are drawn, the last point is after all epochs
        if points % epochs or not 0 < points <= epochs * len(curve):
            raise ValueError(f"{what[0]!r} must name one of {len(curve)} points of a curve over {epochs} epochs")
        return curve[points // epochs - 1]

    def _map(self, function: Callable, a: Quantities) -> Quantities:
        return [dataclasses.replace(q, by_seed=tuple(map(function, q.by_seed))) for q in a]

    def _pairs(self, a: Quantities, b: Quantities) -> Iterator[tuple[Quantity, Quantity]]:
        if 1 not in (len(a), len(b)) and len(a) != len(b):
            raise ValueError(f"{len(a)} and {len(b)} quantities cannot be paired")
        n = max(len(a), len(b))
        self.several |= n > 1
        yield from zip(a * (n // len(a)), b * (n // len(b)), strict=True)

    def _near(self, a: Quantities, b: Quantities, by: Quantities) -> bool:
        if len(by) != 1:
            raise ValueError(f"near needs one distance, got {len(by)}")
        return self._each(lambda x, y: abs(x.mean - y.mean) <= by[0].mean, a, b)

    def _each(self, holds: Callable[[Quantity, Quantity], bool], a: Quantities, b: Quantities) -> bool:
        return all(holds(x, y) for x, y in self._pairs(a, b))

    def evaluate(self, text: str) -> Quantities | bool:
        """The value of an expression.

        Raises:
            ValueError: for what is no expression, or one of records that are not there.
        """
        references: list[tuple[str, str]] = []

        def name(match: re.Match) -> str:
            references.append((match[1].strip(), match[2].strip()))
            return f"_{len(references) - 1}"

        if "[" not in text and " | " in text:
            text = f"[{text}]"
        try:
            tree = ast.parse(REFERENCE.sub(name, text).strip(), mode="eval").body
        except SyntaxError as error:
            raise ValueError(f"{text!r} is no expression") from error

        def conditions(nodes: list[ast.AST]) -> list[bool]:
            """All of them, so that none is taken on trust."""
            found = [value(node) for node in nodes]
            if wrong := [ast.unparse(n) for n, v in zip(nodes, found, strict=True) if not isinstance(v, bool)]:
                raise ValueError(f"{', '.join(wrong)} in {text!r} must be conditions, and are quantities")
            return found

        def value(node: ast.AST) -> Quantities | bool:
            match node:
                case ast.Constant(value=int() | float() as number):
                    return [Quantity((float(number),))]
                case ast.Name(id=key) if key[0] == "_" and key[1:].isdigit():
                    return self.look_up(*references[int(key[1:])])
                case ast.UnaryOp(op=ast.USub(), operand=operand):
                    return self._map(operator.neg, value(operand))
                case ast.UnaryOp(op=ast.Not(), operand=operand):
                    self.several = False
                    (found,) = conditions([operand])
                    if self.several:
                        raise ValueError(
                            f"not {ast.unparse(operand)} of several names could mean two things, in {text!r}"
                        )
                    return not found
                case ast.BinOp(left=left, op=op, right=right) if type(op) in MATHS:
                    pairs = self._pairs(value(left), value(right))
                    return [x.with_(y, MATHS[type(op)]) for x, y in pairs]
                case ast.BoolOp(op=op, values=values):
                    return (all if isinstance(op, ast.And) else any)(conditions(values))
                case ast.Compare(left=left, ops=ops, comparators=others) if all(type(op) in ORDER for op in ops):
                    sides = [value(v) for v in (left, *others)]
                    return all(
                        self._each(lambda x, y, op=op: ORDER[type(op)](x.mean, y.mean), a, b)
                        for op, a, b in zip(ops, sides, sides[1:], strict=False)
                    )
                case ast.Call(func=ast.Name(id=key), args=args, keywords=[]) if key in self.functions:
                    return self.functions[key](*map(value, args))
            raise ValueError(f"{ast.unparse(node)!r} in {text!r} is no part of an expression; see book/_ext/claims.py")

        try:
            return value(tree)
        except (ArithmeticError, TypeError) as error:
            raise ValueError(f"{text!r} cannot be worked out: {error}") from error

    def say(self, role: str, text: str) -> str:
        """What a role prints.

        Raises:
            ValueError: for a claim that does not hold, and as in :meth:`evaluate`.
        """
        before, *rest = (part.strip() for part in SEMICOLON.split(text, maxsplit=1))
        after = "".join(rest)
        if role == "claim":
            if self.evaluate(after) is not True:
                raise ValueError(f"the records do not say {before!r}: {self.explain(after)}")
            return before
        found = self.evaluate(before)
        if isinstance(found, bool) or len(found) != 1:
            raise ValueError(f"{before!r} must be one quantity, got {found}")
        if after:
            return format(found[0].mean, after).replace("-", "\N{MINUS SIGN}").replace("%", "\N{NO-BREAK SPACE}%")
        return records.cell(records.summary(found[0].by_seed)).replace("-", "\N{MINUS SIGN}")

    def explain(self, condition: str) -> str:
        """A condition with what its references are."""

        def shown(match: re.Match) -> str:
            found = self.look_up(match[1], match[2])
            return f"{match[0]} = {', '.join(f'{q.mean:.5g}' for q in found)}"

        return REFERENCE.sub(shown, condition)


def roles(text: str) -> Iterator[tuple[str, str]]:
    """The roles of a chapter's source: name and content, as it is read outside of a table."""
    for match in ROLE.finditer(text):
        yield match[1], " ".join(match[2].replace(r"\|", "|").split())


def spoken(text: str, reading: Reading) -> str:
    """A text in which roles stand, with what they print: for places where Sphinx wants plain words.

    Raises:
        ValueError: as in :meth:`Reading.say`.
    """
    return ROLE.sub(lambda match: reading.say(match[1], " ".join(match[2].split())), text)


class Claim(SphinxRole):
    """Both roles."""

    def run(self):
        """Return the text."""
        reading = Reading(Path(self.env.srcdir) / "book" / "results")
        try:
            text = reading.say(self.name, " ".join(self.text.split()))
        except ValueError as error:
            logging.getLogger(__name__).warning("%s: %s", self.name, error, location=self.get_location())
            text = "?"
        for path in reading.read:
            self.env.note_dependency(str(path))
        return [nodes.inline("", text, classes=["recorded"])], []


def setup(app):
    """Register the roles."""
    app.add_role("value", Claim())
    app.add_role("claim", Claim())
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
