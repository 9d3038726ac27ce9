"""A `Program` in; the spec out that says everything it says, every default written down.

Loading the text gives an equal program again (places in the file and the hash aside).
"""

from __future__ import annotations

from dataclasses import replace

from llmspec.dsl.format import WIDTH, format_text
from llmspec.dsl.hardware import CONSTANTS, COUNT, OPTIONAL
from llmspec.dsl.kernels import kernels_text
from llmspec.dsl.layout import Token, scan
from llmspec.dsl.measured import TABLES
from llmspec.dsl.options import OPERATORS, OPTIMIZERS, PLAN, PRECISIONS, CallRow
from llmspec.dsl.program import (
    AnyModel,
    Arithmetic,
    Binding,
    Block,
    BlockUse,
    Budget,
    Call,
    Cluster,
    Constraint,
    Device,
    Every,
    Expr,
    HuggingFaceModel,
    Model,
    Number,
    Operator,
    Option,
    Program,
    PythonModel,
    Ref,
    Relation,
    Repeat,
    Train,
)
from llmspec.dsl.units import MULTIPLIERS, exact_bytes, measure, parse_number

Use = Operator | BlockUse


def explicit_text(program: Program) -> str:
    parts = [
        model_text(program.model),
        device_text(program.cluster.device),
        *kernels_lines(program.cluster),
        cluster_text(program.cluster),
        train_text(program),
        budget_text(program.budget),
    ]
    if program.plan:
        parts.append(plan_text(program.plan))
    parts.append(f"prefer {program.prefer.value}")
    return format_text(wrapped(format_text("\n\n".join(parts))))


def budget_text(budget: Budget) -> str:
    text = f"memory = {exact_bytes(budget.memory_bytes)} per device"
    if budget.host_memory_bytes is not None:
        text += f"; host_memory = {exact_bytes(budget.host_memory_bytes)} per node"
    if budget.deadline_s is not None:
        text += f"; deadline = {budget.deadline_s!r} s"
    if budget.cost is not None:
        text += f"; cost = {value_text(budget.cost)}"
    return f"budget {{ {text} }}"


def wrapped(text: str) -> str:
    """Lines over the width, broken after commas inside brackets."""
    return "\n".join(map(wrapped_line, text.split("\n")))


def wrapped_line(line: str) -> str:
    out, column = "", 0
    opened: list[int] = []
    for piece in after_commas(line) if len(line) > WIDTH else [[]]:
        size = sum(len(token.text) for token in piece)
        if column + size > WIDTH and opened:
            out, column = out.rstrip() + "\n", opened[-1]
        for token in piece:
            column += len(token.text)
            if token.text in ("(", "[", "{"):
                opened.append(column)
            elif token.text in (")", "]", "}") and opened:
                opened.pop()
            out += token.text
    return out or line


def after_commas(line: str) -> list[list[Token]]:
    """The tokens of a line, in pieces that end with a comma."""
    pieces: list[list[Token]] = [[]]
    for token in scan(line):
        pieces[-1].append(token)
        if token.text == ",":
            pieces.append([])
    return pieces


# --------------------------------------------------------------------------------------------------
# Values


def value_text(value: Option) -> str:
    match value:
        case None:
            return "none"
        case bool():
            return "true" if value else "false"
        case str():
            return quoted(value)
        case tuple():
            return "[" + ", ".join(map(value_text, value)) + "]"
        case float():
            return repr(value)
        case _:
            return str(value)


def quoted(text: str) -> str:
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'


def word_text(value: Option, words: tuple[str, ...]) -> str:
    """Words stand bare, other strings in quotes."""
    if words and isinstance(value, tuple):
        return "[" + ", ".join(word_text(v, words) for v in value) + "]"
    return value if isinstance(value, str) and value in words else value_text(value)


# --------------------------------------------------------------------------------------------------
# Models


def model_text(model: AnyModel) -> str:
    if isinstance(model, HuggingFaceModel):
        return f"model {model.name} = huggingface({quoted(model.path)})"
    if isinstance(model, PythonModel):
        options = "".join(f", {k}={value_text(v)}" for k, v in model.arguments)
        return (
            f"model {model.name} = python({quoted(model.path)}, {quoted(model.attribute)}{options})"
        )
    lines = [f"{name} = {getattr(model, name)}" for name in ("vocab", "context", "width")]
    lines += [block_text(block) for block in model.blocks]
    return f"model {model.name} {{\n" + "\n".join(lines + ModelPrinter(model).lines()) + "\n}"


