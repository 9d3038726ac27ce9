"""Random models in the language, and random legal plans: whatever the registry allows, not what a
search would choose.
"""

from __future__ import annotations

import random
from dataclasses import replace

from torch import fx

from llmspec.compiler.graph import INTEGER_INPUTS, ModelGraph, Unit
from llmspec.compiler.ops.attention import attention
from llmspec.compiler.ops.registry import choices, entry_of, shape_of, tensor_operands
from llmspec.compiler.passes.context import possible_styles
from llmspec.compiler.passes.recompute import Operators, runs, stretches
from llmspec.compiler.passes.shard import shard_unit, whole_placement
from llmspec.compiler.placement import (
    SHADOW,
    WHOLE,
    Kind,
    Split,
    State,
    conversion,
)
from llmspec.compiler.plan import EVERYTHING, MeshSizes, Plan, Stretch, UnitPlacement
from llmspec.compiler.verify.shrink import schedule_actions
from llmspec.compiler.views import WHOLE_VIEW, View, seen

# --------------------------------------------------------------------------------------------------
# Models


def random_model(rng: random.Random) -> str:
    """The text of a model block: blocks, widths, heads, chains, ties, windows drawn at random."""
    width = rng.choice([16, 32, 48])
    vocab = rng.choice([64, 67, 50, 33])
    blocks = [f"b{i}" for i in range(rng.choice([1, 1, 2]))]
    lines = [f"model m {{ vocab = {vocab}; context = 16; width = {width}"]
    for name in blocks:
        body = "\n        ".join(_statement(rng, width) for _ in range(rng.randint(1, 3)))
        lines.append(f"    block {name}(x) {{\n        {body}\n    }}")
    positions = rng.choice(["", "(positions=learned)"])
    repeat = (
        f"{blocks[0]} * {rng.randint(1, 3)}"
        if len(blocks) == 1
        else f"({' -> '.join(blocks)}) * {rng.randint(1, 2)}"
    )
    extra = rng.choice(["", " -> dropout(0.1)", " -> layernorm"])
    norm = rng.choice(["rmsnorm", "layernorm"])
    tie = rng.choice(["", "(tied)", "(bias)"])
    lines.append(f"    tokens -> embed{positions}{extra} -> {repeat} -> {norm} -> unembed{tie}")
    return "\n".join([*lines, "}"])


def _statement(rng: random.Random, width: int) -> str:
    norm = rng.choice(["rmsnorm(x)", "layernorm(x)", "x"])
    inner = rng.choice([_attention, _mixer, _mixer])(rng, norm, width)
    if rng.random() < 0.3:
        inner = f"dropout({inner}, 0.2)"
    form = rng.choice(["x = x + {}", "x = x + {}", "x = {} + 0.5 * x", "x = x - {}"])
    return form.format(inner)


def _attention(rng: random.Random, x: str, width: int) -> str:
    heads = rng.choice([2, 4])
    options = [f"heads={heads}", rng.choice(["causal", "causal", "bias"])]
    if rng.random() < 0.5:
        options.append(f"kv_heads={rng.choice([h for h in (1, 2, 4) if heads % h == 0])}")
    if rng.random() < 0.5:
        options.append("rope=10_000")
    if rng.random() < 0.3 and "causal" in options:
        options.append("window=5")
    if rng.random() < 0.2:
        options.append("explicit")
    return f"attention({x}, {', '.join(sorted(options, key=lambda o: '=' not in o))})"


def _mixer(rng: random.Random, x: str, width: int) -> str:
    ffn = rng.choice([24, 40, 64])
    act = rng.choice(["gelu", "relu", "silu", "tanh", "sigmoid"])
    return rng.choice(
        [
            f"swiglu({x}, ffn={ffn})",
            f"geglu({x}, ffn={ffn})",
            f"mlp({x}, ffn={ffn}, activation={act})",
            f"mlp({x}, ffn={ffn}, activation={act}, bias)",
            f"linear({act}(linear({x}, {ffn})), {width}, bias)",
            f"{act}({x}) * linear({x}, {width})",
        ]
    )


# --------------------------------------------------------------------------------------------------
# Placements


def _uneven(shape: tuple[int, ...], state: State, ranks: int) -> bool:
    return state.kind is Kind.SPLIT and state.dim is not None and shape[state.dim] % ranks != 0


def _converts(shape: tuple[int, ...], have: State, want: State, ranks: int) -> bool:
    if have == want:
        return True
    if _uneven(shape, have, ranks) or _uneven(shape, want, ranks):
        return False
    return conversion(have, want) is not None


def _parameter_states(shape: tuple[int, ...], ranks: int) -> list[State]:
    return [WHOLE, SHADOW, *(Split(d) for d, size in enumerate(shape) if size >= ranks)]


class Stuck(Exception):
    """The random choices so far admit no further one."""


