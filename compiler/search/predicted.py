"""The machine-readable face of a candidate: the objects `model`, `plan`, `predicted` of --json."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

from llmspec.compiler.cost.stage import Stage
from llmspec.compiler.kernels.kinds import EAGER
from llmspec.compiler.passes.recompute import in_words, stretches
from llmspec.compiler.plan import EVERYTHING
from llmspec.compiler.search.candidates import Candidate
from llmspec.compiler.search.critical_batch import batch_object
from llmspec.compiler.search.limits import HOUR_S, steps_of
from llmspec.compiler.search.pins import Recompute
from llmspec.compiler.search.policies import lowered
from llmspec.compiler.search.sent import collectives_of
from llmspec.compiler.search.space import Space

DIGITS = 9
"""Significant digits of predicted numbers: the same bytes on every machine."""

Number = dict[str, Any]


def rounded(value: float) -> float:
    return float(f"{value:.{DIGITS}g}")


def model_object(space: Space) -> Number:
    graph = space.graph(1)
    count = sum(math.prod(p.shape) for _, p in graph.parameters())
    active = sum(p.active_elements for _, p in graph.parameters())
    return {
        "parameters": count,
        "parameters_active": active,
        "parameters_trained": count,
        "flops_per_token": rounded(flops_per_token(space)),
    }


def flops_per_token(space: Space) -> float:
    """Forward once and backward twice, products alone, causal attention at half its square."""
    from llmspec.compiler.ops.registry import entry_of, shapes_of  # fills with the dialect

    graph = space.graph(1)
    by_unit = {}
    for name, unit in graph.units.items():
        entries = [(n, entry_of(n)) for n in unit.calls()]
        by_unit[name] = sum(
            (e.model_flops or e.flops)(n, shapes_of(n)) for n, e in entries if e.contraction
        )
    return 3 * sum(by_unit[i.unit] for i in graph.instances) / (graph.sequences * graph.tokens)


def plan_object(space: Space, found: Candidate) -> Number:
    """Every key of the language's `plan` block, and what follows from them."""
    shape, mesh = found.shape, found.mesh
    graph = space.graph(1)
    starts = [i for i, instance in enumerate(graph.instances) if instance.prefix]
    blocks = [sum(a <= i < b for i in starts) for a, b in shape.cut]
    return {
        "data": mesh.data,
        "shard": found.parts,
        "zero": found.zero,
        "tensor": mesh.tensor,
        "sequence": "on" if shape.option.sequence else "off",
        "context": mesh.context,
        "context_style": shape.option.view.style,
        "expert": mesh.expert,
        "pipeline": mesh.pipeline,
        "interleave": found.interleave,
        "schedule": str(found.schedule) if mesh.pipeline > 1 else None,
        "stages": blocks,
        "microbatch": shape.microbatch,
        "recompute": recompute_word(space, found),
        "recompute_by_unit": recompute_words(space, found),
        "offload": list(found.offload) or "none",
        "kernels": shape.option.kernels,
        "loss_rows": shape.option.view.loss_rows,
        "choices": dict(found.choices),
        "world_size": mesh.world_size,
        "microbatches": shape.microbatches,
    }


def recompute_word(space: Space, found: Candidate) -> str:
    """The value of the language's key."""
    if found.shape.recompute is Recompute.LISTED:
        return f"[{', '.join(space.pins.recomputed_operators())}]"
    instances = space.graph(1).instances
    of_blocks = [o for i, o in zip(instances, found.recompute, strict=True) if i.prefix]
    if not any(of_blocks):
        return "none"
    return "full" if set(of_blocks) == {EVERYTHING} else "selective"


def recompute_words(space: Space, found: Candidate) -> dict[str, list[Number]]:
    """Of each block that computes again: how many in a row, and which of its operators."""
    option, size = found.shape.option, found.shape.microbatch
    out: dict[str, list[Number]] = {}
    for name, own in stretches(space.graph(1).instances, found.recompute).items():
        if any(s.again for s in own):
            unit = lowered(space.graph(size, option.view), option, name)
            out[name] = [{"blocks": s.blocks, "again": in_words(unit, s.again)} for s in own]
    return out


