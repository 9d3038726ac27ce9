"""The statements of a block, and of a model: assignments, `let`, the chain."""

from __future__ import annotations

from typing import TYPE_CHECKING

from llmspec.dsl import syntax
from llmspec.dsl.applying import Body
from llmspec.dsl.bodies import Function
from llmspec.dsl.diagnostics import fault, shown
from llmspec.dsl.options import INPUTS, OPERATORS
from llmspec.dsl.program import Arithmetic, Assign, Binding, Ref, Repeat, Span
from llmspec.dsl.shapes import Bound, Shape, Typed, Use
from llmspec.dsl.values import evaluate, no_meaning

if TYPE_CHECKING:
    from llmspec.dsl.models import Elaboration

MAX_UNROLLED = 64
"""Repetitions inside a block: each is written out there."""


class BlockBody(Body):
    """The statements of one block, for one set of input shapes."""

    def __init__(self, model: Elaboration, declaration: syntax.BlockDeclaration) -> None:
        super().__init__(model, set())
        self.declaration = declaration
        self.assigned: list[Assign] = []

    def emit(self, use: Use | Arithmetic, shape: Shape, natural: str) -> Typed:
        return Typed(use, shape)

    def repeat(self, node: syntax.Operation, count: int, main: Typed) -> Typed:
        if count > MAX_UNROLLED:
            raise fault(
                "E0213",
                f"a part is repeated {count} times inside a block, more than {MAX_UNROLLED}",
                node.span,
                helps=("make the part a block and repeat it in the model's chain",),
            )
        for function in self.flatten(node.first) * count:
            main = self.apply(function, main)
        return main

    def statement(self, statement: syntax.Statement) -> None:
        self.uses = 0
        match statement:
            case syntax.Setting(relation="="):
                self.assign(statement.key, statement.value, statement.span)
            case syntax.Let():
                if not self.let_function(statement):
                    self.assign(statement.name, statement.value, statement.span)
            case _:
                raise fault(
                    "E0211", "a block's lines assign values", statement.span, "expected `x = …`"
                )

    def let_function(self, statement: syntax.Let) -> bool:
        found = as_function(self, statement.value)
        if found is None:
            return False
        name = self.fresh(statement.name)
        self.functions[name] = Function(found.name, found.arguments, found.span, name)
        self.instances.taken.add(name)
        return True

    def fresh(self, name: syntax.Name) -> str:
        if self.is_function(name.text) or name.text in INPUTS:
            raise fault("E0217", f"`{shown(name.text)}` already has a meaning", name.span)
        return name.text

    def assign(self, name: syntax.Name, value: syntax.Node, span: Span) -> None:
        if self.is_constant(value):
            self.local[self.fresh(name)] = Bound(evaluate(value, self.lookup), span)
            return
        typed = self.tensor(value)
        if self.has_constant(name.text):
            raise fault("E0217", f"`{shown(name.text)}` is already a number", name.span)
        target = self.fresh(name)
        self.values[target] = Typed(Ref(target), typed.shape)
        self.assigned.append(Assign(target=target, value=typed.expr, span=span))


class ModelBody(Body):
    """The chains of a model: every use becomes a binding."""

    def __init__(self, model: Elaboration) -> None:
        super().__init__(model, set(INPUTS) | set(model.let_names))
        self.bindings: list[Binding] = []
        self.bound: set[str] = set()

    def emit(self, use: Use | Arithmetic, shape: Shape, natural: str) -> Typed:
        if isinstance(use, Arithmetic) or natural in self.bound:
            natural = self.instances.take(natural)
        return self.bind(use, shape, natural)

    def bind(self, value: Use | Arithmetic | Repeat, shape: Shape, name: str) -> Typed:
        self.bindings.append(Binding(name=name, value=value))
        self.bound.add(name)
        return Typed(Ref(name), shape)

    def repeat(self, node: syntax.Operation, count: int, main: Typed) -> Typed:
        functions = self.flatten(node.first)
        for function in functions:
            if function.instance is not None:
                raise no_meaning(
                    f"repeating `{function.instance}`, whose parameters are shared,", node.span
                )
        if not isinstance(main.expr, Ref):
            raise fault("E0207", "a number cannot enter a chain", node.span)
        if len(functions) > 1000:
            raise fault("E0213", "a repeated part has more than 1000 steps", node.span)
        uses: list[Use] = []
        fed = Typed(Ref(""), main.shape)
        for function in functions:
            self.uses = 0
            use, shape = self.build(function, fed)
            uses.append(use)
            fed = Typed(Ref(""), shape)
        if count > 1 and fed.shape != main.shape:
            raise fault(
                "E0207",
                "a repeated part does not give back what it takes",
                node.span,
                f"it takes {main.shape} and gives {fed.shape}",
            )
        name = uses[0].name
        if len(uses) > 1:
            name = self.instances.take("_".join(dict.fromkeys(f.name for f in functions)))
        made = Repeat(count=count, body=tuple(uses), input=main.expr, span=node.span)
        return self.bind(made, fed.shape, name)

    def statement(self, statement: syntax.Let | syntax.Line) -> Typed | None:
        """The value of a line or a value's `let`; None for a function's."""
        self.uses = 0
        before = len(self.bindings)
        if isinstance(statement, syntax.Line):
            return self.tensor(statement.value)
        name = statement.name.text
        found = as_function(self, statement.value)
        if found is not None:
            self.functions[name] = Function(found.name, found.arguments, found.span, name)
            return None
        typed = self.tensor(statement.value)
        if not isinstance(typed.expr, Ref):
            raise fault(
                "E0206", f"`{shown(name)}` is a number", statement.span, "write it without `let`"
            )
        if len(self.bindings) > before:
            last = self.bindings.pop()
            typed = self.bind(last.value, typed.shape, name)
        self.values[name] = typed
        return typed


def as_function(body: Body, node: syntax.Node) -> Function | None:
    """`let shared = mlp(…)`: an operator or block that still lacks its input."""
    if isinstance(node, syntax.Name) and body.is_function(node.text):
        return body.function(node)
    if not isinstance(node, syntax.Call) or not body.is_function(node.function.text):
        return None
    name = body.function(node).name
    row = OPERATORS.get(name) if name not in body.model.blocks else None
    for argument in node.arguments:
        if argument.name in body.input_names(name):
            return None
        if argument.name is None and (
            row is None or body.option_of(row, argument.value, ()) is None
        ):
            return None
    return body.function(node)
