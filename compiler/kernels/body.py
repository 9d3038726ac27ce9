"""Print a kernel's expressions as statements: in plain PyTorch, and in Triton's language."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from llmspec.compiler.ops.formula import ARITHMETIC, Expr, in_order

SUM, PRODUCT, ATOM = 1, 2, 3
"""How tightly a printed expression binds."""
BINDS = {"add": SUM, "subtract": SUM, "multiply": PRODUCT, "divide": PRODUCT}


RESERVED = (
    *("at", "column", "columns", "ctx", "first", "grid", "inside", "kind", "other", "output"),
    *("raised", "row", "rows", "sign", "stream", "threshold", "tile", "tl", "torch", "turned"),
    "wide",
)
"""Names that functions around the statements use."""


@dataclass(frozen=True, slots=True)
class Text:
    text: str
    binds: int = ATOM

    def within(self, binds: int) -> str:
        return self.text if self.binds >= binds else f"({self.text})"


@dataclass
class Body:
    """Statements that compute `roots` in order.

    special: prints what a dialect has words of its own for; None: arithmetic.
    names: of what is there already, and of what has been printed.
    """

    roots: Sequence[Expr]
    names: dict[int, str]
    special: Callable[[Body, Expr], Text | None]
    lines: list[tuple[str, str]] = field(default_factory=list)
    taken: set[str] = field(default_factory=set)

    def run(self) -> list[tuple[str, str]]:
        self.taken |= {*self.names.values(), *RESERVED}
        order = [e for e in self._order() if e.op not in ("leaf", "number")]
        uses: dict[int, int] = {}
        for e in order:
            for a in e.args:
                uses[id(a)] = uses.get(id(a), 0) + 1
        ends = {id(r) for r in self.roots}
        for e in order:
            if id(e) in self.names:
                continue
            if e.label or uses.get(id(e), 0) > 1 or id(e) in ends:
                text = self._print(e).text
                self.names[id(e)] = self._fresh(e.label or _WORDS.get(e.op, e.op))
                self.lines.append((self.names[id(e)], text))
        return self.lines

    def _order(self) -> list[Expr]:
        there: Iterable[Expr] = [e for e in in_order(self.roots) if id(e) in self.names]
        return in_order(self.roots, there)

    def _fresh(self, word: str) -> str:
        name, number = word, 2
        while name in self.taken:
            name, number = f"{word}_{number}", number + 1
        self.taken.add(name)
        return name

    def expression(self, e: Expr) -> Text:
        """A name where there is one."""
        return Text(self.names[id(e)]) if id(e) in self.names else self._print(e)

    def argument(self, e: Expr) -> str:
        return self.expression(e).text

    def _print(self, e: Expr) -> Text:
        if (own := self.special(self, e)) is not None:
            return own
        if e.op == "number":
            return Text(repr(e.value), ATOM if str(e.value)[0] != "-" else SUM)
        sign = ARITHMETIC[e.op]
        left, right = e.args
        if e.op == "multiply" and left.op == "number" and left.value == -1:
            return Text(f"-{self.expression(right).within(ATOM)}", PRODUCT)
        binds = BINDS[e.op]
        # a + b + c needs no brackets, a - (b + c) does
        after = binds + (e.op in ("subtract", "divide") or right.op == "divide")
        return Text(
            f"{self.expression(left).within(binds)} {sign} {self.expression(right).within(after)}",
            binds,
        )


_WORDS = {
    "add": "total",
    "subtract": "rest",
    "multiply": "product",
    "divide": "ratio",
    "row_mean": "mean",
    "row_sum": "total",
    "row_max": "top",
    "seen": "seen",
    "turn": "turned",
}


# --------------------------------------------------------------------------------------------------
# PyTorch


def plain(body: Body, e: Expr) -> Text | None:
    match e.op:
        case "row_mean":
            x = body.expression(e.args[0]).within(ATOM)
            return Text(f"{x}.mean(-1, keepdim=True)")
        case "row_sum":
            x = body.expression(e.args[0]).within(ATOM)
            return Text(f"{x}.sum(-1, keepdim=True)")
        case "row_max":
            x = body.expression(e.args[0]).within(ATOM)
            return Text(f"{x}.amax(-1, keepdim=True)")
        case "seen":
            x, places = body.expression(e.args[0]).within(ATOM), body.argument(e.args[1])
            keys = f"{body.names[_LIKE]}.shape[-1]"
            hidden = f"hidden_keys({places}, {keys}, causal={_causal(e)}{_window(e)})"
            return Text(f'{x}.masked_fill({hidden}, float("-inf"))')
        case "column_sum":
            x = body.expression(e.args[0]).within(ATOM)
            return Text(f"{x}.flatten(0, -2).sum(0)")
        case "turn":
            return Text(f"turned({body.argument(e.args[0])})")
        case "keep":
            samples, places = map(body.argument, e.args)
            like = body.names[_LIKE]
            return Text(f"keep_scaled({like}, {samples}, {places}, stream, threshold, raised)")
        case "relu" | "positive" as op:
            value = body.expression(e.args[0])
            if op == "relu":
                return Text(f"torch.relu({value.text})")
            return Text(f"({value.within(PRODUCT)} > 0)")
        case "sigmoid" | "tanh" | "erf" | "exp" | "rsqrt" as function:
            return Text(f"torch.{function}({body.argument(e.args[0])})")
    return None


_LIKE = -1
"""Under this key stands the name of a tensor of the group's whole shape."""


