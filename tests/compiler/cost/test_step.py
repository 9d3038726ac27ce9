import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmspec.compiler.cost.closed import makespan_s
from llmspec.compiler.cost.compute import tile_efficiency
from llmspec.compiler.cost.data import exposed_s
from llmspec.compiler.cost.play import play_s
from llmspec.compiler.schedules import Schedule, actions

EVEN = [(1.0, 2.0)] * 4


@pytest.mark.parametrize("schedule", [Schedule.GPIPE, Schedule.ONE_F_ONE_B])
@pytest.mark.parametrize("microbatches", [1, 2, 4, 9])
def test_equal_stages_take_the_closed_form(schedule, microbatches):
    lists = actions(schedule, 4, 4, microbatches, 0)
    bare = play_s(lists, *zip(*EVEN, strict=True), 0.0)
    assert bare == pytest.approx(makespan_s(EVEN, microbatches, 0.0)[0])
    assert bare == pytest.approx(3 * (microbatches + 3))


@settings(deadline=None, max_examples=40)
@given(
    st.sampled_from([Schedule.GPIPE, Schedule.ONE_F_ONE_B]),
    st.lists(st.tuples(st.floats(0.1, 3), st.floats(0.1, 5)), min_size=2, max_size=5),
    st.integers(1, 6),
    st.floats(0, 1),
)
def test_playing_lies_between_its_bounds(schedule, spent, microbatches, send):
    lists = actions(schedule, len(spent), len(spent), microbatches, 0)
    forward, backward = zip(*spent, strict=True)
    total = play_s(lists, forward, backward, send)
    busiest = max(f + b for f, b in spent)
    assert total >= microbatches * busiest - 1e-9
    assert total >= sum(forward) + sum(backward) + 2 * (len(spent) - 1) * send - 1e-9
    alone = microbatches * (sum(forward) + sum(backward) + 2 * len(spent) * send)
    assert total <= alone + 1e-9
    assert play_s(lists, forward, backward, send + 1) >= total


def test_lists_that_wait_for_themselves_are_refused():
    with pytest.raises(ValueError, match="wait for themselves"):
        play_s({0: ("0B0", "0F0"), 1: ("1F0", "1B0")}, [1, 1], [1, 1], 0.0)


@given(st.floats(0, 10), st.floats(0, 10), st.floats(0, 1))
def test_hiding_never_gains(sent, computing, overlap):
    left = exposed_s(sent, computing, overlap)
    assert (1 - overlap) * sent - 1e-9 <= left <= sent


def test_full_tiles_are_the_best():
    whole = tile_efficiency(132 * 256, 128, 4096, 132)
    assert whole > tile_efficiency(132 * 256 + 1, 128, 4096, 132)
    assert whole > tile_efficiency(100, 100, 4096, 132)
    assert tile_efficiency(7, 7, 7, 1) == 1.0