def block_text(block: Block) -> str:
    printer = BlockPrinter()
    body = [f"{a.target} = {printer.expr(a.value)}" for a in block.body]
    inputs = ", ".join(block.inputs)
    return f"block {block.name}({inputs}) {{\n" + "\n".join(printer.lets + body) + "\n}"


def natural(use: Use) -> str:
    return use.operator if isinstance(use, Operator) else use.block


def numbered(name: str, base: str) -> bool:
    """`rmsnorm` and `rmsnorm_2` are names that a body hands out by itself."""
    return name == base or (name.startswith(f"{base}_") and name[len(base) + 1 :].isdigit())


class BlockPrinter:
    """Writes uses; one under a name of its own was a `let`, which it collects."""

    def __init__(self) -> None:
        self.lets: list[str] = []
        self.shared: set[str] = set()

    def head(self, use: Use) -> tuple[str, list[str]]:
        """What is called, and its options."""
        base = natural(use)
        options = option_texts(use)
        if numbered(use.name, base):
            return base, options
        if use.name not in self.shared:
            self.shared.add(use.name)
            call = f"{base}({', '.join(options)})" if options else base
            self.lets.append(f"let {use.name} = {call}")
        return use.name, []

    def inputs(self, use: Use) -> list[str]:
        texts = [self.expr(i) for i in use.inputs]
        if isinstance(use, Operator):
            names = OPERATORS[use.operator].inputs
            extra = OPERATORS[use.operator].optional_inputs
            texts[len(names) :] = [
                f"{name}={text}" for name, text in zip(extra, texts[len(names) :], strict=False)
            ]
        return texts

    def use(self, use: Use) -> str:
        name, options = self.head(use)
        return f"{name}({', '.join(self.inputs(use) + options)})"

    def expr(self, expr: Expr) -> str:
        match expr:
            case Ref():
                return expr.name
            case Number():
                return number_text(expr.value)
            case Arithmetic():
                return f"{self.side(expr.left)} {expr.op} {self.side(expr.right)}"
            case _:
                return self.use(expr)

    def side(self, expr: Expr) -> str:
        text = self.expr(expr)
        return f"({text})" if isinstance(expr, Arithmetic) else text


def number_text(value: float) -> str:
    return f"(-{-value!r})" if value < 0 else repr(value)


def option_texts(use: Use) -> list[str]:
    if not isinstance(use, Operator):
        return []
    row = OPERATORS[use.operator]
    texts = []
    for option in row.options:
        if option.derived:
            continue
        value = use.option(option.name)
        texts.append(f"{option.name}={option_text(value)}")
    return texts


def option_text(value: Option | Call) -> str:
    match value:
        case Call():
            inner = ", ".join(f"{name}={option_text(v)}" for name, v in value.options)
            return f"{value.name}({inner})"
        case str():  # words and the names of tied tables
            return value
        case _:
            return value_text(value)


class ModelPrinter(BlockPrinter):
    """Writes bindings as chains. One under a name of its own was a `let`; any other is read once,
    and is kept in `pending` until its reader is written.
    """

    def __init__(self, model: Model) -> None:
        super().__init__()
        self.model = model
        self.out: list[str] = []
        self.pending: dict[str, list[str]] = {}

    def lines(self) -> list[str]:
        final = self.model.body[-1].name
        for binding in self.model.body:
            chain = self.chain(binding)
            self.out += self.lets
            self.lets.clear()
            if binding.name == final:
                self.out.append(joined(chain))
            elif natural_binding(binding):
                self.pending[binding.name] = chain
            else:
                self.out.append(f"let {binding.name} = " + joined(chain))
        return self.out

    def chain(self, binding: Binding) -> list[str]:
        value = binding.value
        if isinstance(value, Arithmetic):
            return [self.expr(value)]
        fed = value.input if isinstance(value, Repeat) else value.inputs[0]
        chain = self.pending.pop(fed.name, None) if isinstance(fed, Ref) else None
        if chain is None:
            chain = [self.expr(fed)]
        if isinstance(value, Repeat):
            links = " -> ".join(self.link(use) for use in value.body)
            part = f"({links})" if len(value.body) > 1 else links
            return [*chain, f"{part} * {value.count}"]
        return [*chain, self.link(value)]

    def expr(self, expr: Expr) -> str:
        if isinstance(expr, Ref) and expr.name in self.pending:
            return f"({joined(self.pending.pop(expr.name))})"
        return super().expr(expr)

    def link(self, use: Use) -> str:
        """The use without its first input; a block's further inputs go by name."""
        name, options = self.head(use)
        rest = self.inputs(replace(use, inputs=(Ref("x"), *use.inputs[1:])))[1:]
        if isinstance(use, BlockUse):
            names = self.model.block(use.block).inputs[1:]
            rest = [f"{n}={t}" for n, t in zip(names, rest, strict=True)]
        return f"{name}({', '.join(rest + options)})" if rest or options else name


