"""How many parameters a model has, and how many operators: from the options alone."""

from __future__ import annotations

from collections.abc import Iterator

from llmspec.dsl.program import (
    Arithmetic,
    BlockUse,
    Call,
    Expr,
    Model,
    Operator,
    Repeat,
)


def operator_parameters(use: Operator, *, active: bool = False) -> int:
    """active: only those that one token runs through."""

    def size(name: str) -> int:
        value = use.option(name)
        assert isinstance(value, int), f"{use.operator}.{name} is a number"
        return int(value)

    match use.operator:
        case "embed":
            rows = size("vocab") + (size("context") if use.option("positions") == "learned" else 0)
            return rows * size("width")
        case "unembed":
            table = 0 if use.option("tied") is not None else size("vocab") * size("width")
            return table + size("bias") * size("vocab")
        case "linear":
            return (size("width") + size("bias")) * size("out")
        case "attention":
            norms = 2 * size("head_size") if use.option("qk_norm") is not None else 0
            return norms + attention_parameters(
                size("width"),
                size("heads") * size("head_size"),
                size("kv_heads") * size("head_size"),
                size("bias"),
            )
        case "latent_attention":
            nope, rope, value = size("nope"), size("rope_size"), size("value")
            width, heads, rank = size("width"), size("heads"), size("kv_rank")
            queries = heads * (nope + rope) * width
            if use.option("q_rank") is not None:
                low = size("q_rank")
                queries = low * (width + 1 + heads * (nope + rope))
            keys = rank * (width + 1 + heads * (nope + value)) + rope * width
            return queries + keys + heads * value * width
        case "mlp" | "swiglu" | "geglu":
            bias = size("bias") if use.operator == "mlp" else 0
            return feed_forward_parameters(use.operator, size("width"), size("ffn"), bias)
        case "moe":
            used = size("top_k") if active else size("experts")
            width, shared = size("width"), use.call("shared")
            routed = used * call_parameters(use.call("expert"), width)
            return size("experts") * width + routed + call_parameters(shared, width)
        case "layernorm":
            return (1 + size("bias")) * size("width")
        case "rmsnorm":
            return size("width")
        case _:
            return 0


def feed_forward_parameters(kind: str, width: int, ffn: int, bias: int) -> int:
    return (2 if kind == "mlp" else 3) * width * ffn + bias * (width + ffn)


def call_parameters(call: Call | None, width: int) -> int:
    """Of an expert; 0 where there is none."""
    if call is None:
        return 0
    options = dict(call.options)
    ffn = options["ffn"]
    assert isinstance(ffn, int), "ffn is a number"
    return feed_forward_parameters(call.name, width, ffn, int(bool(options.get("bias"))))


def attention_parameters(width: int, queries: int, keys: int, bias: int) -> int:
    return width * (2 * queries + 2 * keys) + bias * (queries + 2 * keys + width)


def uses_in(expr: Expr) -> Iterator[Operator | BlockUse]:
    """Every use inside an expression, by a loop: expressions may be deep."""
    stack: list[Expr] = [expr]
    while stack:
        found = stack.pop()
        match found:
            case Operator() | BlockUse():
                yield found
                stack.extend(found.inputs)
            case Arithmetic():
                stack.extend((found.left, found.right))


class Counter:
    """Totals per block are worked out once; a shared instance counts once for parameters.

    active: of parameters only those that one token runs through.
    """

    def __init__(self, model: Model, *, active: bool = False) -> None:
        self.model = model
        self.active = active
        self.blocks: dict[str, tuple[int, int]] = {}

    def block(self, name: str) -> tuple[int, int]:
        """(parameters, operators) of one use of a block."""
        if name not in self.blocks:
            uses = [u for a in self.model.block(name).body for u in uses_in(a.value)]
            self.blocks[name] = self.total(uses)
        return self.blocks[name]

    def total(self, uses: list[Operator | BlockUse]) -> tuple[int, int]:
        parameters = operators = 0
        seen: set[str] = set()
        for use in uses:
            one, count = self.use(use)
            parameters += 0 if use.name in seen else one
            operators += count
            seen.add(use.name)
        return parameters, operators

    def use(self, use: Operator | BlockUse) -> tuple[int, int]:
        if isinstance(use, BlockUse):
            return self.block(use.block)
        return operator_parameters(use, active=self.active), 1

    def model_total(self) -> tuple[int, int]:
        plain: list[Operator | BlockUse] = []
        parameters = operators = 0
        for binding in self.model.body:
            if isinstance(binding.value, Repeat):
                one, count = self.total(list(binding.value.body))
                parameters += one * binding.value.count
                operators += count * binding.value.count
            else:
                plain += uses_in(binding.value)
        one, count = self.total(plain)
        return parameters + one, operators + count


def count_parameters(model: Model, *, active: bool = False) -> int:
    return Counter(model, active=active).model_total()[0]


def count_uses(model: Model) -> int:
    return Counter(model).model_total()[1]


def count_blocks(model: Model) -> int:
    """Uses of blocks in the model's chain: where a pipeline may cut."""
    total = 0
    for binding in model.body:
        match binding.value:
            case BlockUse():
                total += 1
            case Repeat(count=count, body=body):
                total += count * sum(isinstance(use, BlockUse) for use in body)
    return total


def operators_of(model: Model, name: str) -> Iterator[Operator]:
    """Every distinct use of the named operator, in blocks and body."""
    values = [a.value for block in model.blocks for a in block.body]
    for binding in model.body:
        values += binding.value.body if isinstance(binding.value, Repeat) else [binding.value]
    for value in values:
        yield from (u for u in uses_in(value) if isinstance(u, Operator) and u.operator == name)
