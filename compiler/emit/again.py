"""Print what a block computes again: calls through `again`, and which blocks drop what."""

from __future__ import annotations

import ast
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from itertools import groupby

from llmspec.compiler.plan import EVERYTHING
from llmspec.compiler.text import Text

Operators = tuple[str, ...] | str

OPERATORS = {ast.Add: "add", ast.Sub: "sub", ast.Mult: "mul", ast.Div: "div"}
MODULES = ("F", "kernels", "torch")
"""Roots of names that are functions; anything else before a dot is a tensor."""


@dataclass(frozen=True, slots=True)
class Choices:
    """What the uses of one unit compute again, one entry each. words: says it for people, with what
    it saves and costs."""

    of_each: tuple[Operators, ...]
    constant: str
    words: Callable[[Operators], str]

    @property
    def full(self) -> bool:
        return set(self.of_each) == {EVERYTHING}

    @property
    def differ(self) -> bool:
        return len(set(self.of_each)) > 1

    @property
    def mixed(self) -> bool:
        """Whether some operators compute again, or only some of the blocks do."""
        return any(self.of_each) and not self.full

    @property
    def names(self) -> frozenset[str]:
        return frozenset(n for o in self.of_each if not isinstance(o, str) for n in o)

    def print(self, text: Text, title: str) -> None:
        """The constant that says which values each use drops."""
        drops = f"{title} drops after its forward and computes again in its backward"
        if not self.differ:
            text.line(f"# What {drops}.")
            text.line(f"# {self.words(self.of_each[0])}")
            text.line(f"{self.constant} = {_set(self.of_each[0])}")
            return
        distinct = [operators for operators in dict.fromkeys(self.of_each) if operators]
        names = {operators: self._name(i, len(distinct)) for i, operators in enumerate(distinct, 1)}
        for operators, name in names.items():
            text.line(f"# {self.words(operators)}")
            text.line(f"{name} = {_set(operators)}")
        text.line(f"# What {drops}.")
        text.line(f"{self.constant} = (")
        for operators, same in groupby(self.of_each):
            name, count = names.get(operators, "()"), len(list(same))
            text.line(f"    *{count} * [{name}]," if count > 1 else f"    {name},")
        text.line(")")

    def _name(self, number: int, count: int) -> str:
        name = self.constant.replace("RECOMPUTE", "DROPPED", 1)
        return f"{name}_{number}" if count > 1 else name


def _set(operators: Operators) -> str:
    if isinstance(operators, str):
        return "EVERYTHING"
    return f"{{{', '.join(map(repr, operators))}}}" if operators else "()"


def call_again(name: str, text: str, variables: Collection[str]) -> str:
    """`text`, an expression, so that its value may be dropped under this name: `f(x, y)` as
    `again("name", f, x, y)`. A view that it ends with is left outside.

    variables: names of tensors that the expression may read.
    """
    node, outside = ast.parse(text, mode="eval").body, ""
    while isinstance(node, ast.Call) and not _function(node.func):
        if not isinstance(node.func, ast.Attribute):
            break
        inner = node.func.value
        outside = _rest(text, inner) + outside
        text, node = ast.unparse(inner), inner
        node = ast.parse(text, mode="eval").body
    if isinstance(node, ast.Call) and _function(node.func):
        parts = [ast.unparse(node.func)]
        parts += [ast.unparse(a) for a in node.args]
        parts += [f"{k.arg}={ast.unparse(k.value)}" for k in node.keywords]
        return f'again("{name}", {", ".join(parts)}){outside}'
    if isinstance(node, ast.BinOp) and type(node.op) in OPERATORS and _tensor(node.left):
        sides = f"{ast.unparse(node.left)}, {ast.unparse(node.right)}"
        return f'again("{name}", torch.{OPERATORS[type(node.op)]}, {sides}){outside}'
    read = [n.id for n in ast.walk(node) if isinstance(n, ast.Name) and n.id in variables]
    given = ", ".join(dict.fromkeys(read))
    return f'again("{name}", lambda {given}: {text}, {given}){outside}'


def _tensor(node: ast.expr) -> bool:
    return not isinstance(node, (ast.Constant, ast.UnaryOp))


def _rest(text: str, inner: ast.expr) -> str:
    """What stands after the inner expression."""
    assert inner.end_col_offset is not None, "parsed from text"
    closing = text[inner.end_col_offset :]
    return closing.lstrip(")") if text.startswith("(") else closing


def _function(node: ast.expr) -> bool:
    """Whether this names a function: `rms_norm`, `F.linear`."""
    if isinstance(node, ast.Name):
        return True
    while isinstance(node, ast.Attribute):
        node = node.value
    return isinstance(node, ast.Name) and node.id in MODULES


def constant(unit: str, units: Sequence[str]) -> str:
    """The name of a unit's constant: RECOMPUTE where there is one."""
    words = "".join(c if c.isalnum() else "_" for c in unit).upper()
    return "RECOMPUTE" if len(units) == 1 else f"RECOMPUTE_{words}"