def joined(chain: list[str]) -> str:
    """On one line when it is short, else a link a line."""
    line = " -> ".join(chain)
    return line if len(line) <= 80 else "\n-> ".join(chain)


def natural_binding(binding: Binding) -> bool:
    """Whether the name is one that the body hands out, not one of a `let`."""
    match binding.value:
        case Arithmetic():
            return numbered(binding.name, "sum")
        case Repeat(body=(one,)):
            return binding.name == one.name
        case Repeat(body=body):
            return numbered(binding.name, "_".join(dict.fromkeys(natural(u) for u in body)))
        case use:
            return binding.name == use.name or numbered(binding.name, use.name)


# --------------------------------------------------------------------------------------------------
# Hardware


def rate_text(value: float, unit: str) -> str:
    """In the largest unit that says it exactly in a few digits."""
    for prefix in ("T", "G", "M", "k", ""):
        scaled = value / MULTIPLIERS[prefix]
        digits = f"{scaled:.6g}"
        if (
            scaled >= 1
            and "e" not in digits
            and measure(parse_number(digits), prefix + unit, None).value == value
        ):
            return f"{digits} {prefix}{unit}"
    return f"{value!r} {unit}"


def device_text(device: Device) -> str:
    head = f"{device.kind.value} {quoted(device.name)}"
    bandwidth = rate_text(device.memory_bytes_per_s, "B/s")
    peak = ", ".join(f"{k}: {rate_text(v, 'FLOP/s')}" for k, v in device.peak_flops.items())
    lines = [
        f"memory = {exact_bytes(device.memory_bytes)} at {bandwidth}",
        f"usable = {exact_bytes(device.usable_bytes)}",
        f"peak = {{ {peak} }}",
    ]
    for key, rate in (
        ("link", device.link_bytes_per_s),
        ("host_link", device.host_link_bytes_per_s),
    ):
        if rate is not None:
            lines.append(f"{key} = {rate_text(rate, 'B/s')}")
    if device.price_per_hour is not None:
        lines.append(f"price = {device.price_per_hour!r} per hour")
    if "network_bytes_per_s" in device.constants:
        rate = device.constants["network_bytes_per_s"]
        lines.append(f"network = {rate_text(rate, 'B/s')} per device")
    for key, name in CONSTANTS.items():
        value = device.constants[name]
        unit = " s" if name.endswith("_s") else ""
        text = exact_bytes(int(value)) if key == "fixed" else f"{value!r}{unit}"
        text = str(int(value)) if key == COUNT else text
        lines.append(f"{key} = {text}")
    lines += [f"{k} = {device.constants[k]!r}" for k in OPTIONAL if k in device.constants]
    for key in TABLES:
        table = getattr(device, key)
        if table:
            rows = (f"{name}: {list(numbers)!r}" for name, numbers in table.items())
            lines.append(f"{key} = {{ {', '.join(rows)} }}")
    return f"{head} {{\n" + "\n".join(lines) + "\n}"


def kernels_lines(cluster: Cluster) -> list[str]:
    if cluster.kernels is None:
        return []
    return [kernels_text(cluster.kernels, lambda rate: rate_text(rate, "B/s"))]


def cluster_text(cluster: Cluster) -> str:
    device = cluster.device
    return (
        f"cluster {cluster.name} {{\n"
        f"node = {cluster.devices_per_node} * {device.kind.value}({quoted(device.name)})\n"
        f"nodes {'<=' if cluster.nodes_are_bound else '='} {cluster.nodes}\n"
        f"network = {rate_text(cluster.network_bytes_per_s, 'B/s')} per device\n"
        f"host_memory = {exact_bytes(cluster.host_memory_bytes)} per node\n"
        + (f"kernels = {cluster.kernels.name}\n" if cluster.kernels is not None else "")
        + "}"
    )


