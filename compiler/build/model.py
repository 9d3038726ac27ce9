"""From a model written in the language to its two-level graph."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import fx

from llmspec.compiler.build.builder import UnitBuilder
from llmspec.compiler.build.mixture import build_moe
from llmspec.compiler.build.operators import OPERATORS, Builder, Context
from llmspec.compiler.errors import Unsupported
from llmspec.compiler.graph import Instance, ModelGraph, Unit
from llmspec.compiler.ops import elementwise
from llmspec.compiler.ops.loss import cross_entropy
from llmspec.dsl.program import (
    Arithmetic,
    Binding,
    Block,
    BlockUse,
    Expr,
    Model,
    Number,
    Operator,
    Ref,
    Repeat,
)

BUILDERS: dict[str, Builder] = {**OPERATORS, "moe": build_moe}

ARITHMETIC = {
    "+": elementwise.add,
    "-": elementwise.subtract,
    "*": elementwise.multiply,
    "/": elementwise.divide,
}


@dataclass
class _Link:
    """One step of the chain: an operator or a block's use, with the prefix of its parameters."""

    use: Operator | BlockUse
    prefix: str


@dataclass
class _Values:
    """What names mean while a unit is built."""

    builder: UnitBuilder
    context: Context
    model: Model
    names: dict[str, fx.Node | float] = field(default_factory=dict)

    def value(self, expr: Expr) -> fx.Node | float:
        match expr:
            case Ref(name=name):
                return self.names[name]
            case Number(value=value):
                return value
            case Arithmetic():
                return self._arithmetic(expr)
            case Operator():
                return self._operator(expr)
            case BlockUse():
                return self._block(expr)

    def node(self, expr: Expr) -> fx.Node:
        value = self.value(expr)
        if not isinstance(value, fx.Node):
            raise Unsupported("a bare number is not a tensor", getattr(expr, "span", None))
        return value

    def _arithmetic(self, expr: Arithmetic) -> fx.Node | float:
        left, right = self.value(expr.left), self.value(expr.right)
        if not isinstance(left, fx.Node) and not isinstance(right, fx.Node):
            raise Unsupported("arithmetic between two numbers reached the graph", expr.span)
        if expr.op in "+*" and not isinstance(left, fx.Node):
            left, right = right, left
        wide = max(
            (n for n in (left, right) if isinstance(n, fx.Node)),
            key=lambda n: len(n.meta["shape"]),
        )
        return self.builder.call(
            ARITHMETIC[expr.op], left, right, label="x", dims=wide.meta["dims"]
        )

    def _operator(self, expr: Operator) -> fx.Node:
        inputs = tuple(self.node(e) for e in expr.inputs)
        with self.builder.scope(expr.name, expr.span):
            build = BUILDERS[expr.operator]
            return build(self.builder, inputs, dict(expr.options), self.context)

    def _block(self, use: BlockUse) -> fx.Node:
        """A block used inside another one is part of its graph, under a scope of its own."""
        block = self.model.block(use.block)
        inner = _Values(self.builder, self.context, self.model)
        inputs = [self.node(e) for e in use.inputs]
        inner.names = dict(zip(block.inputs, inputs, strict=True))
        with self.builder.scope(use.name, use.span):
            return inner.run(block)

    def run(self, block: Block) -> fx.Node:
        for statement in block.body:
            value = self.value(statement.value)
            if isinstance(value, fx.Node) and value.op == "call_function":
                value.meta["label"] = statement.target
            self.names[statement.target] = value
        return self.names[block.inputs[0]]  # type: ignore[return-value]


def _flatten_body(model: Model) -> list[_Link]:
    """The chain of uses, repeats unrolled."""
    links: list[_Link] = []
    previous = model.inputs[0] if model.inputs else "tokens"
    for binding in model.body:
        _check_chain(model, binding, previous)
        match binding.value:
            case Repeat(count=count, body=body):
                links += [_Link(use, f"{use.name}.{i}") for i in range(count) for use in body]
            case Operator() | BlockUse() as use:
                links.append(_Link(use, use.name if isinstance(use, BlockUse) else ""))
            case Arithmetic(span=span):
                raise Unsupported("arithmetic between whole chains", span)
        previous = binding.name
    return links


def _check_chain(model: Model, binding: Binding, previous: str) -> None:
    """Refuse what is not a single chain from the tokens to the logits."""
    value = binding.value
    match value:
        case Repeat(input=source, body=body):
            extra = any(len(use.inputs) > 1 for use in body)
            start: Expr = source
        case Operator(inputs=inputs) | BlockUse(inputs=inputs):
            extra, start = len(inputs) > 1, inputs[0]
        case _:
            return
    if extra or not isinstance(start, Ref) or start.name != previous:
        raise Unsupported("a model that is not one chain from tokens to logits", value.span)
    if len(model.inputs) > 1:
        raise Unsupported("a model with several inputs", model.span)


