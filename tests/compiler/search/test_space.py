import dataclasses
from itertools import combinations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmspec import dsl
from llmspec.compiler.build.model import build_model
from llmspec.compiler.search import Found, search
from llmspec.compiler.search.families import families_of, spoken_of
from llmspec.compiler.search.meshes import nearest_batches
from llmspec.compiler.search.objective import WORTH_OFFLOADING
from llmspec.compiler.search.space import Space
from llmspec.compiler.search.stages import balanced, block_starts, cut_at
from llmspec.compiler.search.walk import Walk, best
from llmspec.dsl.program import Relation
from tests.compiler.specs import CPU, GiB, cluster, llama, pin, program, tiny_gpt, tiny_llama

MiB = 2**20


def space(spec) -> Space:
    model, tokens = spec.model, spec.train.sequence_length
    return Space.of(spec, lambda b: build_model(model, sequences=b, tokens=tokens))


def everything(of: Space):
    """Every plan with its price; no bound is above it."""
    found = []
    for outline in of.outlines():
        for zero, shards in of.ranges.shardings(outline.grid):
            sharing = of.bounds.sharing(outline, zero, shards)
            for turn in turns(of, sharing):
                how = (turn.interleave, turn.schedule, zero, shards, turn.offload)
                for way in of.ways(outline, *how):
                    if (candidate := of.priced(way)) is not None:
                        check_bounds(of, turn, way, candidate)
                        found.append(candidate)
    return found


def turns(of: Space, sharing):
    for interleave, schedules in of.ranges.ways(sharing.outline.grid.pipeline):
        for schedule in schedules:
            for offload in of.offloads:
                yield of.bounds.turn(sharing, interleave, schedule, offload)


def check_bounds(of: Space, turn, way, candidate):
    sharing = turn.sharing
    missing = of.misses(way, of.floor(way))
    assert of.bounds.way_bytes(way) <= candidate.peak_bytes
    if candidate.times is not None:
        assert of.floor(way).least_s <= candidate.step_s
        assert sharing.least_s <= turn.least_s <= candidate.step_s
        assert sharing.least_bytes <= candidate.peak_bytes
        assert not of.host_lacks(way, of.floor(way))
        assert missing <= 0 and sharing.least_bytes <= of.budget_bytes
    if missing > 0:
        assert candidate.peak_bytes >= of.budget_bytes + missing - 2, "numbers are rounded"


SMALL_MIXTURE = """
import mixtral

model small = mixtral(layers=2, width=256, heads=4, kv_heads=2, ffn=512, vocab=512, context=256,
                      experts=4)
cluster pair { node = 2 * gpu("H100-SXM"); nodes = 2; network = 400 Gb/s per gpu }
train t { model = small; cluster = pair; dataset = synthetic; batch = 8 * 256 tokens; steps = 1 }
plan { tensor <= 2; pipeline <= 2 }
"""
SHARED_SEQUENCES = """
import llama

model small = llama(layers=2, width=256, heads=4, kv_heads=2, ffn=512, vocab=512, context=1024)
cluster pair { node = 4 * gpu("H100-SXM"); nodes = 1 }
train t { model = small; cluster = pair; dataset = synthetic; batch = 4 * 1024 tokens; steps = 1 }
plan { context in [1, 2, 4] }
"""


def written(text):
    return dsl.load("small.llmspec", text=text)


def test_tensor_ranks_share_whole_heads():
    """As a pin must: what splits no attention is not searched either."""
    grids = space(written(SHARED_SEQUENCES)).ranges.grids()
    assert {grid.tensor for grid in grids} == {1, 2}, "of 4 GPUs and 2 key/value heads"


CASES = {
    "llama on four": program(tiny_llama(), cluster(1, 4), batch=8),
    "gpt on two nodes": program(tiny_gpt(), cluster(2, 2), batch=6),
    "processes": program(tiny_llama(), cluster(1, 4, CPU), batch=8, precision="fp32"),
    "little memory": program(
        llama(layers=6, width=512, heads=8, kv_heads=4, ffn=1024, vocab=8192, context=512),
        cluster(1, 4),
        batch=8,
        memory=2 * GiB + 210 * MiB,
    ),
    "mixture": written(SMALL_MIXTURE),
    "context": written(SHARED_SEQUENCES),
}


