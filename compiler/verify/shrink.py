"""A plan small enough for local processes, with the same decisions.

Every mesh axis larger than 2 becomes 2; widths, depth, vocabulary and tokens follow. Placements,
ZeRO level, schedule, recomputation and unevenness are the plan's own.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from math import gcd, lcm

from llmspec.compiler import schedules
from llmspec.compiler.build.model import build_model
from llmspec.compiler.graph import ModelGraph
from llmspec.compiler.plan import MeshSizes, Plan, Stretch
from llmspec.dsl.program import (
    Arithmetic,
    Assign,
    Binding,
    Block,
    BlockUse,
    Call,
    Expr,
    Model,
    Operator,
    Option,
    Program,
    Ramp,
    Repeat,
)

TOKENS = 16
HEAD_SIZE = 8
LOSS_ROWS = 6
"""Several chunks of a micro-batch, the last one smaller."""
WIDTHS = ("width", "out", "ffn")


def shrink(program: Program, plan: Plan, largest: int = 2) -> tuple[Program, Plan]:
    """The small program and the small plan, no axis with more than `largest` ranks.

    A model from PyTorch keeps its sizes: they are its own code's.
    """
    mesh = small_mesh(plan.mesh, largest)
    stages = mesh.pipeline * plan.interleave
    model = program.model
    blocks = plan.stages[-1][1] - 2
    recompute = plan.recompute
    if isinstance(model, Model):
        exchanged = plan.context_style == "ulysses"
        sizes = Sizes(
            widths=_sizes(model),
            heads=largest,
            expert_ranks=mesh.expert,
            head_ranks=mesh.tensor * mesh.context if exchanged else 1,
        )
        kinds = max((len({s.again for s in own}) for own in recompute.values()), default=1)
        model = small_model(model, stages, sizes, kinds)
        blocks = block_count(model)
        recompute = small_recompute(recompute, build_model(model, sequences=1, tokens=TOKENS))
    microbatch = min(plan.microbatch, 2)
    # enough that the pipeline's steady state is there
    microbatches = min(plan.microbatches, max(4, 2 * mesh.pipeline))
    sequence = TOKENS if isinstance(program.model, Model) else program.train.sequence_length
    train = replace(
        program.train,
        sequence_length=sequence,
        batch_sequences=mesh.data * microbatch * microbatches,
    )
    small = replace(
        plan,
        mesh=mesh,
        microbatch=microbatch,
        microbatches=microbatches,
        stages=small_stages(plan.stages, stages, blocks),
        recompute=recompute,
        loss_rows=None if plan.loss_rows is None else LOSS_ROWS,
        actions=(),
        ramp_actions={},
        predicted={},
    )
    if program.train.ramp is not None:
        # half the micro-batches, and a quarter where there are four
        unit = mesh.data * microbatch
        ramp = Ramp(
            start_sequences=unit,
            increment_sequences=None,
            over_tokens=None,
            over_steps=microbatches,
        )
        train = replace(train, ramp=ramp)
    if stages > 1:
        counts = [size // mesh.data // microbatch for _, size in train.ramp_stages]
        lists = {str(n): schedule_actions(replace(small, microbatches=n)) for n in counts}
        small = replace(small, actions=schedule_actions(small), ramp_actions=lists)
    return replace(program, model=model, train=train), small


def small_mesh(mesh: MeshSizes, largest: int) -> MeshSizes:
    axes = ("pipeline", "replicas", "shards", "context", "expert", "tensor")
    return MeshSizes(**{a: min(getattr(mesh, a), largest) for a in axes})


def schedule_actions(plan: Plan) -> tuple[tuple[str, ...], ...]:
    """The action lists of a plan, by pipeline rank."""
    lists = schedules.actions(
        schedules.Schedule(plan.schedule),
        len(plan.stages),
        plan.mesh.pipeline,
        plan.microbatches,
        plan.zero,
    )
    return tuple(lists[rank] for rank in range(plan.mesh.pipeline))


def small_stages(
    stages: tuple[tuple[int, int], ...], count: int, blocks: int
) -> tuple[tuple[int, int], ...]:
    """`count` stages over `blocks` blocks between the first and the last unit.

    What is left over goes to the stages that were larger, so that uneven cuts stay uneven.
    """
    sizes = [b - a for a, b in stages]
    larger = [s for s in range(count) if sizes[s * len(sizes) // count] > min(sizes)]
    order = [*larger, *(s for s in range(count) if s not in larger)]
    new = [blocks // count] * count
    for s in order[: blocks % count]:
        new[s] += 1
    bounds = [1 + sum(new[:s]) for s in range(count)] + [blocks + 2]
    bounds[0] = 0
    return tuple(pairwise(bounds))


def small_recompute(
    recompute: Mapping[str, tuple[Stretch, ...]], graph: ModelGraph
) -> dict[str, tuple[Stretch, ...]]:
    """Every kind of choice that the blocks of a unit have, as far as there are blocks."""
    small = {}
    for name, own in recompute.items():
        uses = sum(i.unit == name for i in graph.instances)
        kinds = list(dict.fromkeys(s.again for s in own))[:uses]
        share = uses // len(kinds)
        first = uses - share * (len(kinds) - 1)
        small[name] = tuple(
            Stretch(blocks=share if i else first, again=again) for i, again in enumerate(kinds)
        )
    return small


# --------------------------------------------------------------------------------------------------
# Models


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """widths: large -> small. heads: at most so many key/value heads, and twice as many heads.

    expert_ranks: what divides the number of experts. head_ranks: what divides the number of heads.
    """

    widths: dict[int, int]
    heads: int
    expert_ranks: int = 1
    head_ranks: int = 1


def block_count(model: Model) -> int:
    """Links of the chain from its first block to its last, operators between them as one."""
    kinds: list[str] = []
    for binding in model.body:
        match binding.value:
            case Repeat(count=count, body=body):
                kinds += ["block"] * (count * len(body))
            case BlockUse():
                kinds.append("block")
            case _:
                if not kinds or kinds[-1] != "plain":
                    kinds.append("plain")
    first = kinds.index("block") if "block" in kinds else len(kinds)
    last = len(kinds) - kinds[::-1].index("block") if "block" in kinds else first
    return len(kinds[first:last])


def small_model(model: Model, stages: int, sizes: Sizes, kinds: int = 1) -> Model:
    """Every size small, equal sizes equal, and enough blocks for an uneven cut into stages and for
    `kinds` of blocks that compute different things again."""
    repeats = sum(len(b.value.body) for b in model.body if isinstance(b.value, Repeat))
    wanted = max(stages + 1 if stages > 1 else 2, kinds)
    rounds = -(-wanted // max(repeats, 1))
    return replace(
        model,
        vocab=_vocab(model.vocab),
        context=_context(model.context),
        width=sizes.widths[model.width],
        blocks=tuple(_block(b, sizes) for b in model.blocks),
        body=tuple(_binding(b, sizes, rounds) for b in model.body),
    )


def _operators(model: Model) -> list[Operator]:
    found: list[Operator] = []

    def visit(expr: Expr | Repeat) -> None:
        match expr:
            case Operator(inputs=inputs):
                found.append(expr)
                for e in inputs:
                    visit(e)
            case BlockUse(inputs=inputs):
                for e in inputs:
                    visit(e)
            case Arithmetic(left=left, right=right):
                visit(left)
                visit(right)
            case Repeat(body=body):
                for use in body:
                    visit(use)

    for block in model.blocks:
        for statement in block.body:
            visit(statement.value)
    for binding in model.body:
        visit(binding.value)
    return found


def _sizes(model: Model) -> dict[int, int]:
    """Widths of the model -> small widths, distinct where they were."""
    widths = {model.width}
    for operator in _operators(model):
        for name, value in _flat(operator.options):
            if name in WIDTHS and isinstance(value, int) and value != model.vocab:
                widths.add(value)
    return {w: 32 + 16 * i for i, w in enumerate(sorted(widths))} | {
        model.vocab: _vocab(model.vocab)
    }


def _flat(options: Iterable[tuple[str, Option | Call]]) -> Iterator[tuple[str, Option]]:
    """Those of calls inside (`expert=swiglu(ffn=…)`) too."""
    for name, value in options:
        if isinstance(value, Call):
            yield from _flat(value.options)
        else:
            yield name, value


def _vocab(size: int) -> int:
    return 64 if size % 2 == 0 else 67


def _context(_: int) -> int:
    return TOKENS


Options = dict[str, Option | Call]


def _option(name: str, value: Option | Call, sizes: Sizes, options: Options) -> Option | Call:
    if isinstance(value, Call):
        inner = tuple((n, _option(n, v, sizes, {})) for n, v in value.options)
        return replace(value, options=inner)
    if not isinstance(value, int) or isinstance(value, bool):
        return value
    match name:
        case "experts" | "top_k" | "groups" | "top_groups":
            return _mixture(options, sizes)[name]
        case "width" | "out" | "ffn":
            return sizes.widths[value]
        case "vocab":
            return _vocab(value)
        case "context":
            return _context(value)
        case "kv_heads":
            return min(value, sizes.heads)
        case "heads" if "kv_heads" not in options:
            return min(value, 2 * sizes.heads)
        case "q_rank" | "kv_rank":
            return min(value, 16)
        case "nope" | "value":
            return min(value, HEAD_SIZE)
        case "rope_size":
            return min(value, HEAD_SIZE // 2)
        case "heads":
            kv_heads = options["kv_heads"]
            assert isinstance(kv_heads, int), "heads come with key/value heads"
            fewest = min(kv_heads, sizes.heads)
            together = sizes.head_ranks // gcd(fewest, sizes.head_ranks)
            return fewest * (together if together > 1 else min(value // kv_heads, 2))
        case "head_size":
            return HEAD_SIZE
        case "window":
            return min(value, 5)
        case _:
            return value


def _mixture(options: Options, sizes: Sizes) -> dict[str, int]:
    """Few experts, that groups and ranks still divide, of which a token still picks some."""
    large = {k: int(options[k]) for k in ("experts", "top_k", "groups", "top_groups")}  # type: ignore[arg-type]
    groups = min(large["groups"], 4)
    fewer = large["top_groups"] < large["groups"]
    top_groups = min(large["top_groups"], max(groups // 2, 1)) if fewer else groups
    top_k = min(large["top_k"], 2)
    unit = lcm(groups, sizes.expert_ranks)
    experts = unit * -(-max(2 * groups, 4) // unit)
    return {
        "experts": min(experts, large["experts"]),
        "top_k": top_k,
        "groups": groups,
        "top_groups": top_groups,
    }


def _operator(operator: Operator, sizes: Sizes) -> Operator:
    options = dict(operator.options)
    small = tuple((n, _option(n, v, sizes, options)) for n, v in operator.options)
    inputs = tuple(_expr(e, sizes) for e in operator.inputs)
    return replace(operator, options=small, inputs=inputs)


def _use(use: Operator | BlockUse, sizes: Sizes) -> Operator | BlockUse:
    if isinstance(use, Operator):
        return _operator(use, sizes)
    return replace(use, inputs=tuple(_expr(e, sizes) for e in use.inputs))


def _expr(expr: Expr, sizes: Sizes) -> Expr:
    match expr:
        case Operator() | BlockUse():
            return _use(expr, sizes)
        case Arithmetic(left=left, right=right):
            return replace(expr, left=_expr(left, sizes), right=_expr(right, sizes))
        case _:
            return expr


def _block(block: Block, sizes: Sizes) -> Block:
    def small(statement: Assign) -> Assign:
        return replace(statement, value=_expr(statement.value, sizes))

    return replace(block, body=tuple(small(s) for s in block.body))


def _binding(binding: Binding, sizes: Sizes, rounds: int) -> Binding:
    value = binding.value
    if isinstance(value, Repeat):
        body = tuple(_use(use, sizes) for use in value.body)
        return replace(binding, value=replace(value, body=body, count=min(value.count, rounds)))
    return replace(binding, value=_expr(value, sizes))  # type: ignore[arg-type]
