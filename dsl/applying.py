"""Operators and blocks applied to arguments: which are inputs, which are options."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from llmspec.dsl import syntax
from llmspec.dsl.bodies import MAX_USES, Expressions, Function
from llmspec.dsl.choices import read_call
from llmspec.dsl.diagnostics import did_you_mean, fault, listing, shown
from llmspec.dsl.operators import Given, resolve_options, unknown_option
from llmspec.dsl.options import OPERATORS, Kind, OperatorRow, OptionRow
from llmspec.dsl.program import BlockUse, Operator, Span
from llmspec.dsl.shapes import Bound, Flow, Shape, Typed, Use
from llmspec.dsl.values import CONSTANTS, evaluate, no_meaning


class Body(Expressions):
    """Expressions whose functions can be applied."""

    def apply(self, function: Function, main: Typed | None) -> Typed:
        use, shape = self.build(function, main)
        return self.emit(use, shape, use.name)

    def build(self, function: Function, main: Typed | None) -> tuple[Use, Shape]:
        self.uses += 1
        if self.uses > MAX_USES:
            raise fault("E0213", f"a statement uses more than {MAX_USES} operators", function.span)
        if function.name in self.model.blocks:
            return self.build_block(function, main)
        return self.build_operator(function, main)

    def instance(self, function: Function) -> str:
        return function.instance or self.instances.take(function.name)

    def build_operator(self, function: Function, main: Typed | None) -> tuple[Use, Shape]:
        row = OPERATORS[function.name]
        if not row.meaning:
            raise no_meaning(f"`{row.name}`", function.span)
        inputs, given = self.split(function, row, main)
        shape = self.input_shape(row, inputs, function.span)
        options = resolve_options(row, given, shape, self.model.measures, function.span)
        name = self.instance(function)
        if row.name == "embed":
            self.model.note_embed(name, options)
        if row.name == "unembed":
            self.model.note_unembed(options, given.get("tied"), function.span)
        use = Operator(
            operator=row.name,
            name=name,
            inputs=tuple(i.expr for i in inputs),
            options=tuple(sorted(options.items())),
            span=function.span,
        )
        return use, output_shape(row, options)

    def split(
        self, function: Function, row: OperatorRow, main: Typed | None
    ) -> tuple[list[Typed], dict[str, Given]]:
        """The arguments as inputs (in declared order) and options."""
        inputs: dict[str, Typed] = {} if main is None else {row.inputs[0]: main}
        given: dict[str, Given] = {}
        for argument in function.arguments:
            name = argument.name or self.option_of(row, argument.value, given)
            if name is None or name in row.inputs + row.optional_inputs:
                self.take_input(row, inputs, name, argument)
                continue
            option = row.row(name)
            if option is None or option.derived:
                raise unknown_option(row, name, argument.span)
            if name in given:
                raise fault("E0217", f"`{name}` is given twice", argument.span)
            given[name] = self.option_value(option, argument)
        missing = [n for n in row.inputs if n not in inputs]
        if missing:
            raise fault(
                "E0209",
                f"`{row.name}` needs an input",
                function.span,
                helps=(f"write `{row.name}(x, …)`, or put a value before it: `x -> {row.name}`",),
            )
        order = [n for n in row.inputs + row.optional_inputs if n in inputs]
        return [inputs[n] for n in order], given

    def option_of(self, row: OperatorRow, node: syntax.Node, given: Iterable[str]) -> str | None:
        """The option that a bare argument means: a flag's name, or the operator's main number."""
        if isinstance(node, syntax.Name) and node.text not in self.values:
            option = row.row(node.text)
            if option is not None and option.kind in (Kind.FLAG, Kind.TIE):
                return node.text
        if row.positional and row.positional not in given and self.is_constant(node):
            return row.positional
        return None

    def option_value(self, option: OptionRow, argument: syntax.Argument) -> Given:
        kind = option.kind
        if kind == Kind.CALL and not is_none(argument.value):
            call = read_call(argument.value, option.calls, option.name, self.lookup)
            return Given(call, argument.span)
        if argument.name is None and kind in (Kind.FLAG, Kind.TIE):
            return Given(True, argument.span)
        if kind == Kind.TIE and isinstance(argument.value, syntax.Name):
            name = argument.value.text
            return Given(CONSTANTS.get(name, name), argument.span)
        return self.given(argument.value, argument.span)

    def take_input(
        self,
        row: OperatorRow,
        inputs: dict[str, Typed],
        name: str | None,
        argument: syntax.Argument,
    ) -> None:
        slot = name or next((n for n in row.inputs if n not in inputs), None)
        if slot is None:
            node = argument.value
            if isinstance(node, syntax.Name) and node.text not in self.values:
                raise unknown_option(row, node.text, argument.span)
            raise fault(
                "E0209",
                f"`{row.name}` takes {len(row.inputs)} input",
                argument.span,
                "one too many",
            )
        if slot in inputs:
            raise fault("E0217", f"`{slot}` is given twice", argument.span)
        inputs[slot] = self.tensor(argument.value)

    def input_shape(self, row: OperatorRow, inputs: list[Typed], span: Span) -> Shape:
        wanted = Flow.IDS if row.reads_ids else Flow.FEATURES
        for typed in inputs:
            if typed.shape.flow != wanted:
                raise fault(
                    "E0207", f"`{row.name}` needs {wanted}", span, f"it is given {typed.shape}"
                )
        if len({t.shape.width for t in inputs}) > 1:
            widths = " and ".join(str(t.shape.width) for t in inputs)
            raise fault("E0207", f"`{row.name}` needs inputs of one width", span, f"not {widths}")
        return inputs[0].shape

    def build_block(self, function: Function, main: Typed | None) -> tuple[Use, Shape]:
        declaration = self.model.blocks[function.name]
        tensors = [p.name.text for p in declaration.parameters if p.default is None]
        options = [p.name.text for p in declaration.parameters if p.default is not None]
        inputs: dict[str, Typed] = {}
        given: dict[str, Bound] = {}
        if main is not None and tensors:
            inputs[tensors[0]] = main
        for argument in function.arguments:
            name = argument.name or next((t for t in tensors if t not in inputs), None)
            if name is None or name not in tensors + options:
                raise fault(
                    "E0202",
                    f"block `{function.name}` has no further input"
                    if name is None
                    else f"block `{function.name}` has no parameter `{shown(name)}`",
                    argument.span,
                    f"it has {listing(tensors + options)}",
                    helps=did_you_mean(name or "", tensors + options),
                )
            if name in inputs or name in given:
                raise fault("E0217", f"`{name}` is given twice", argument.span)
            if name in tensors:
                inputs[name] = self.tensor(argument.value)
            else:
                given[name] = Bound(evaluate(argument.value, self.lookup), argument.span)
        missing = [t for t in tensors if t not in inputs]
        if missing:
            raise fault(
                "E0209",
                f"block `{function.name}` needs {listing(missing, 'and')}",
                function.span,
                "not given",
            )
        ordered = [inputs[t] for t in tensors]
        block, shape = self.model.specialise(
            declaration, given, tuple(t.shape for t in ordered), function.span
        )
        use = BlockUse(
            block=block,
            name=self.instance(function),
            inputs=tuple(t.expr for t in ordered),
            span=function.span,
        )
        return use, shape


def is_none(node: syntax.Node) -> bool:
    return isinstance(node, syntax.Name) and node.text == "none"


def output_shape(row: OperatorRow, options: Mapping[str, object]) -> Shape:
    match row.name:
        case "unembed":
            flow, width = Flow.LOGITS, options["vocab"]
        case "linear":
            flow, width = Flow.FEATURES, options["out"]
        case _:
            flow, width = Flow.FEATURES, options["width"]
    assert isinstance(width, int), "widths are resolved"
    return Shape(flow, width)