@pytest.mark.parametrize("name", CASES)
def test_bounds_leave_out_nothing_that_matters(name):
    """Branch and bound against the price of every plan there is."""
    of = space(CASES[name])
    every = everything(of)
    fitting = sorted((c for c in every if c.times is not None), key=of.objective.rank)
    walk = Walk((of,), of.objective)
    walk.run()
    rank, weighed = of.objective.rank, lambda c: of.objective.of(c)[0]
    assert rank(fitting[0]) == rank(best((of,), of.objective))
    listed = [c for c in walk.shortlist.candidates() if not c.offload]
    assert [*map(rank, listed[:8])] == [*map(rank, fitting[: len(listed)][:8])]
    more = of.with_offload()
    offloaded = [c for c in everything(more) if c.times is not None] if more else []
    walk.look_around()
    named = {family for c in fitting for family in families_of(c)} & {*spoken_of(of)}
    assert named <= set(walk.tally.best), "something of them fits"
    for family, found in walk.tally.best.items():
        of_family = [weighed(c) for c in fitting if family in families_of(c)]
        with_them = [weighed(c) for c in offloaded if family in families_of(c)]
        assert weighed(found) >= min(of_family + with_them) * (1 - 1e-3)
        if of_family and family in walk.tally.exact:
            assert weighed(found) <= min(of_family) * (1 + 1e-3)
    assert len(named & walk.tally.exact) > 0.7 * len(named), "few are only bounded"
    assert (len(fitting) < len(every)) == (name == "little memory")
    experts, contexts = ({getattr(c.mesh, axis) for c in every} for axis in ("expert", "context"))
    assert experts == ({1, 2, 4} if name == "mixture" else {1})
    assert contexts == ({1, 2, 4} if name == "context" else {1})


@pytest.mark.parametrize("network", [50e9, 1e9])
@pytest.mark.parametrize("tensor", [1, 2])
def test_no_other_number_of_shards_is_better(tensor, network):
    """A node's data ranks and all of them, against every number that divides them."""
    where = dataclasses.replace(cluster(4, 4), network_bytes_per_s=network)
    model = llama(layers=6, width=512, heads=8, kv_heads=4, ffn=1024, vocab=8192, context=512)
    pins = (pin("tensor", tensor), pin("pipeline", 1), pin("zero", 2, 3, relation=Relation.IN))
    spec = program(model, where, batch=32, memory=2 * GiB + 250 * MiB, plan=pins)
    of, every = space(spec), space(dataclasses.replace(spec, plan=(*pins, EVERY_SHARD)))
    (grid,) = of.ranges.grids()
    near = 4 // tensor
    assert {shards for _, shards in of.ranges.shardings(grid)} == {near, 4 * near}
    assert len({shards for _, shards in every.ranges.shardings(grid)}) > 2
    found, ideal = best((of,), of.objective), best((every,), every.objective)
    assert found.step_s <= ideal.step_s * 1.001
    if network < 50e9:
        assert found.shards == near, "each gather stays inside a node"


def test_what_does_not_fit_is_told_of_the_smallest_there_is():
    model = llama(layers=6, width=512, heads=8, kv_heads=4, ffn=1024, vocab=8192, context=512)
    of = space(program(model, cluster(1, 2), batch=4, memory=1700 * MiB))
    walk = Walk((of,), of.objective)
    walk.run()
    every = everything(of) + everything(of.with_offload())
    assert walk.fit == 0 and walk.smallest is not None
    assert walk.smallest.peak_bytes == min(c.peak_bytes for c in every)
    assert walk.considered < len(every) / 4, "the smallest come first"


OFFLOADING = {
    "nothing else fits": (2 * GiB + 120 * MiB, ()),
    "barely": (2 * GiB + 205 * MiB, ()),
    "pinned": (2 * GiB + 200 * MiB, (pin("offload", "optimizer"),)),
    "no recomputation": (2 * GiB + 230 * MiB, (pin("recompute", "none"),)),
    "both": (2 * GiB + 120 * MiB, (pin("offload", ("activations", "optimizer")),)),
    "roomy": (8 * GiB, ()),
}