class _Builder:
    def __init__(self, model: Model, sequences: int, tokens: int):
        self.model, self.sequences, self.tokens = model, sequences, tokens
        self.links = _flatten_body(model)
        self.depth = sum(
            isinstance(link.use, BlockUse) or "." in link.prefix for link in self.links
        )
        self.units: dict[str, Unit] = {}
        self.instances: list[Instance] = []
        self.dropout = False

    def _context(self, builder: UnitBuilder) -> Context:
        made: list[fx.Node] = []
        count = iter(range(1000))

        def samples() -> fx.Node:
            if not made:
                made.append(builder.input("samples", (self.sequences,), "B"))
            self.dropout = True
            return made[0]

        return Context(depth=self.depth, samples=samples, next_dropout=lambda: next(count))

    def _flow(self, width: int) -> tuple[int, int, int]:
        return (self.sequences, self.tokens, width)

    def block_unit(self, link: _Link, width: int) -> None:
        """A repeated block or operator: one unit, many instances."""
        use = link.use
        name = use.block if isinstance(use, BlockUse) else use.name
        if name not in self.units:
            builder = UnitBuilder(name, use.span)
            values = _Values(builder, self._context(builder), self.model)
            if isinstance(use, BlockUse):
                block = self.model.block(use.block)
                first = block.inputs[0]
                values.names[first] = builder.input(first, self._flow(width), "BTD")
                result = values.run(block)
            else:
                values.names[""] = builder.input("x", self._flow(width), "BTD")
                result = values.node(use)
            self.units[name] = _checked(builder.finish(result))
        self.instances.append(Instance(unit=name, prefix=link.prefix))

    def plain_unit(self, name: str, links: list[_Link], width: int | None, last: bool) -> int:
        """Operators that stand alone: the head of the chain, its tail, or what lies between
        blocks.
        """
        builder = UnitBuilder(name, links[0].use.span if links else self.model.span)
        values = _Values(builder, self._context(builder), self.model)
        if width is None:
            flow = builder.input("tokens", (self.sequences, self.tokens), "BT")
        else:
            flow = builder.input("x", self._flow(width), "BTD")
        for link in links:
            values.names = dict.fromkeys(
                [e.name for e in link.use.inputs if isinstance(e, Ref)], flow
            )
            flow = values.node(link.use)
        if last:
            targets = builder.input("targets", (self.sequences, self.tokens), "BT")
            flow = builder.call(cross_entropy, flow, targets, label="loss", dims="")
        self.units[name] = builder.finish(flow)
        self.instances.append(Instance(unit=name, prefix=""))
        return flow.meta["shape"][-1] if flow.meta["shape"] else 0

    def build(self) -> ModelGraph:
        width: int | None = None
        pending: list[_Link] = []
        between = 0
        for link in self.links:
            alone = isinstance(link.use, Operator) and not link.prefix
            if alone:
                pending.append(link)
                continue
            if pending or width is None:
                name = "first" if width is None else f"between_{(between := between + 1)}"
                width = self.plain_unit(name, pending, width, last=False)
                pending = []
            self.block_unit(link, width)
            width = self.units[self.instances[-1].unit].result().meta["shape"][-1]
        if width is None:  # no block at all: the first operator opens the chain
            width = self.plain_unit("first", pending[:1], None, last=False)
            pending = pending[1:]
        self.plain_unit("last", pending, width, last=True)
        return ModelGraph(
            name=self.model.name,
            units=self.units,
            instances=tuple(self.instances),
            sequences=self.sequences,
            tokens=self.tokens,
            vocab=self.model.vocab,
            dropout=self.dropout,
        )


def _checked(unit: Unit) -> Unit:
    """A block that is repeated must hand on what it takes."""
    flow = next(n for n in unit.graph.nodes if n.op == "placeholder")
    if flow.meta["shape"] != unit.result().meta["shape"]:
        raise Unsupported(f"block `{unit.name}` changes the size of `{flow.target}`", unit.span)
    return unit


def build_model(model: Model, *, sequences: int, tokens: int) -> ModelGraph:
    """The graph of `model` for micro-batches of `sequences` × `tokens`.

    Errors: Unsupported for what has no meaning in the graph yet.
    """
    return _Builder(model, sequences, tokens).build()