def plain_body(roots: Sequence[Expr], names: dict[int, str], like: str) -> Body:
    return Body(roots, names | {_LIKE: like}, plain)


# --------------------------------------------------------------------------------------------------
# Triton


def in_triton(body: Body, e: Expr) -> Text | None:
    match e.op:
        case "row_mean":
            x = _inside(body, e.args[0], "columns")
            return Text(f"tl.sum({x}, axis=1)[:, None] / COLUMNS", PRODUCT)
        case "row_sum":
            return Text(f"tl.sum({_inside(body, e.args[0], 'columns')}, axis=1)[:, None]")
        case "row_max":
            x = body.argument(e.args[0])
            # of a row outside too there is one: what is computed of it is no NaN
            here = f'tl.where(column < COLUMNS, {x}, float("-inf"))'
            return Text(f"tl.max({here}, axis=1)[:, None]")
        case "seen":
            x, place = map(body.argument, e.args)
            return Text(f'tl.where({_visible(e, place)}, {x}, float("-inf"))')
        case "column_sum":
            return Text(f"tl.sum({_inside(body, e.args[0], 'rows')}, axis=0)[None, :]")
        case "turn":
            return Text(f"turned_{body.argument(e.args[0])}")
        case "keep":
            sample, place = map(body.argument, e.args)
            bits = f"random_bits(random_bits(stream, {sample}), {place} + column)"
            return Text(f"tl.where({bits} >= threshold, raised, 0.0)")
        case "relu":
            return Text(f"tl.maximum({body.argument(e.args[0])}, 0.0)")
        case "positive":
            return Text(f"tl.where({body.argument(e.args[0])} > 0, 1.0, 0.0)")
        case "tanh":
            x = body.expression(e.args[0]).within(PRODUCT)
            return Text(f"2 * tl.sigmoid(2 * {x}) - 1", SUM)
        case "sigmoid" | "erf" | "exp" | "rsqrt" as function:
            return Text(f"tl.{function}({body.argument(e.args[0])})")
    return None


def _causal(e: Expr) -> bool:
    assert isinstance(e.value, tuple), "what is seen"
    return e.value[0]


def _window(e: Expr) -> str:
    assert isinstance(e.value, tuple), "what is seen"
    return "" if e.value[1] is None else f", window={e.value[1]}"


def _visible(e: Expr, place: str) -> str:
    """Of a column, a key, and of a query's place among the keys."""
    assert isinstance(e.value, tuple), "what is seen"
    causal, window = e.value
    parts = [f"(column <= {place})"] if causal else []
    if window is not None:
        parts.append(f"({place} - column < {window})")
        parts += [] if causal else [f"(column - {place} < {window})"]
    return " & ".join(parts) if len(parts) > 1 else parts[0].strip("()")


def _inside(body: Body, e: Expr, over: str) -> str:
    """The value, 0 where the tile is larger than the tensor: what is loaded there is 0 already."""
    x = body.argument(e)
    return x if zero_outside(e, over) else f"tl.where(inside, {x}, 0.0)"


def zero_outside(e: Expr, over: str) -> bool:
    """Whether a value is 0 in columns (or rows) beyond the tensor's last, leaves being so."""
    match e.op:
        case "leaf":
            return e.columns if over == "columns" else e.rows
        case "number":
            return e.value == 0
        case "multiply":
            zero = any(zero_outside(a, over) for a in e.args)
            return zero and all(finite_outside(a, over) for a in e.args)
        case "add" | "subtract":
            return all(zero_outside(a, over) for a in e.args)
        case "tanh" | "erf" | "relu" | "positive":
            return zero_outside(e.args[0], over)
    return False


def finite_outside(e: Expr, over: str) -> bool:
    """Whether it surely is a number there: 0 times infinity is none."""
    match e.op:
        case "leaf" | "number" | "keep" | "row_mean" | "row_sum" | "row_max" | "positive":
            return True
        case "exp":
            return zero_outside(e.args[0], over)
        case "divide":
            return e.args[1].op == "number" and finite_outside(e.args[0], over)
        case "seen":
            return False
    return all(finite_outside(a, over) for a in e.args)


def triton_body(roots: Sequence[Expr], names: dict[int, str]) -> Body:
    return Body(roots, dict(names), in_triton)