@pytest.mark.parametrize("name", OFFLOADING)
def test_offload_is_chosen_where_every_price_says_so(name):
    """The best of all there is, host memory included, and the one that the search takes."""
    memory, pins = OFFLOADING[name]
    model = llama(layers=6, width=512, heads=8, kv_heads=4, ffn=1024, vocab=8192, context=512)
    of = space(program(model, cluster(1, 2), batch=4, memory=memory, plan=pins))
    more = of.with_offload()
    assert (more is None) == bool(of.pins.about("offload"))
    every = everything(of) + (everything(more) if more else [])
    fitting = sorted((c for c in every if c.times is not None), key=of.objective.rank)
    walk = Walk((of,), of.objective)
    walk.run()
    assert of.objective.rank(walk.shortlist.candidates()[0]) == of.objective.rank(fitting[0])
    chosen = fitting[0].offload
    plain = [c.step_s for c in fitting if not c.offload]
    if name == "roomy":
        assert not chosen
    if name == "nothing else fits":
        assert chosen and not plain
    if chosen and plain:
        assert fitting[0].step_s * WORTH_OFFLOADING <= min(plain) * (1 + 1e-3)
    for found in every:
        assert found.host.total <= of.host_bytes
        if found.offload:
            bare = next(
                c
                for c in everything(dataclasses.replace(of, offloads=((),)))
                if c.shape == found.shape
                and (c.zero, c.shards, c.schedule) == (found.zero, found.shards, found.schedule)
            )
            assert found.peak_bytes < bare.peak_bytes, "what costs time saves memory"
            break


EVERY_SHARD = pin("shard", 1, relation=Relation.GE)

weights = st.lists(st.floats(0.1, 10), min_size=2, max_size=8)


@given(weights, st.integers(1, 4), st.booleans())
def test_cuts_equal_enumeration(items, stages, lean):
    stages = min(stages, len(items))
    factors = [float(stages - s) for s in range(stages)] if lean else [1.0] * stages
    blocks = balanced(items, stages, factors)
    assert sum(blocks) == len(items) and min(blocks) >= 1

    def heaviest(cut):
        edges = [0, *cut, len(items)]
        pairs = zip(edges, edges[1:], factors, strict=False)
        return max(f * sum(items[a:b]) for a, b, f in pairs)

    edges = [sum(blocks[: i + 1]) for i in range(stages - 1)]
    best = min(heaviest(cut) for cut in combinations(range(1, len(items)), stages - 1))
    assert heaviest(edges) == pytest.approx(best)


def test_head_and_tail_ride_with_first_and_last_block():
    graph = build_model(tiny_llama(), sequences=1, tokens=32)
    assert block_starts(graph) == [0, 2, 3, 4]
    assert cut_at(graph, (1, 3)) == ((0, 2), (2, 6))


@settings(deadline=None, max_examples=8)
@given(
    st.sampled_from([1, 2, 3, 4, 6, 8]),
    st.sampled_from([4, 6, 12, 24]),
    st.integers(2100, 2400),
    st.sampled_from([None, ("zero", 2), ("tensor", 2), ("pipeline", 2)]),
)
def test_plans_keep_to_budget_and_cluster(ranks, batch, memory_mib, pinned):
    pins = () if pinned is None else (pin(*pinned),)
    spec = program(
        tiny_llama(2), cluster(1, ranks), batch=batch, memory=memory_mib * MiB, plan=pins
    )
    of = space(spec)
    if not of.ranges.grids() or all(batch % g.data for g in of.ranges.grids()):
        return
    if pinned == ("zero", 2) and all(g.data == 1 for g in of.ranges.grids()):
        return
    try:
        found = search(spec, of.chain.build)
    except Exception as error:  # every mesh that divides the batch may be pinned away
        assert "no plan satisfies" in str(error)
        return
    if isinstance(found, Found):
        plan = found.plan
        assert plan.predicted["predicted"]["peak_memory_bytes"] <= memory_mib * MiB
        assert plan.mesh.world_size == ranks
        assert plan.mesh.data * plan.microbatch * plan.microbatches == batch
        if pinned is not None:
            assert plan.predicted["plan"][pinned[0]] == pinned[1]
    else:
        assert found.missing_bytes > 0


@given(st.integers(1, 500), st.lists(st.integers(1, 64), min_size=1, max_size=4))
def test_nearest_batches_work_and_are_nearest(batch, data):
    near = nearest_batches(batch, data)
    assert all(any(n % d == 0 for d in data) for n in near)
    works = [n for n in range(1, batch + 65) if any(n % d == 0 for d in data)]
    above = min(n for n in works if n >= batch)
    assert max(near) == above
