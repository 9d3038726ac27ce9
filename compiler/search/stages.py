"""Cuts the chain of instances into pipeline stages."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from llmspec.compiler.graph import ModelGraph

Cut = tuple[tuple[int, int], ...]


def block_starts(graph: ModelGraph) -> list[int]:
    """Where a stage may begin: at each block, with what stands alone before it. The chain's head
    goes with the first block, its tail with the last."""
    starts, begin = [], 0
    for index, instance in enumerate(graph.instances):
        if instance.prefix:
            starts.append(begin)
            begin = index + 1
    return starts or [0]


def cut_at(graph: ModelGraph, blocks: Sequence[int]) -> Cut:
    """Stages of so many blocks each."""
    starts = block_starts(graph)
    firsts = [starts[sum(blocks[:i])] for i in range(len(blocks))]
    stops = [*firsts[1:], len(graph.instances)]
    return tuple(zip(firsts, stops, strict=True))


def balanced(
    weights: Sequence[float], stages: int, factors: Sequence[float] | None = None
) -> tuple[int, ...]:
    """How many consecutive items each stage takes, at least one, so that the heaviest stage is as
    light as can be; among those the most even.

    factors: what a weight counts for on each stage (1 everywhere when left out).
    """
    scale = np.ones(stages) if factors is None else np.asarray(factors, dtype=float)
    sums = np.concatenate([[0.0], np.cumsum(np.asarray(weights, dtype=float))])
    count = len(weights)
    # own[i, j]: the weight of items i to j; what is not a stretch of items is infinite
    own = sums[None, :] - sums[:, None]
    own[np.tril_indices(count + 1)] = np.inf
    bound = _lightest(own, scale) * (1 + 1e-9)
    uneven = (own - sums[-1] / stages) ** 2
    best = np.full(count + 1, np.inf)
    best[0] = 0.0
    taken = []
    for factor in scale:
        cost = best[:, None] + np.where(own * factor <= bound, uneven, np.inf)
        taken.append(np.argmin(cost, axis=0))
        best = cost[taken[-1], np.arange(count + 1)]
    blocks, stop = [], count
    for starts in reversed(taken):
        blocks.append(int(stop - starts[stop]))
        stop = int(starts[stop])
    return tuple(reversed(blocks))


def evenest(stored: float, kept: float, pipeline: int, microbatches: int) -> float:
    """Bytes of the fullest stage, however a model is cut: a stage s holds at least the activations
    of the micro-batches that are under way between it and the last one, and an even cut by bytes
    is the best.

    stored: bytes of all stages that are there once; kept: for each micro-batch in flight.
    """
    flying = (min(microbatches, pipeline - s) for s in range(pipeline))
    return 1 / sum(1 / max(stored + kept * n, 1.0) for n in flying)


def freed_span_s(
    *,
    busy_s: float,
    kept: float,
    stored: float,
    budget: float,
    s_per_byte: Callable[[], float],
    pipeline: int,
    microbatches: int,
) -> float:
    """Seconds of a step that no cut undercuts, where bytes that do not fit are computed again.

    The rest as in `evenest`. busy_s: of one micro-batch on the whole chain; s_per_byte: what a byte
    less costs a micro-batch, asked for where something does not fit. A stage that takes the share s
    of the model, with n micro-batches in flight, keeps at most (budget - s stored) / n bytes of
    each, and computes the rest of s kept again; the step is the shortest in which the stages'
    shares make up the model.
    """
    flying = np.minimum(microbatches, pipeline - np.arange(pipeline)).astype(float)
    whole = budget / (stored + flying * kept + 1.0)
    low = microbatches * busy_s / pipeline
    if budget <= 0 or (whole >= 1 / pipeline).all():
        return low
    most, price = budget / (stored + 1.0), s_per_byte()
    again = busy_s + price * (kept + stored / flying)

    def shares(step_s: float) -> float:
        each = step_s / microbatches
        free = each / busy_s
        freed = np.minimum((each + price * budget / flying) / again, most)
        return float(np.where(free <= whole, free, np.maximum(freed, whole)).sum())

    high = microbatches * (busy_s + price * kept)
    if shares(high) < 1:
        return low
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (low, middle) if shares(middle) >= 1 else (middle, high)
    return low


def _lightest(own: np.ndarray, scale: np.ndarray) -> float:
    """The least heaviest stage when every item is taken."""
    best = np.full(len(own), np.inf)
    best[0] = 0.0
    for factor in scale:
        best = np.min(np.maximum(best[:, None], own * factor), axis=0)
    return float(best[-1])
