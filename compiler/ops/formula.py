"""Small expression graphs: what an element-wise or row-reducing operator computes, and its
derivative.

Every value stands on a grid of rows × columns, the columns being a tensor's last dimension. A value
that is the same for all rows (a norm's weight) has columns alone, a statistic of a row has rows
alone. Equal expressions of one `Maker` are one object, so what two operators both need is there
once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import fx

Number = int | float
Seen = tuple[bool, int | None]
"""Of keys: none after the query; fewer than so many before it (and after it)."""

ARITHMETIC = {"add": "+", "subtract": "-", "multiply": "*", "divide": "/"}
OVER_COLUMNS = ("row_mean", "row_sum", "row_max")
"""Of a row's values one."""
FUNCTIONS = ("sigmoid", "tanh", "erf", "exp", "rsqrt", "relu", "positive")
"""Of one value. `positive`: 1 where it is above zero, else 0."""


@dataclass(eq=False, slots=True, repr=False)
class Expr:
    """One value. op: `leaf`, `number`, one of ARITHMETIC, FUNCTIONS or OVER_COLUMNS, `column_sum`,
    `turn` ((a, b) -> (-b, a) of a row's halves), `keep` (a dropout's mask, scaled), or `seen` (x
    in columns that stand for keys that the row's query sees, else minus infinity).

    value: a number, a leaf's name, or what is seen. label: what a reader would call it, if
        anything.
    """

    maker: Maker = field(repr=False)
    op: str
    args: tuple[Expr, ...]
    value: Number | str | Seen | None
    rows: bool
    columns: bool
    label: str = ""

    def __add__(self, other: Expr | Number) -> Expr:
        return self.maker.binary("add", self, other)

    def __radd__(self, other: Number) -> Expr:
        return self.maker.binary("add", other, self)

    def __sub__(self, other: Expr | Number) -> Expr:
        return self.maker.binary("subtract", self, other)

    def __rsub__(self, other: Number) -> Expr:
        return self.maker.binary("subtract", other, self)

    def __mul__(self, other: Expr | Number) -> Expr:
        return self.maker.binary("multiply", self, other)

    def __rmul__(self, other: Number) -> Expr:
        return self.maker.binary("multiply", other, self)

    def __truediv__(self, other: Expr | Number) -> Expr:
        return self.maker.binary("divide", self, other)

    def __rtruediv__(self, other: Number) -> Expr:
        return self.maker.binary("divide", other, self)

    def __neg__(self) -> Expr:
        return self.maker.binary("multiply", self, -1)

    def named(self, label: str) -> Expr:
        """The first name that it is given stays."""
        self.label = self.label or label
        return self