# --------------------------------------------------------------------------------------------------
# Training


CALL_WORDS = (
    *("bytes", "uint16", "uint32", "fp32", "bf16", "fp16", "off", "on"),
    *("nearest", "stochastic", "dynamic"),
)


def call_text(call: Call) -> str:
    parts = [value_text(a) for a in call.arguments]
    for name, value in call.options:
        text = call_text(value) if isinstance(value, Call) else word_text(value, CALL_WORDS)
        parts.append(f"{name}={text}")
    return f"{call.name}({', '.join(parts)})" if parts else call.name


OPEN: dict[str, tuple[CallRow, ...]] = {"precision": PRECISIONS, "optimizer": OPTIMIZERS}
"""Keys of a train block that may be left to the search."""


def short_text(call: Call, key: str) -> str:
    """Without the parts that are so anyway."""
    row = next(row for row in OPEN[key] if row.name == call.name)
    said = tuple((k, v) for k, v in call.options if (o := row.row(k)) is None or v != o.default)
    return call_text(replace(call, options=said))


def open_text(program: Program, key: str) -> str:
    """`precision = bf16(…)`, or `precision in [..]` where it is left to the search."""
    texts = [call_text(getattr(t, key)) for t in program.trains or (program.train,)]
    distinct = list(dict.fromkeys(texts))
    return f"{key} = {texts[0]}" if len(distinct) == 1 else f"{key} in [{', '.join(distinct)}]"


def phases_text(program: Program) -> str:
    """What depends on the optimizer is left out where that is open: it is the default then."""
    trains = program.trains or (program.train,)
    phases = []
    for alike in zip(*(train.learning_rate for train in trains), strict=True):
        kept = tuple(o for o in alike[0].options if all(o in other.options for other in alike))
        phases.append(call_text(replace(alike[0], options=kept)))
    return "learning_rate = " + " then ".join(phases)


def every_text(every: Every | None) -> str:
    if every is None:
        return "none"
    parts = [str(every.steps)]
    for name, value in every.options:
        text = call_text(value) if isinstance(value, Call) else value_text(value)
        parts.append(f"{name}={text}")
    return f"every({', '.join(parts)})"


def batch_text(train: Train) -> str:
    final, ramp = f"{train.batch_sequences} sequences", train.ramp
    if ramp is None:
        return final
    parts = [f"from={ramp.start_sequences} sequences", f"to={final}"]
    if ramp.over_tokens is not None:
        parts.append(f"over={ramp.over_tokens} tokens")
    if ramp.over_steps is not None:
        parts.append(f"steps={ramp.over_steps}")
    if ramp.increment_sequences is not None:
        parts.append(f"increment={ramp.increment_sequences} sequences")
    return f"ramp({', '.join(parts)})"


def train_text(program: Program) -> str:
    train = program.train
    length = f"steps = {train.steps if train.steps is not None else 'chinchilla'}"
    if train.tokens is not None:
        length = f"tokens = {train.tokens}"
    lines = [
        f"model = {program.model.name}",
        f"cluster = {program.cluster.name}",
        f"dataset = {call_text(train.dataset)}",
        f"batch = {batch_text(train)}",
        f"sequence_length = {train.sequence_length}",
        length,
        open_text(program, "optimizer"),
        phases_text(program),
        open_text(program, "precision"),
        f"objective = {call_text(train.objective)}",
        f"validate = {every_text(train.validate)}",
        f"checkpoint = {every_text(train.checkpoint)}",
        f"log = {every_text(train.log)}",
        f"seed = {train.seed}",
        *([] if train.loss is None else [f"loss = {value_text(train.loss)}"]),
    ]
    return f"train {train.name} {{\n" + "\n".join(lines) + "\n}"


def plan_text(constraints: tuple[Constraint, ...]) -> str:
    lines = []
    for constraint in constraints:
        row = PLAN[constraint.key]
        texts = [word_text(v, row.words) for v in constraint.values]
        value = "[" + ", ".join(texts) + "]" if constraint.relation == Relation.IN else texts[0]
        lines.append(f"{constraint.key} {constraint.relation.value} {value}")
    return "plan {\n" + "\n".join(lines) + "\n}"
