"""A model's declaration and its parameters' values in; a `Model` with every option resolved out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from llmspec.dsl import syntax
from llmspec.dsl.bodies import Function, Poisoned
from llmspec.dsl.diagnostics import Diagnostic, Fault, did_you_mean, fault, listing, shown
from llmspec.dsl.model_bodies import BlockBody, ModelBody
from llmspec.dsl.operators import Given, Options
from llmspec.dsl.options import INPUTS, MEASURES, OPERATORS
from llmspec.dsl.parameters import count_uses
from llmspec.dsl.program import (
    Arithmetic,
    Binding,
    Block,
    BlockUse,
    Model,
    Operator,
    Option,
    Ref,
    Repeat,
    Span,
)
from llmspec.dsl.shapes import Bound, Flow, Shape, Typed
from llmspec.dsl.values import CONSTANTS, Names, Value, evaluate, plain

MAX_OPERATORS = 100_000
Report = Callable[[Diagnostic], None]


class Elaboration:
    """One model on its way: constants, blocks, and what its body uses."""

    def __init__(self, name: str, span: Span, env: Mapping[str, Bound], report: Report) -> None:
        self.name = name
        self.span = span
        self.env: dict[str, Bound] = dict(env)
        self.report = report
        self.faulty = False
        self.used: set[str] = set()
        self.measures: dict[str, int | None] = {}
        self.blocks: dict[str, syntax.BlockDeclaration] = {}
        self.functions: dict[str, Function] = {}
        self.body_values: dict[str, Typed | None] = {}
        self.let_names: list[str] = []
        self.made: dict[object, tuple[Block, Shape]] = {}
        self.active: list[str] = []
        self.embeds: dict[str, Options] = {}
        self.ties: list[tuple[str, Option, Option, Span]] = []

    @contextmanager
    def collecting(self) -> Iterator[None]:
        """Faults inside are reported, and the next statement goes on."""
        try:
            yield
        except Fault as error:
            self.faulty = True
            self.report(error.diagnostic)
        except Poisoned:
            self.faulty = True

    def constant(self, name: str) -> Bound:
        self.used.add(name)
        return self.env[name]

    # Statements

    def elaborate(self, body: tuple[syntax.Statement, ...]) -> Model | None:
        for statement in body:
            with self.collecting():
                self.declare(statement)
        for measure in MEASURES:
            with self.collecting():
                self.measures[measure] = self.measure(measure)
            self.measures.setdefault(measure, None)
        model_body, output = self.run_body(body)
        if self.faulty:
            return None
        with self.collecting():
            return self.finish(model_body, output)
        return None

    def declare(self, statement: syntax.Statement) -> None:
        match statement:
            case syntax.BlockDeclaration():
                self.fresh(statement.name)
                self.blocks[statement.name.text] = statement
            case syntax.Setting():
                if statement.relation != "=":
                    raise fault("E0211", "a model's settings are written with `=`", statement.span)
                self.fresh(statement.key)
                value = evaluate(
                    statement.value, Names(lambda n: self.constant(n).value, lambda: self.env)
                )
                self.env[statement.key.text] = Bound(value, statement.span)
            case syntax.Let():
                self.fresh(statement.name)
                self.let_names.append(statement.name.text)

    def fresh(self, name: syntax.Name) -> None:
        text = name.text
        taken = text in self.env or text in self.blocks or text in self.let_names
        if taken or text in OPERATORS or text in INPUTS or text in CONSTANTS:
            raise fault("E0217", f"`{shown(text)}` already has a meaning", name.span)

    def measure(self, name: str) -> int | None:
        if name not in self.env:
            return None
        bound = self.constant(name)
        if plain(bound.value) and isinstance(bound.value, int) and 1 <= bound.value <= 2**40:
            return bound.value
        raise fault("E0303", f"a model's `{name}` must be a whole number of at least 1", bound.span)

    def run_body(self, body: tuple[syntax.Statement, ...]) -> tuple[ModelBody, Typed | None]:
        model_body = ModelBody(self)
        model_body.values.update({n: Typed(Ref(n), Shape(Flow.IDS)) for n in INPUTS})
        self.functions, self.body_values = model_body.functions, model_body.values
        output: Typed | None = None
        lines = [s for s in body if isinstance(s, syntax.Line)]
        for statement in body:
            if isinstance(statement, syntax.Let):
                with self.collecting():
                    model_body.values.setdefault(statement.name.text, None)
                    if model_body.statement(statement) is None:
                        del model_body.values[statement.name.text]
            elif isinstance(statement, syntax.Line):
                with self.collecting():
                    output = model_body.statement(statement)
        with self.collecting():
            if len(lines) != 1:
                raise self.not_one_line(lines)
        for name in self.blocks.keys() - self.reached():
            with self.collecting():
                self.untouched(name)
        return model_body, output

    def not_one_line(self, lines: list[syntax.Line]) -> Fault:
        help_ = "a model ends in one chain, like `tokens -> embed -> layer * 12 -> unembed`"
        if not lines:
            return fault("E0212", f"model `{self.name}` has no chain", self.span, helps=(help_,))
        return fault(
            "E0212",
            f"model `{self.name}` has more than one chain",
            lines[1].span,
            "the second one",
            secondary=((lines[0].span, "the first one"),),
            helps=("name the earlier ones: `let read = …`",),
        )

    def reached(self) -> set[str]:
        return {block.name for block, _ in self.made.values()}

    def untouched(self, name: str) -> None:
        if not self.faulty:
            where = self.blocks[name].name.span
            raise fault("E0218", f"block `{name}` is never used", where)

    def finish(self, body: ModelBody, output: Typed | None) -> Model:
        assert output is not None, "a body without faults has an output"
        for statement_name, bound in self.env.items():
            if statement_name not in self.used and statement_name not in MEASURES:
                raise fault(
                    "E0218",
                    f"`{shown(statement_name)}` is never used in model `{self.name}`",
                    bound.span,
                    helps=did_you_mean(statement_name, self.used - {statement_name}),
                )
        if output.shape.flow != Flow.LOGITS or body.bindings[-1].name != output.expr.name:  # type: ignore[union-attr]
            raise fault(
                "E0212",
                f"model `{self.name}` does not end in logits",
                self.span,
                f"it ends in {output.shape}",
                helps=("end the chain with `-> unembed`",),
            )
        blocks = tuple(block for block, _ in self.made.values())
        model = Model(
            name=self.name,
            vocab=self.wanted("vocab"),
            context=self.wanted("context"),
            width=self.wanted("width"),
            inputs=tuple(n for n in INPUTS if n in free_names(body.bindings)),
            blocks=blocks,
            body=self.tied(body.bindings),
            span=self.span,
        )
        if count_uses(model) > MAX_OPERATORS:
            raise fault(
                "E0213", f"model `{self.name}` has more than {MAX_OPERATORS:_} operators", self.span
            )
        return model

    def wanted(self, name: str) -> int:
        value = self.measures[name]
        if value is None:
            raise fault(
                "E0210",
                f"the model's `{name}` is not set",
                self.span,
                helps=(f"write `{name} = …` in the model",),
            )
        return value

    # Ties

    def note_embed(self, name: str, options: Options) -> None:
        self.embeds[name] = options

    def note_unembed(self, options: Options, tied: Given | None, span: Span) -> None:
        if tied is None or tied.value in (None, False):
            options["tied"] = None
            return
        wanted = tied.value
        if wanted is True:
            if len(self.embeds) != 1:
                count = len(self.embeds) or "no"
                raise fault(
                    "E0219",
                    f"`tied` needs one embedding, there are {count}",
                    tied.span,
                    helps=("name the one that is meant: `let table = embed`, `tied=table`",),
                )
            wanted = next(iter(self.embeds))
        if not isinstance(wanted, str) or wanted not in self.embeds:
            raise fault(
                "E0219",
                "an unembedding can only be tied to an embedding",
                tied.span,
                helps=did_you_mean(str(wanted), self.embeds),
            )
        table = self.embeds[wanted]
        if (table["vocab"], table["width"]) != (options["vocab"], options["width"]):
            raise fault(
                "E0219",
                "tied tables must have one shape",
                tied.span,
                f"{table['vocab']} × {table['width']} and {options['vocab']} × {options['width']}",
            )
        options["tied"] = wanted

    def tied(self, bindings: list[Binding]) -> tuple[Binding, ...]:
        return tuple(bindings)

    # Blocks

    def specialise(
        self,
        declaration: syntax.BlockDeclaration,
        given: Mapping[str, Bound],
        shapes: tuple[Shape, ...],
        span: Span,
    ) -> tuple[str, Shape]:
        """The block for these options and shapes: its name, and the shape it gives."""
        name = declaration.name.text
        if name in self.active:
            chain = " -> ".join([*self.active[self.active.index(name) :], name])
            raise fault("E0214", f"block `{name}` uses itself", span, chain)
        for shape in shapes:
            if shape.flow != Flow.FEATURES:
                raise fault("E0207", f"block `{name}` needs features", span, f"it is given {shape}")
        key = (name, tuple(sorted((k, repr(b.value)) for k, b in given.items())), shapes)
        if key not in self.made:
            self.active.append(name)
            try:
                block, shape = self.build_block(declaration, given, shapes)
            finally:
                self.active.pop()
            self.made[key] = (block, shape)
        block, shape = self.made[key]
        return block.name, shape

    def build_block(
        self,
        declaration: syntax.BlockDeclaration,
        given: Mapping[str, Bound],
        shapes: tuple[Shape, ...],
    ) -> tuple[Block, Shape]:
        body = BlockBody(self, declaration)
        inputs = [p.name.text for p in declaration.parameters if p.default is None]
        for parameter in declaration.parameters:
            self.declare_parameter(body, parameter, given)
        for name, shape in zip(inputs, shapes, strict=True):
            body.values[name] = Typed(Ref(name), shape)
        for statement in declaration.body:
            with self.collecting():
                body.statement(statement)
        taken = {block.name for block, _ in self.made.values()} | set(self.active[:-1])
        name, number = declaration.name.text, 1
        while name in taken:
            number += 1
            name = f"{declaration.name.text}_{number}"
        first = inputs[0] if inputs else None
        with self.collecting():
            if first is None:
                raise fault("E0209", f"block `{name}` has no input", declaration.name.span)
            if not self.faulty and not any(a.target == first for a in body.assigned):
                raise fault(
                    "E0208",
                    f"block `{name}` never assigns `{first}`",
                    declaration.name.span,
                    f"a block gives back the last value of `{first}`",
                )
        block = Block(
            name=name, inputs=tuple(inputs), body=tuple(body.assigned), span=declaration.span
        )
        final = body.values.get(first) if first is not None else None
        return block, final.shape if final else shapes[0] if shapes else Shape(Flow.FEATURES, 1)

    def declare_parameter(
        self, body: BlockBody, parameter: syntax.Parameter, given: Mapping[str, Bound]
    ) -> None:
        name = parameter.name.text
        with self.collecting():
            if (
                name in self.env
                or body.is_function(name)
                or name in body.local
                or name in body.values
            ):
                raise fault("E0217", f"`{shown(name)}` already has a meaning", parameter.name.span)
        body.values[name] = None
        if parameter.default is None:
            return
        del body.values[name]
        bound = given.get(name)
        if bound is None:
            with self.collecting():
                bound = Bound(evaluate(parameter.default, body.lookup), parameter.span)
        body.local[name] = bound or Bound(None, parameter.span)


def free_names(bindings: list[Binding]) -> set[str]:
    """Every name that a binding reads."""
    found: set[str] = set()
    stack: list[object] = [b.value for b in bindings]
    while stack:
        match stack.pop():
            case Ref(name=name):
                found.add(name)
            case Operator(inputs=inputs) | BlockUse(inputs=inputs):
                stack.extend(inputs)
            case Arithmetic(left=left, right=right):
                stack.extend((left, right))
            case Repeat(body=body, input=fed):
                stack.extend((*body, fed))
    return found


def bind_parameters(
    declaration: syntax.ModelDeclaration,
    arguments: tuple[syntax.Argument, ...],
    lookup: Callable[[str], Value],
    span: Span,
) -> dict[str, Bound]:
    """The template's parameters with their values. Errors: Fault for unknown or missing ones."""
    names = [p.name.text for p in declaration.parameters]
    given: dict[str, Bound] = {}
    for index, argument in enumerate(arguments):
        name = argument.name
        if name is None:
            if index >= len(names):
                raise fault(
                    "E0216", f"`{declaration.name.text}` takes {len(names)} values", argument.span
                )
            name = names[index]
        if name not in names:
            raise fault(
                "E0216",
                f"model `{declaration.name.text}` has no parameter `{shown(name)}`",
                argument.span,
                f"it has {listing(names)}" if names else "it has none",
                helps=did_you_mean(name, names),
            )
        if name in given:
            raise fault("E0217", f"`{name}` is given twice", argument.span)
        given[name] = Bound(evaluate(argument.value, lookup), argument.span)
    env: dict[str, Bound] = {}
    missing = []
    for parameter in declaration.parameters:
        name = parameter.name.text
        if name in given:
            env[name] = given[name]
        elif parameter.default is not None:
            value = evaluate(parameter.default, Names(lambda n: env[n].value, lambda: env))
            env[name] = Bound(value, parameter.span)
        else:
            missing.append(name)
    if missing:
        raise fault(
            "E0205",
            f"model `{declaration.name.text}` needs {listing(missing, 'and')}",
            span,
            "not given",
        )
    return env
