"""What nothing undercuts: lines below all mixtures, spans below all plans that compute more."""

from __future__ import annotations

import itertools

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from llmspec.compiler.cost.closed import least_makespan_s, makespan_s
from llmspec.compiler.schedules import Schedule, stages_of
from llmspec.compiler.search.floors import trade_of

point = st.tuples(st.integers(1, 100), st.floats(0, 10))
unit = st.tuples(st.integers(1, 3), st.lists(point, min_size=1, max_size=4))


@given(st.lists(unit, min_size=1, max_size=2))
def test_no_choice_of_blocks_is_below_the_line(units):
    trade = trade_of(units)
    every = [points for count, points in units for _ in range(count)]
    for picked in itertools.product(*every):
        kept, seconds = sum(k for k, _ in picked), sum(s for _, s in picked)
        assert kept >= trade.fewest * (1 - 1e-9)
        assert trade.least_s(np.array([kept]))[0] <= seconds + 1e-9


@given(
    st.sampled_from([(Schedule.ONE_F_ONE_B, 1), (Schedule.INTERLEAVED, 2), (Schedule.GPIPE, 1)]),
    st.integers(2, 4),
    st.integers(1, 12),
    st.data(),
)
def test_no_rank_that_computes_more_makes_a_step_shorter(kind, ranks, microbatches, data):
    schedule, interleave = kind
    stages = ranks * interleave
    times = st.floats(0.1, 10)
    spent = data.draw(st.lists(st.tuples(times, times), min_size=stages, max_size=stages))
    again = data.draw(st.lists(st.floats(0, 10), min_size=ranks, max_size=ranks))
    more = data.draw(st.lists(st.floats(0, 10), min_size=ranks, max_size=ranks))
    least = least_makespan_s(spent, again, microbatches, schedule=schedule, late_s=[0.0] * stages)
    longer = list(spent)
    for rank in range(ranks):
        own = stages_of(schedule, rank, stages, ranks)
        for stage in own:
            forward, backward = spent[stage]
            longer[stage] = forward, backward + (again[rank] + more[rank]) / len(own)
    whole, _ = makespan_s(longer, microbatches, 0.0, schedule=schedule, ranks=ranks)
    assert least <= whole * (1 + 1e-9)