def predicted_object(space: Space, found: Candidate) -> Number:
    times, program = found.times, space.program
    assert times is not None, "only a plan that fits is predicted"
    step, world = times.total, found.mesh.world_size
    tokens = program.train.batch_tokens
    shape = found.shape
    stages = space.repeats.stages(shape, found.recompute)
    model_flops = flops_per_token(space) * tokens / world / step
    executed = sum(s.flops for s in stages) * shape.microbatches / found.mesh.pipeline / step
    waiting = times.pipeline_bubble
    return {
        "step_time_s": rounded(step),
        "tokens_per_s": rounded(tokens / step),
        "tokens_per_s_per_gpu": rounded(tokens / step / world),
        "model_flops_per_s_per_gpu": rounded(model_flops),
        "mfu": rounded(model_flops / space.machine.peak_flops),
        "hardware_flops_per_s_per_gpu": rounded(executed),
        "hfu": rounded(executed / space.machine.peak_flops),
        "peak_memory_bytes": found.peak_bytes,
        "bytes_per_parameter": space.types.bytes_per_parameter,
        "memory_bytes": found.ledger.parts(),
        "host_memory_bytes": found.host.parts(),
        "peak_host_memory_bytes": found.host.total,
        "time_s": {name: rounded(value) for name, value in times.parts().items()},
        "bubble_fraction": rounded(waiting / step),
        "collectives": collectives(space, found, stages),
        "run": run_object(space, found),
        "batch": batch_of(space),
    } | eager_object(space, found)


def eager_object(space: Space, found: Candidate) -> Number:
    """`eager`: the same plan with its operators run one by one; nothing where they are."""
    if found.shape.option.kernels == EAGER:
        return {}
    option = space.chain.with_kernels(found.shape.option, EAGER)
    shape, price = replace(found.shape, option=option), space.pricing
    stages = space.repeats.stages(shape, found.recompute)
    way = (shape, stages, found.zero, found.shards, found.schedule, found.offload)
    ledger, _ = price.worst_ledger(*way)
    apart = {
        "step_time_s": rounded(price.times(*way, play=True).total),
        "peak_memory_bytes": ledger.total,
        "activations_bytes": ledger.parts()["activations"],
    }
    return {"eager": apart}


def batch_of(space: Space) -> Number:
    train, graph = space.program.train, space.graph(1)
    tokens = train.tokens if train.steps is None else train.tokens_of(train.steps)
    parameters = model_object(space)["parameters"]
    return batch_object(train.batch_tokens, train.loss, parameters, tokens, graph.vocab)


def run_object(space: Space, found: Candidate) -> Number:
    """The whole run. ramp: its steps before the batch has its size."""
    program, world = space.program, found.mesh.world_size
    train, price = program.train, program.cluster.device.price_per_hour
    steps = steps_of(train)
    ramp = [ramp_stage(space, found, count, size) for count, size in train.ramp_stages]
    if steps is None:
        nothing = dict.fromkeys(("steps", "tokens", "days", "gpu_hours", "cost"))
        return {**nothing, "ramp": ramp}
    hours = space.run_s(found) / HOUR_S
    return {
        "steps": steps,
        "tokens": train.tokens_of(steps),
        "ramp": ramp,
        "days": rounded(hours / 24),
        "gpu_hours": rounded(hours * world),
        "cost": None if price is None else rounded(hours * world * price),
    }


def ramp_stage(space: Space, found: Candidate, steps: int, sequences: int) -> Number:
    """The same plan with fewer micro-batches."""
    small = space.smaller(found, sequences)
    return {
        "steps": steps,
        "sequences": sequences,
        "microbatches": small.shape.microbatches,
        "step_time_s": rounded(small.step_s),
    }


def collectives(space: Space, found: Candidate, stages: list[Stage]) -> list[Number]:
    """What one rank sends in a step, of those on the pipeline's busiest place."""
    ranks = space.pricing.by_ranks(found.shape, stages, found.schedule)
    busiest = max(range(len(ranks)), key=lambda i: ranks[i].busy_s)
    return collectives_of(space, found, stages, busiest)