@dataclass(eq=False, repr=False)
class Maker:
    """Makes the expressions of one group of operators."""

    known: dict[tuple[object, ...], Expr] = field(default_factory=dict)

    def make(
        self,
        op: str,
        args: Sequence[Expr] = (),
        value: Number | str | Seen | None = None,
        *,
        rows: bool | None = None,
        columns: bool | None = None,
    ) -> Expr:
        """rows, columns: what it extends over, if not over all that its arguments do."""
        key = (op, *map(id, args), type(value), value)
        if key not in self.known:
            over_rows = any(a.rows for a in args) if rows is None else rows
            over_columns = any(a.columns for a in args) if columns is None else columns
            self.known[key] = Expr(self, op, tuple(args), value, over_rows, over_columns)
        return self.known[key]

    def leaf(self, name: str, *, rows: bool, columns: bool) -> Expr:
        return self.make("leaf", (), name, rows=rows, columns=columns).named(name)

    def number(self, value: Number) -> Expr:
        return self.make("number", (), value, rows=False, columns=False)

    def binary(self, op: str, a: Expr | Number, b: Expr | Number) -> Expr:
        a = a if isinstance(a, Expr) else self.number(a)
        b = b if isinstance(b, Expr) else self.number(b)
        return self._simpler(op, a, b) or self.make(op, (a, b))

    def _simpler(self, op: str, a: Expr, b: Expr) -> Expr | None:
        """Without what changes nothing, numbers in front of products."""
        if op == "multiply" and b.op == "number" and a.op != "number":
            a, b = b, a
        x, y = (e.value if e.op == "number" else None for e in (a, b))
        if isinstance(x, (int, float)) and isinstance(y, (int, float)):
            made = {"add": x + y, "subtract": x - y, "multiply": x * y}.get(op)
            return None if made is None else self.number(made)
        match op:
            case "add" if x == 0:
                return b
            case "add" | "subtract" if y == 0:
                return a
            case "multiply" if x == 1:
                return b
            case "divide" if y == 1:
                return a
            case "multiply" if x is not None:
                return self.make(op, (a, b))
        if op in ("add", "subtract") and (inner := _negated(b)) is not None:
            return self.binary("subtract" if op == "add" else "add", a, inner)
        return None

    def apply(self, function: str, x: Expr) -> Expr:
        return self.make(function, (x,))

    def row_mean(self, x: Expr) -> Expr:
        return self.make("row_mean", (x,), rows=x.rows, columns=False)

    def row_sum(self, x: Expr) -> Expr:
        return self.make("row_sum", (x,), rows=x.rows, columns=False)

    def row_max(self, x: Expr) -> Expr:
        return self.make("row_max", (x,), rows=x.rows, columns=False)

    def turn(self, x: Expr) -> Expr:
        return self.make("turn", (x,))

    def sum_to(self, x: Expr, *, rows: bool, columns: bool, width: int) -> Expr:
        """What reaches an operand that was repeated: the sum over where it was. width: of a row."""
        if x.columns and not columns:
            x = self.row_mean(x) * width
        if x.rows and not rows:
            x = self.make("column_sum", (x,), rows=False, columns=x.columns)
        return x


def _negated(x: Expr) -> Expr | None:
    negative = x.op == "multiply" and x.args[0].op == "number" and x.args[0].value == -1
    return x.args[1] if negative else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Extra:
    """A tensor that an operator reads besides its operands: a table, or what a mask is drawn from.

    per: of the result's dimensions those that it runs along, as (first, stop). drawn: a dropout's.
    """

    name: str
    per: tuple[int, int]
    columns: bool
    integer: bool = False
    drawn: bool = False


@dataclass(frozen=True, slots=True)
class Given:
    """How a kernel's call gives it the extras of an operator: expressions, names to import."""

    texts: tuple[str, ...] = ()
    imports: tuple[tuple[str, str], ...] = ()


Value = Callable[[fx.Node, Maker, Sequence[Expr]], Expr]
Gradient = Callable[[fx.Node, Maker, Sequence[Expr], Expr, Expr], Sequence[Expr | None]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Formula:
    """An operator inside a kernel.

    value: (node, maker, operands) -> its result. Operands are its float ones and numbers, in order,
        then its extras.
    gradient: (node, maker, operands, result, gradient of the result) -> of each operand in turn.
    extras: tensors it reads besides. given: (node, its printed arguments, how it was placed) ->
        what the call passes for them. draws: it is a dropout.
    alone: it cannot be computed in one kernel with what makes its operand, or reads its result.
    """

    value: Value
    gradient: Gradient
    extras: Callable[[fx.Node], tuple[Extra, ...]] = lambda node: ()
    given: Callable[[fx.Node, Sequence[str], Any], Given] = lambda node, args, local: Given()
    draws: bool = False
    alone: bool = False


def in_order(roots: Iterable[Expr], known: Iterable[Expr] = ()) -> list[Expr]:
    """All that `roots` are made of, operands first; what is known already is left out."""
    seen = {id(e) for e in known}
    out: list[Expr] = []

    def visit(e: Expr) -> None:
        if id(e) in seen:
            return
        seen.add(id(e))
        for a in e.args:
            visit(a)
        out.append(e)

    for root in roots:
        visit(root)
    return out