def random_placement(
    unit: Unit, ranks: int, rng: random.Random, boundary: State, tied: dict[str, State]
) -> UnitPlacement:
    """Choices drawn one node after the other. `tied`: states that other units drew, by full name;
    this unit's draws are added. Errors: Stuck.
    """
    states: dict[fx.Node, State] = {}
    nodes: dict[str, str] = {}
    parameters: dict[str, str] = {}
    for node in unit.graph.nodes:
        if node.op == "placeholder":
            states[node] = WHOLE if str(node.target) in INTEGER_INPUTS else boundary
        elif node.op == "get_attr":
            weight = node.meta["parameter"]
            name = weight.tied or weight.path
            options = _parameter_states(shape_of(node), ranks)
            states[node] = tied.setdefault(name, rng.choice(options))
            parameters[weight.path] = str(states[node])
        elif node.op == "call_function":
            legal = [
                c
                for c in choices(entry_of(node).rule(node), ranks)
                if all(
                    _converts(shape_of(o), states[o], want, ranks)
                    for o, want in zip(tensor_operands(node), c.operands, strict=True)
                )
            ]
            if not legal:
                raise Stuck(node.name)
            choice = rng.choice(legal)
            states[node], nodes[node.name] = choice.result, choice.name
    result = unit.result()
    out = boundary if shape_of(result) else WHOLE
    if not _converts(shape_of(result), states[result], out, ranks):
        raise Stuck("result")
    flow = next(n for n in unit.graph.nodes if n.op == "placeholder")
    return UnitPlacement(
        boundary_in=str(states[flow]), boundary_out=str(out), nodes=nodes, parameters=parameters
    )


def random_placements(
    graph: ModelGraph, ranks: int, rng: random.Random, sequence: bool
) -> dict[str, UnitPlacement]:
    boundary = Split(1) if sequence else WHOLE
    for _ in range(2000):
        tied: dict[str, State] = {}
        try:
            return {
                name: _retried(unit, ranks, rng, boundary, tied)
                for name, unit in graph.units.items()
            }
        except Stuck:
            continue
    raise AssertionError("no random placement found")


def _retried(
    unit: Unit, ranks: int, rng: random.Random, boundary: State, tied: dict[str, State]
) -> UnitPlacement:
    for _ in range(400):
        drawn = dict(tied)
        try:
            placement = random_placement(unit, ranks, rng, boundary, drawn)
        except Stuck:
            continue
        tied |= drawn
        return placement
    raise Stuck(unit.name)


# --------------------------------------------------------------------------------------------------
# Plans


def random_mesh(rng: random.Random, blocks: int, most: int) -> MeshSizes:
    while True:
        mesh = MeshSizes(
            pipeline=rng.choice([1, 1, 2]) if blocks >= 2 else 1,
            replicas=rng.choice([1, 1, 2]),
            shards=rng.choice([1, 2, 3]),
            context=rng.choice([1, 1, 2, 3]),
            tensor=rng.choice([1, 2, 2, 3]),
        )
        if mesh.world_size <= most:
            return mesh


def random_recompute(
    graph: ModelGraph, placements: dict[str, UnitPlacement], ranks: int, rng: random.Random
) -> dict[str, tuple[Stretch, ...]]:
    """Any operators of each block, also such that nobody asks for."""
    chosen: list[Operators] = []
    for instance in graph.instances:
        unit = graph.units[instance.unit]
        placed = placements[instance.unit] if ranks > 1 else whole_placement(unit)
        names = [n.name for n in shard_unit(unit, placed, ranks).calls() if runs(n)]
        some = tuple(n for n in names if rng.random() < 0.5)
        kinds: list[Operators] = [(), some, some, EVERYTHING]
        chosen.append(rng.choice(kinds) if instance.prefix else ())
    return stretches(graph.instances, chosen)


def _attends(graph: ModelGraph) -> bool:
    return any(n.target is attention for unit in graph.units.values() for n in unit.calls())


def random_plan(graph: ModelGraph, rng: random.Random, most: int = 6) -> Plan:
    """A legal plan; its graph must have been built for `plan.microbatch` sequences of 16 tokens."""
    blocks = len(graph.instances) - 2
    mesh = random_mesh(rng, blocks, most)
    view = WHOLE_VIEW
    if mesh.context > 1:
        # exchanged heads may not suffice for the tensor ranks too: `ulysses` alone has a limit
        styles = [s for s in possible_styles(graph, mesh.context * mesh.tensor) if s == "ulysses"]
        style = rng.choice(["ring", "gather", *styles] if _attends(graph) else ["gather"])
        view = View(context=mesh.context, style=style)
    local = seen(graph, view)
    sequence = mesh.tensor > 1 and local.tokens % mesh.tensor == 0 and rng.random() < 0.5
    zero = rng.choice([1, 2, 3]) if mesh.shards * mesh.context > 1 else 0
    if zero and mesh.shards > 1 and mesh.replicas == 1 and rng.random() < 0.3:
        zero, mesh = 0, replace(mesh, replicas=mesh.shards, shards=1)
    cut = rng.randint(1, max(blocks - 1, 1)) + 1
    whole = len(graph.instances)
    placements = {} if mesh.tensor == 1 else random_placements(local, mesh.tensor, rng, sequence)
    plan = Plan(
        spec="test.llmspec",
        spec_hash="0" * 12,
        model=graph.name,
        train="t",
        mesh=mesh,
        zero=zero,
        sequence=sequence,
        microbatch=graph.sequences,
        microbatches=rng.choice([1, 2, 3]),
        schedule=rng.choice(["gpipe", "1f1b"]),
        stages=((0, whole),) if mesh.pipeline == 1 else ((0, cut), (cut, whole)),
        recompute=random_recompute(local, placements, mesh.tensor, rng),
        placements=placements,
        context_style=view.style,
    )
    return replace(plan, actions=schedule_actions(plan)) if mesh.pipeline > 1 else plan
