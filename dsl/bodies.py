"""What the bodies of models and blocks share: names, calls, chains and arithmetic."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NoReturn

from llmspec.dsl import syntax
from llmspec.dsl.diagnostics import did_you_mean, fault, shown
from llmspec.dsl.operators import Given
from llmspec.dsl.options import INPUTS, OPERATORS
from llmspec.dsl.program import Arithmetic, Number, Span
from llmspec.dsl.shapes import Bound, Flow, Instances, Shape, Typed, Use
from llmspec.dsl.values import (
    CONSTANTS,
    Names,
    Value,
    calculate,
    evaluate,
    no_meaning,
    number_of,
    plain,
)

if TYPE_CHECKING:
    from llmspec.dsl.models import Elaboration

MAX_USES = 256
"""Operators and blocks in one statement, and terms in one sum: beyond that it is no longer text."""


class Poisoned(Exception):
    """Leaves a statement that reads a value whose own fault is already reported."""


@dataclass(frozen=True, slots=True)
class Function:
    """An operator or block with its arguments, not yet applied.

    instance: the `let` that named it.
    """

    name: str
    arguments: tuple[syntax.Argument, ...]
    span: Span
    instance: str | None = None


class Expressions:
    """values: tensors by name (None: poisoned). local: constants. functions: lets of operators."""

    def __init__(self, model: Elaboration, taken: set[str]) -> None:
        self.model = model
        self.values: dict[str, Typed | None] = {}
        self.local: dict[str, Bound] = {}
        self.functions: dict[str, Function] = {}
        self.instances = Instances(taken)
        self.uses = 0
        self.lookup = Names(self.find_constant, self.known_constants)

    # The two bodies differ in these.

    def emit(self, use: Use | Arithmetic, shape: Shape, natural: str) -> Typed:
        raise NotImplementedError

    def repeat(self, node: syntax.Operation, count: int, main: Typed) -> Typed:
        raise NotImplementedError

    # Constants

    def find_constant(self, name: str) -> Value:
        if name in self.local:
            return self.local[name].value
        return self.model.constant(name).value

    def known_constants(self) -> Iterable[str]:
        return {**self.local, **self.model.env}

    def has_constant(self, name: str) -> bool:
        return name in self.local or name in self.model.env

    def is_constant(self, node: syntax.Node) -> bool:
        match node:
            case syntax.Quantity():
                return True
            case syntax.Name():
                return node.text not in self.values and self.has_constant(node.text)
            case syntax.Negative():
                return self.is_constant(node.value)
            case syntax.Operation():
                return all(self.is_constant(n) for n in (node.first, *(r for _, r in node.rest)))
            case _:
                return False

    def given(self, node: syntax.Node, span: Span) -> Given:
        cause = None
        if isinstance(node, syntax.Name) and node.text not in CONSTANTS:
            bound = self.local.get(node.text) or self.model.env.get(node.text)
            cause = bound.span if bound else None
        return Given(evaluate(node, self.lookup), span, cause)

    def count(self, node: syntax.Node) -> int:
        value = evaluate(node, self.lookup)
        if plain(value) and isinstance(value, int) and value >= 1:
            return value
        raise fault(
            "E0303", "a count of repetitions must be a whole number of at least 1", node.span
        )

    # Tensors

    def tensor(self, node: syntax.Node) -> Typed:
        match node:
            case syntax.Name():
                return self.named(node)
            case syntax.Quantity():
                number = number_of(node)
                if not isinstance(number, int | float):
                    raise fault("E0302", "a unit has no place in a model's arithmetic", node.span)
                return Typed(Number(float(number)), Shape(Flow.NUMBER))
            case syntax.Call():
                return self.apply(self.function(node), None)
            case syntax.Negative():
                return self.combine(
                    "*",
                    Typed(Number(-1.0), Shape(Flow.NUMBER)),
                    self.tensor(node.value),
                    node.span,
                )
            case syntax.Operation():
                return self.operation(node)
            case syntax.Chain():
                main = self.tensor(node.links[0])
                for link in node.links[1:]:
                    main = self.link(link, main)
                return main
            case _:
                raise fault("E0212", "this cannot stand in a model", node.span)

    def named(self, node: syntax.Name) -> Typed:
        name = node.text
        if name in self.values:
            found = self.values[name]
            if found is None:
                raise Poisoned
            return found
        if self.has_constant(name):
            value = self.lookup(name)
            if isinstance(value, int | float) and not isinstance(value, bool):
                return Typed(Number(float(value)), Shape(Flow.NUMBER))
            raise fault("E0206", f"`{shown(name)}` is not a number", node.span)
        if self.is_function(name):
            raise fault(
                "E0209",
                f"`{shown(name)}` needs an input",
                node.span,
                helps=(f"write `{name}(x)`, or put a value before it: `x -> {name}`",),
            )
        self.unknown(name, node.span)

    def operation(self, node: syntax.Operation) -> Typed:
        if len(node.rest) > MAX_USES:
            raise fault("E0213", f"an expression has more than {MAX_USES} terms", node.span)
        total = self.tensor(node.first)
        for op, right in node.rest:
            total = self.combine(op, total, self.tensor(right), node.span)
        return total

    def combine(self, op: str, left: Typed, right: Typed, span: Span) -> Typed:
        if isinstance(left.expr, Number) and isinstance(right.expr, Number):
            value = calculate(op, left.expr.value, right.expr.value, span)
            return Typed(Number(float(value)), left.shape)
        for side in (left, right):
            if side.shape.flow not in (Flow.FEATURES, Flow.NUMBER):
                raise fault("E0207", f"arithmetic on {side.shape.flow}", span, "needs features")
        shapes = [s.shape for s in (left, right) if s.shape.flow == Flow.FEATURES]
        if len({s.width for s in shapes}) > 1:
            raise fault(
                "E0207",
                f"widths of {shapes[0].width} and {shapes[1].width} do not go together",
                span,
                f"`{op}` needs equal widths",
            )
        made = Arithmetic(op=op, left=left.expr, right=right.expr, span=span)
        return self.emit(made, shapes[0], "sum")

    # Chains

    def link(self, node: syntax.Node, main: Typed) -> Typed:
        match node:
            case syntax.Name() | syntax.Call():
                return self.apply(self.function(node), main)
            case syntax.Chain():
                for link in node.links:
                    main = self.link(link, main)
                return main
            case syntax.Operation() if all(op == "*" for op, _ in node.rest):
                return self.repeat(node, self.repetitions(node), main)
            case _:
                raise fault(
                    "E0212",
                    "this cannot follow `->`",
                    node.span,
                    "expected an operator or a block, perhaps `* count`",
                )

    def repetitions(self, node: syntax.Operation) -> int:
        total = 1
        for op, right in node.rest:
            if op != "*":
                raise fault("E0212", "only `*` repeats a part of a chain", node.span)
            total *= self.count(right)
            if total > 10_000:
                raise fault(
                    "E0213", "a part of a chain is repeated more than 10_000 times", right.span
                )
        return total

    def flatten(self, node: syntax.Node) -> list[Function]:
        """The functions of a repeated part, in order, inner repetitions written out."""
        match node:
            case syntax.Name() | syntax.Call():
                return [self.function(node)]
            case syntax.Chain():
                return [f for link in node.links for f in self.flatten(link)]
            case syntax.Operation():
                inner, count = self.flatten(node.first), self.repetitions(node)
                if len(inner) * count > 10_000:
                    raise fault("E0213", "a repeated part has more than 10_000 steps", node.span)
                return inner * count
            case _:
                raise fault("E0212", "this cannot be repeated", node.span)

    # Functions

    def is_function(self, name: str) -> bool:
        return name in self.functions or name in self.model.blocks or name in OPERATORS

    def function(self, node: syntax.Name | syntax.Call) -> Function:
        name = node.text if isinstance(node, syntax.Name) else node.function.text
        arguments = () if isinstance(node, syntax.Name) else node.arguments
        span = node.span if isinstance(node, syntax.Name) else node.function.span
        if name in self.functions:
            return self.shared(self.functions[name], arguments, node.span)
        if not self.is_function(name):
            self.not_a_function(name, span)
        return Function(name, arguments, node.span)

    def shared(
        self, function: Function, arguments: tuple[syntax.Argument, ...], span: Span
    ) -> Function:
        inputs = self.input_names(function.name)
        for argument in arguments:
            if argument.name is not None and argument.name not in inputs:
                raise fault(
                    "E0202",
                    f"`{function.instance}` is shared, so its options are given once, at its `let`",
                    argument.span,
                )
        return replace(function, arguments=function.arguments + arguments, span=span)

    def input_names(self, name: str) -> tuple[str, ...]:
        if name in self.model.blocks:
            return tuple(p.name.text for p in self.model.blocks[name].parameters if not p.default)
        row = OPERATORS[name]
        return row.inputs + row.optional_inputs

    def not_a_function(self, name: str, span: Span) -> NoReturn:
        if name in self.values or self.has_constant(name):
            raise fault("E0209", f"`{shown(name)}` is a value, it cannot be applied", span)
        if name in self.model.functions:
            raise no_meaning(f"`{name}`, shared between the model and its blocks,", span)
        self.unknown(name, span)

    def unknown(self, name: str, span: Span) -> NoReturn:
        known = {*self.values, *self.local, *self.model.env, *self.functions, *self.model.blocks}
        known |= {n for n, row in OPERATORS.items() if row.meaning} | set(INPUTS)
        helps = did_you_mean(name, known)
        if name in self.model.body_values:
            helps = (f"a block sees only its inputs: declare `{name}` as one and pass it",)
        raise fault("E0201", f"`{shown(name)}` is not known here", span, helps=helps)

    # Applying (applying.py)

    def apply(self, function: Function, main: Typed | None) -> Typed:
        raise NotImplementedError
