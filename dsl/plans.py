"""A `plan` section in; its constraints out, those refused that no plan of the spec can keep."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from math import gcd, lcm, prod

from llmspec.dsl import syntax
from llmspec.dsl.diagnostics import Fault, SpecError, did_you_mean, fault, listing
from llmspec.dsl.expert_pins import experts_are_shared
from llmspec.dsl.hardware import unknown_key
from llmspec.dsl.options import PLAN, STAGES_ON_A_RANK, PlanRow
from llmspec.dsl.parameters import count_blocks, operators_of
from llmspec.dsl.parse import parse
from llmspec.dsl.program import (
    AnyModel,
    Cluster,
    Constraint,
    Model,
    Option,
    Program,
    Relation,
    Span,
    Train,
)
from llmspec.dsl.values import Value, Word, evaluate, no_meaning, show, whole

AXES = ("data", "tensor", "context", "pipeline")


def constraints_of(section: syntax.Section) -> tuple[list[Constraint], list[Fault]]:
    """What the lines say, each by itself. `auto` says nothing."""
    found: list[Constraint] = []
    faults: list[Fault] = []
    for statement in section.body:
        try:
            made = constraint_of(statement)
        except Fault as error:
            faults.append(error)
            continue
        if made is not None:
            found.append(made)
    return found, faults


def constraint_of(statement: syntax.Statement) -> Constraint | None:
    if not isinstance(statement, syntax.Setting):
        raise fault("E0501", "a plan is a list of `key = value` lines", statement.span)
    row = PLAN.get(statement.key.text)
    if row is None:
        raise unknown_key("plan", statement.key.text, PLAN, statement.key.span)
    if isinstance(statement.value, syntax.Name) and statement.value.text == "auto":
        return None
    if not row.meaning:
        raise no_meaning(f"`{row.name}`", statement.span)
    relation = Relation(statement.relation)
    if relation in (Relation.LE, Relation.GE) and row.least is None:
        raise fault("E0402", f"`{row.name}` has no order", statement.span, "use `=` or `in [..]`")
    return Constraint(
        key=row.name,
        relation=relation,
        values=values_of(row, relation, statement),
        span=statement.span,
    )


def values_of(row: PlanRow, relation: Relation, statement: syntax.Setting) -> tuple[Option, ...]:
    node = statement.value
    if relation == Relation.IN:
        if not isinstance(node, syntax.Sequence) or not node.items:
            raise fault("E0402", "`in` needs a list", node.span, "like `[1, 2, 4]`")
        return tuple(one_value(row, relation, item) for item in node.items)
    return (one_value(row, relation, node),)


def one_value(row: PlanRow, relation: Relation, node: syntax.Node) -> Option:
    value = plan_word(node) if row.words else evaluate(node)
    if row.name == "stages":
        result: Option = stages_of(value, node)
    elif row.name == "offload" and isinstance(node, syntax.Sequence):
        result = offload_of(row, node)
    elif row.name == "recompute" and isinstance(value, tuple):
        result = listed_operators(value, node)
    elif row.words:
        result = word_of(row, value, node)
    else:
        result = whole(value, node.span, f"`{row.name}`", least=row.least or 0)
        if row.most is not None and result > row.most:
            raise fault("E0402", f"`{row.name}` goes from {row.least} to {row.most}", node.span)
    bound_holds = relation == Relation.LE and row.now and result >= row.now[0]  # type: ignore[operator]
    if row.now and result not in row.now and not bound_holds:
        raise no_meaning(f"`{row.name} = {result}`", node.span)
    return result


def plan_word(node: syntax.Node) -> Value:
    """`none` and `1f1b` are words here."""
    if isinstance(node, syntax.Name):
        return Word(node.text)
    if isinstance(node, syntax.Text):
        return Word(node.value)
    if isinstance(node, syntax.Sequence):
        return tuple(item.text if isinstance(item, syntax.Name) else "" for item in node.items)
    return evaluate(node)


def word_of(row: PlanRow, value: Value, node: syntax.Node) -> str:
    if isinstance(value, Word) and value.text in row.words:
        return value.text
    name = value.text if isinstance(value, Word) else ""
    raise fault(
        "E0402",
        f"`{row.name}` cannot be {show(value)}",
        node.span,
        f"expected {listing(row.words)}",
        helps=did_you_mean(name, row.words),
    )


def offload_of(row: PlanRow, node: syntax.Sequence) -> Option:
    """A list of what lives in host memory, sorted; parameters take the optimizer along."""
    words = {word_of(row, plan_word(item), item) for item in node.items}
    if not words or ("none" in words and len(words) > 1):
        raise fault(
            "E0402", "`offload` is `none`, or what lives in host memory", node.span, "not both"
        )
    if "parameters" in words:
        words -= {"optimizer"}
    return words.pop() if len(words) == 1 else tuple(sorted(words))


def listed_operators(value: tuple[Value, ...], node: syntax.Node) -> tuple[str, ...]:
    """Whether the model has them is checked where its graph is known."""
    names = tuple(v for v in value if isinstance(v, str) and v)
    if not names or len(names) < len(value):
        label = "like `[attention, swiglu]`"
        raise fault("E0402", "`recompute` lists names of operators", node.span, label)
    return names


def operator_kind(name: str) -> str:
    """What an operator is, by its own name: the second `rmsnorm` of a block is `rmsnorm_2`."""
    kind, _, number = name.rpartition("_")
    return kind if kind and number.isdigit() else name


def stages_of(value: Value, node: syntax.Node) -> tuple[int, ...]:
    if isinstance(value, tuple) and value:
        return tuple(whole(v, node.span, "a stage", least=0) for v in value)
    raise fault(
        "E0402", "`stages` is a list of numbers of blocks", node.span, "like `[8, 8, 8, 8]`"
    )


# --------------------------------------------------------------------------------------------------
# Legality


@dataclass(frozen=True, slots=True, kw_only=True)
class Pins:
    """The constraints by key, and what they are checked against (None: has faults of its own)."""

    constraints: tuple[Constraint, ...]
    model: AnyModel | None
    cluster: Cluster | None
    train: Train | None

    def pinned(self, key: str) -> Constraint | None:
        return next(
            (c for c in self.constraints if c.key == key and c.relation == Relation.EQ), None
        )

    def number(self, key: str) -> int | None:
        pin = self.pinned(key)
        value = pin.values[0] if pin else None
        return value if isinstance(value, int) else None

    def spans(self, keys: Iterable[str]) -> list[Span]:
        return [pin.span for key in keys if (pin := self.pinned(key))]


def check_pins(pins: Pins) -> list[Fault]:
    faults: list[Fault] = []
    for rule in RULES:
        try:
            rule(pins)
        except Fault as error:
            spans = [f.diagnostic.span for f in faults]
            if error.diagnostic.span not in spans:  # one line, one message
                faults.append(error)
            if rule is contradictions:
                break  # what follows would read only one of the two
    return faults


def contradictions(pins: Pins) -> None:
    """Two lines about one key that no value satisfies."""
    for index, one in enumerate(pins.constraints):
        for other in pins.constraints[:index]:
            if one.key == other.key and not compatible(one, other):
                raise fault(
                    "E0407",
                    f"no `{one.key}` satisfies both lines",
                    one.span,
                    "this one",
                    secondary=((other.span, "and this one"),),
                )


def compatible(one: Constraint, other: Constraint) -> bool:
    for a, b in ((one, other), (other, one)):
        if a.relation in (Relation.EQ, Relation.IN):
            return any(b.allows(v) for v in a.values)
    if one.relation == other.relation:
        return True
    low, high = (one, other) if one.relation == Relation.GE else (other, one)
    return low.values[0] <= high.values[0]  # type: ignore[operator]


def tensor_splits_heads(pins: Pins) -> None:
    if not isinstance(pins.model, Model):
        return
    heads = heads_of(pins.model)
    if not heads:
        return
    common = gcd(*heads)
    for constraint in pins.constraints:
        if constraint.key != "tensor" or constraint.relation not in (Relation.EQ, Relation.IN):
            continue
        if any(isinstance(v, int) and common % v == 0 for v in constraint.values):
            continue
        value = constraint.values[0]
        assert isinstance(value, int), "tensor takes numbers"
        worlds = pins.cluster.worlds() if pins.cluster else (common,)
        legal = [d for d in divisors(common) if any(world % d == 0 for world in worlds)]
        near = sorted(sorted(legal, key=lambda d: abs(d - value))[:3])
        fewest = min(heads)
        raise fault(
            "E0403",
            f"{value} tensor ranks cannot share {fewest} key/value heads",
            constraint.span,
            "every rank holds the same number of whole heads",
            helps=("use " + listing(f"tensor = {d}" for d in near),),
        )


def heads_of(model: Model) -> list[int]:
    found = [use.option("kv_heads") for use in operators_of(model, "attention")]
    found += [use.option("heads") for use in operators_of(model, "latent_attention")]
    return [h for h in found if isinstance(h, int)]


def axes_fill_world(pins: Pins) -> None:
    if pins.cluster is None:
        return
    worlds = pins.cluster.worlds()
    sizes = {key: n for key in AXES if (n := pins.number(key)) is not None}
    if not sizes:
        return
    product = prod(sizes.values())
    # who pins all others says with `context` that what is left shares sequences
    whole_mesh = set(AXES) - set(sizes) <= {"context"}
    if product in worlds or (not whole_mesh and any(world % product == 0 for world in worlds)):
        return
    *earlier, last = pins.spans(sizes)
    verb = "is not" if whole_mesh else "does not divide"
    rest = prod([*sizes.values()][:-1])
    near = min(worlds, key=lambda world: (world % rest > 0, abs(world - product)))
    raise fault(
        "E0404",
        f"{factors(sizes)} {verb} {devices_of(pins.cluster)}",
        last,
        secondary=[(span, "with this") for span in earlier],
        helps=axis_help(sizes, near, whole_mesh),
    )


def devices_of(cluster: Cluster) -> str:
    if not cluster.nodes_are_bound:
        return f"the cluster's {cluster.world_size} devices"
    return f"what 1 to {cluster.nodes} whole nodes of {cluster.devices_per_node} devices have"


def factors(sizes: dict[str, int]) -> str:
    """`data 8 × microbatch 3 = 24`; a single one as it is."""
    text = " × ".join(f"{key} {n}" for key, n in sizes.items())
    return text if len(sizes) == 1 else f"{text} = {prod(sizes.values())}"


def axis_help(sizes: dict[str, int], world: int, whole_mesh: bool) -> tuple[str, ...]:
    """The last pinned axis, made to fit the others; or context ranks beside them."""
    *others, last = sizes
    rest = prod(sizes[k] for k in others)
    if world % rest:
        return ()
    left = world // rest
    fits = [left] if whole_mesh else divisors(left)
    near = sorted(fits, key=lambda d: abs(d - sizes[last]))[:3]
    helps: tuple[str, ...] = ("use " + listing(f"{last} = {d}" for d in sorted(near)),)
    if whole_mesh and "context" not in sizes and left % sizes[last] == 0:
        helps += (f"or `context = {left // sizes[last]}`, ranks that share sequences",)
    return helps


def stages_cut_blocks(pins: Pins) -> None:
    if not isinstance(pins.model, Model):
        return
    blocks = count_blocks(pins.model)
    pin = pins.pinned("pipeline")
    ranks = pins.number("pipeline")
    if pin and ranks and ranks > max(1, blocks):
        raise fault(
            "E0405",
            f"{ranks} pipeline ranks cannot share {blocks} blocks",
            pin.span,
            "every rank holds at least one block",
            helps=(f"at most `pipeline = {max(1, blocks)}`",),
        )
    stages = pins.pinned("stages")
    if stages is None:
        return
    cut = stages.values[0]
    assert isinstance(cut, tuple), "stages is a list"
    total = sum(n for n in cut if isinstance(n, int))
    if total != blocks:
        raise fault("E0406", f"the stages hold {total} blocks, the model has {blocks}", stages.span)
    each = pins.number("interleave")
    if pin and ranks and (len(cut) % ranks or (each and len(cut) != ranks * each)):
        on_each = f" with {each} stages each" if each and each > 1 else ""
        raise fault(
            "E0406",
            f"{len(cut)} stages for {ranks} pipeline ranks{on_each}",
            stages.span,
            secondary=[(s, "pinned here") for s in pins.spans(["pipeline", "interleave"])],
        )


def blocks_fill_stages(pins: Pins) -> None:
    ranks, each = pins.number("pipeline"), pins.number("interleave")
    pin = pins.pinned("interleave")
    if not (isinstance(pins.model, Model) and ranks and each and pin):
        return
    blocks = count_blocks(pins.model)
    if each > 1 and ranks * each > blocks:
        raise fault(
            "E0405",
            f"{ranks} pipeline ranks with {each} stages each cannot share {blocks} blocks",
            pin.span,
            "every stage holds at least one block",
            secondary=[(s, "pinned here") for s in pins.spans(["pipeline"])],
        )


def schedule_takes_stages(pins: Pins) -> None:
    """How many stages a rank has: pinned, or what the cuts and the ranks say."""
    schedule, ranks = pins.pinned("schedule"), pins.number("pipeline")
    each, said = pins.number("interleave"), pins.pinned("interleave")
    cuts = pins.pinned("stages")
    if each is None and cuts and ranks and isinstance(cuts.values[0], tuple):
        each, said = len(cuts.values[0]) // ranks, cuts
    if each is None or said is None:
        return
    if ranks == 1 and each > 1:
        raise fault(
            "E0407",
            f"{each} stages on each rank of a pipeline, and there is one rank",
            said.span,
            secondary=[(s, "pinned here") for s in pins.spans(["pipeline"])],
        )
    if schedule is None or (ranks == 1 and each == 1):
        return
    name = str(schedule.values[0])
    fewest, most = STAGES_ON_A_RANK[name]
    if each >= fewest and (most is None or each <= most):
        return
    wanted = str(fewest) if fewest == most else f"at least {fewest}"
    fitting = [w for w, (low, high) in STAGES_ON_A_RANK.items() if low <= each <= (high or each)]
    raise fault(
        "E0407",
        f"`schedule = {name}` needs {wanted} stage{'s' * (fewest > 1)} on each pipeline rank, "
        f"not {each}",
        said.span,
        secondary=((schedule.span, "pinned here"),),
        helps=(f"use `interleave = {fewest}`, or " + listing(f"schedule = {w}" for w in fitting),),
    )


def shards_are_data(pins: Pins) -> None:
    """Context ranks shard with every data rank, so shards come in multiples of them."""
    shard, data, zero = pins.pinned("shard"), pins.number("data"), pins.number("zero")
    ranks = pins.number("shard")
    if shard is None or ranks is None:
        return
    if data is not None:
        # one shard is ZeRO 0, whatever the context ranks
        counts = sorted({1} | {d * c for c in context_ranks(pins) for d in divisors(data)})
        if ranks not in counts:
            near = sorted(sorted(counts, key=lambda n: abs(n - ranks))[:3])
            context = pins.number("context") or 1
            beside = f" and {context} context ranks" if context > 1 else ""
            raise fault(
                "E0407",
                f"{ranks} shards do not fit {data} data ranks{beside}",
                shard.span,
                secondary=[(s, "pinned here") for s in pins.spans(["data", "context"])],
                helps=("use " + listing(f"shard = {n}" for n in near),),
            )
    if zero == 0 and ranks > 1:
        raise fault(
            "E0407",
            "`zero = 0` shards nothing",
            shard.span,
            secondary=[(s, "pinned here") for s in pins.spans(["zero"])],
            helps=("leave `shard` out, or set `zero` to 1, 2 or 3",),
        )


def divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]


def context_ranks(pins: Pins) -> list[int]:
    """What the pins leave for `context`."""
    pinned = pins.number("context")
    if pinned is not None:
        return [pinned]
    if pins.cluster is None:
        return [1]
    others = prod(n for key in AXES if (n := pins.number(key)) is not None)
    left = {world // others for world in pins.cluster.worlds()}
    return sorted({d for n in left for d in divisors(max(n, 1))})


def zero_needs_ranks(pins: Pins) -> None:
    """ZeRO shards over data and context ranks; with one of each there is nothing to shard over."""
    zero, pin = pins.number("zero"), pins.pinned("zero")
    if pin is None or not zero or pins.number("data") != 1:
        return
    if context_ranks(pins) == [1]:
        raise fault(
            "E0407",
            f"`zero = {zero}` has no ranks to shard over",
            pin.span,
            "there is one data rank, and one context rank",
            secondary=[(s, "pinned here") for s in pins.spans(["data"])],
            helps=("use `zero = 0`, or more data ranks",),
        )


def sequence_needs_tensor(pins: Pins) -> None:
    sequence = pins.pinned("sequence")
    if sequence and sequence.values[0] == "on" and pins.number("tensor") == 1:
        raise fault(
            "E0407",
            "`sequence = on` splits over tensor ranks, and there is one",
            sequence.span,
            secondary=[(s, "pinned here") for s in pins.spans(["tensor"])],
        )


def context_splits_tokens(pins: Pins) -> None:
    """Each rank holds two chunks of a sequence, and tensor ranks may split those again."""
    pin, ranks = pins.pinned("context"), pins.number("context")
    if pin is None or ranks is None or ranks == 1 or pins.train is None:
        return
    length = pins.train.sequence_length
    sequence = pins.pinned("sequence")
    split = sequence is not None and sequence.values[0] == "on"
    tensor = (pins.number("tensor") or 1) if split else 1
    unit = lcm(2 * ranks, tensor * ranks)
    if length % unit == 0:
        return
    near = [n for n in (length // unit * unit, (length // unit + 1) * unit) if n]
    fits = [n for n in divisors(length // 2) if length % lcm(2 * n, tensor * n) == 0]
    if pins.cluster is not None:
        worlds = pins.cluster.worlds()
        fits = [n for n in fits if any(world % n == 0 for world in worlds)]
    fits = sorted(sorted(fits, key=lambda n: abs(n - ranks))[:2])
    secondary = [(s, "with this") for s in pins.spans(["tensor"] if tensor > 1 else [])]
    span = pins.train.key_spans.get("sequence_length")
    if span is not None:
        secondary.append((span, f"{length} tokens"))
    raise fault(
        "E0410",
        f"{ranks} context ranks cannot share sequences of {length} tokens",
        pin.span,
        f"every rank holds the same number of tokens: {unit} must divide them",
        secondary=secondary,
        helps=(
            *(("use " + listing(f"context = {n}" for n in fits),) if fits else ()),
            "or " + listing(f"sequence_length = {n}" for n in near),
        ),
    )


def ulysses_splits_heads(pins: Pins) -> None:
    """Every rank computes some of the query heads that a tensor rank has."""
    style, ranks = pins.pinned("context_style"), pins.number("context")
    if style is None or not isinstance(pins.model, Model):
        return
    if ranks == 1:
        raise fault(
            "E0407",
            "`context_style` says how context ranks share attention, and there is one",
            style.span,
            secondary=[(s, "pinned here") for s in pins.spans(["context"])],
        )
    tensor = pins.number("tensor") or 1
    heads = [use.option("heads") for use in operators_of(pins.model, "attention")]
    common = gcd(*(h for h in heads if isinstance(h, int)), 0)
    if style.values[0] != "ulysses" or ranks is None or common % (ranks * tensor) == 0:
        return
    shared = f"{ranks} context × {tensor} tensor ranks" if tensor > 1 else f"{ranks} context ranks"
    fits = [n for n in divisors(common) if common % (n * tensor) == 0 and n > 1]
    near = sorted(sorted(fits, key=lambda n: abs(n - ranks))[:2])
    raise fault(
        "E0411",
        f"{shared} cannot share {common} heads",
        style.span,
        "every rank computes the same number of whole heads",
        secondary=[(s, "with this") for s in pins.spans(["context", "tensor"])],
        helps=(
            *(("use " + listing(f"context = {n}" for n in near),) if near else ()),
            "or `context_style = ring`, which splits no heads",
        ),
    )


def parameters_are_sharded(pins: Pins) -> None:
    """Host memory holds parameters that ZeRO 3 gathers from parts."""
    offload = pins.pinned("offload")
    if offload is None or "parameters" not in words_of(offload.values[0]):
        return
    zero = pins.pinned("zero")
    if zero is not None and zero.values[0] != 3:
        raise fault(
            "E0414",
            "`offload = parameters` needs ZeRO 3",
            zero.span,
            "the device would hold the parameters all the time",
            secondary=((offload.span, "pinned here"),),
            helps=("write `zero = 3`, or `offload = optimizer`",),
        )
    ranks = pins.number("data")
    alone = pins.cluster is not None and pins.cluster.world_size == 1
    if alone or (ranks == 1 and (pins.number("context") or 1) == 1):
        raise fault(
            "E0414",
            "`offload = parameters` needs data ranks that share the parameters",
            offload.span,
            "ZeRO 3 shards over them, and there is one",
            helps=("write `offload = optimizer`",),
        )


def experts_have_copies(pins: Pins) -> None:
    """FSDP2 holds in host memory what it gathers: not experts that one rank alone has."""
    expert, offload = pins.pinned("expert"), pins.pinned("offload")
    if expert is None or offload is None or pins.cluster is None:
        return
    ranks = pins.number("expert") or 1
    if ranks == 1 or "parameters" not in words_of(offload.values[0]):
        return
    most = pins.cluster.world_size // prod(pins.number(k) or 1 for k in ("tensor", "pipeline"))
    data, context = pins.number("data"), pins.number("context")
    if data is not None and context is not None:
        most = min(most, data * context)
    if most <= ranks:
        raise fault(
            "E0414",
            "`offload = parameters` needs ranks that share each expert",
            expert.span,
            "no expert is on two of the ranks that share parameters, and ZeRO 3 gathers none",
            secondary=((offload.span, "pinned here"),),
            helps=("use fewer expert ranks, or write `offload = optimizer`",),
        )


def words_of(value: Option) -> tuple[Option, ...]:
    return value if isinstance(value, tuple) else (value,)


def batch_divides(pins: Pins) -> None:
    """`data` × `microbatch` must divide the batch, and each size of its ramp; either alone must
    too."""
    if pins.train is None:
        return
    sizes = {k: n for k in ("data", "microbatch") if (n := pins.number(k)) is not None}
    unit = prod(sizes.values())
    batches = [*(size for _, size in pins.train.ramp_stages), pins.train.batch_sequences]
    batch = next((size for size in batches if size % unit), None)
    if not sizes or batch is None:
        return
    *earlier, last = pins.spans(sizes)
    length = pins.train.sequence_length
    near = [n for n in (batch // unit * unit, (batch // unit + 1) * unit) if n]
    batch_span = pins.train.key_spans.get("batch")
    secondary = [(span, "with this") for span in earlier]
    if batch_span is not None:
        secondary.append((batch_span, f"{batch} sequences of {length} tokens"))
    raise fault(
        "E0408",
        f"{factors(sizes)} does not divide a batch of {batch} sequences",
        last,
        secondary=secondary,
        helps=("use " + listing(f"batch = {n} sequences" for n in near),)
        if len(batches) == 1
        else (f"every size of the ramp must be a multiple of {unit} sequences",),
    )


RULES: tuple[Callable[[Pins], None], ...] = (
    contradictions,
    tensor_splits_heads,
    experts_are_shared,
    axes_fill_world,
    stages_cut_blocks,
    blocks_fill_stages,
    schedule_takes_stages,
    shards_are_data,
    zero_needs_ranks,
    sequence_needs_tensor,
    context_splits_tokens,
    ulysses_splits_heads,
    parameters_are_sharded,
    experts_have_copies,
    batch_divides,
)


def parse_lines(text: str, program: Program) -> tuple[Constraint, ...]:
    """`tensor = 4, zero in [1, 3]`: lines of a plan block, and the rest of the program's block for
    other keys. Errors: SpecError, for what no plan of the program can keep too."""
    depth, block = 0, ""
    for sign in text:
        depth += (sign in "([") - (sign in ")]")
        block += ";" if sign == "," and not depth else sign
    block = f"plan {{ {block} }}"
    lines = parse_block(block)
    keys = {line.key for line in lines}
    others = tuple(line for line in program.plan if line.key not in keys)
    pins = Pins(
        constraints=(*others, *lines),
        model=program.model,
        cluster=program.cluster,
        train=program.train,
    )
    faults = check_pins(pins)
    if faults:
        raise SpecError([f.diagnostic for f in faults], {BLOCK: block})
    return lines


BLOCK = "plan"
"""The path of a block that is in no file."""


def parse_block(text: str) -> tuple[Constraint, ...]:
    """Errors: SpecError."""
    path = BLOCK
    file, diagnostics = parse(path, text)
    found: list[Constraint] = []
    sections = [d for d in file.declarations if isinstance(d, syntax.Section) and d.kind == "plan"]
    if not diagnostics and (len(sections) != 1 or len(file.declarations) != 1):
        span = Span(path, 1, 1, 1, 2)
        diagnostics = [fault("E0501", "this is not one `plan { … }` block", span).diagnostic]
    for section in sections[:1]:
        found, faults = constraints_of(section)
        diagnostics += [f.diagnostic for f in faults]
    if not diagnostics:
        pins = Pins(constraints=tuple(found), model=None, cluster=None, train=None)
        diagnostics = [f.diagnostic for f in check_pins(pins)]
    if diagnostics:
        raise SpecError(diagnostics, {path: text})
    return tuple(found)
