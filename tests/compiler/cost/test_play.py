"""The simulator against closed forms, bounds, and the program's own order of events."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmspec.compiler.cost.play import (
    COMPUTE,
    DATA,
    UPDATE,
    Ending,
    Event,
    Played,
    StageWork,
    play,
)
from llmspec.compiler.schedules import COMPUTES, Schedule, actions, rank_of

STAGES_ON_A_RANK = {
    Schedule.GPIPE: (1,),
    Schedule.ONE_F_ONE_B: (1,),
    Schedule.INTERLEAVED: (2, 3),
    Schedule.ZERO_BUBBLE: (1, 2),
    Schedule.ZBV: (2,),
    Schedule.DUALPIPEV: (2,),
}


def even(stages: int, late: float = 0.0) -> list[StageWork]:
    return [StageWork(forward_s=1.0, backward_s=2.0, late_s=late)] * stages


def bubble_s(schedule: Schedule, ranks: int, interleave: int, microbatches: int) -> float:
    """Waiting of a rank, of equal stages: forward 1, backward 2, of a split one half later."""
    stages = ranks * interleave
    lists = actions(schedule, stages, ranks, microbatches, 0)
    end = play(lists, even(stages, 1.0 if schedule.splits else 0.0), 0.0).stop_s
    return end - microbatches * interleave * 3.0


@pytest.mark.parametrize("ranks", [2, 4, 8])
@pytest.mark.parametrize("turns", [1, 2, 5])
def test_equal_stages_have_the_textbook_bubble(ranks: int, turns: int) -> None:
    """GPipe and 1F1B (p - 1)(f + b), interleaved the same for a stage's part (Narayanan et al.
    2021), ZB-H1 (p - 1)(f + b - 2 w) = (p - 1)(f + i - w) (Qi et al. 2023)."""
    count = turns * ranks
    for schedule in (Schedule.GPIPE, Schedule.ONE_F_ONE_B):
        assert bubble_s(schedule, ranks, 1, count) == 3.0 * (ranks - 1)
    for interleave in (2, 3):
        assert bubble_s(Schedule.INTERLEAVED, ranks, interleave, count) == 3.0 * (ranks - 1)
    assert bubble_s(Schedule.ZERO_BUBBLE, ranks, 1, count) == 1.0 * (ranks - 1)


@pytest.mark.parametrize("ranks", [2, 4, 8])
@pytest.mark.parametrize("turns", [2, 5])
def test_v_schedules_have_the_textbook_bubble(ranks: int, turns: int) -> None:
    """With f = i = w, ZBV waits for nothing but the ramp to its last rank, f for each of p - 1
    (Qi et al. 2024); DualPipe in a V (p - 1)(f + b - 2 w) of its halves (DeepSeek 2024)."""
    assert bubble_s(Schedule.ZBV, ranks, 2, turns * ranks) == 1.0 * (ranks - 1)
    assert bubble_s(Schedule.DUALPIPEV, ranks, 2, turns * ranks) == 1.0 * (ranks - 1)


@st.composite
def steps(draw: st.DrawFn):
    schedule = draw(st.sampled_from(list(STAGES_ON_A_RANK)))
    ranks = draw(st.integers(2, 4))
    stages = ranks * draw(st.sampled_from(STAGES_ON_A_RANK[schedule]))
    count, zero = draw(st.integers(1, 9)), draw(st.integers(0, 3))
    seconds = st.floats(0.1, 3)
    works = []
    for _ in range(stages):
        backward = draw(seconds)
        works.append(
            StageWork(
                forward_s=draw(seconds),
                backward_s=backward,
                late_s=backward * draw(st.floats(0, 0.9)) if schedule.splits else 0.0,
                gather_s=draw(seconds) if zero in (1, 2) else 0.0,
                reduce_s=draw(seconds),
            )
        )
    endings = [Ending(tensor_s=draw(seconds), update_s=draw(seconds)) for _ in range(ranks)]
    lists = actions(schedule, stages, ranks, count, zero)
    return schedule, lists, works, endings, count, draw(st.floats(0, 1)), draw(st.floats(0, 1))


@settings(deadline=None, max_examples=80)
@given(steps())
def test_a_step_lies_between_its_bounds(step) -> None:
    """Not shorter than a micro-batch's way through all stages and back, nor than what any rank
    does; not longer than everything one after the other."""
    schedule, lists, works, endings, count, send_s, tied_s = step
    found = play(lists, works, send_s, endings, tied_s)
    ranks, crossings = (
        len(lists),
        sum(
            rank_of(schedule, s, len(lists)) != rank_of(schedule, s + 1, len(lists))
            for s in range(len(works) - 1)
        ),
    )
    update = max(e.update_s for e in endings)
    way = sum(w.forward_s + w.backward_s - w.late_s for w in works) + 2 * crossings * send_s
    assert found.stop_s >= way + update - 1e-9
    own = [0.0] * ranks
    for s, w in enumerate(works):
        own[rank_of(schedule, s, ranks)] += count * (w.forward_s + w.backward_s) + w.gather_s
    assert found.stop_s >= max(o + e.total_s for o, e in zip(own, endings, strict=True)) - 1e-9
    serial = sum(own) + sum(w.reduce_s for w in works) + sum(e.total_s for e in endings)
    serial += 2 * tied_s + 2 * count * crossings * send_s
    assert found.stop_s <= serial + 1e-9
    assert play(lists, works, send_s + 1, endings, tied_s).stop_s >= found.stop_s - 1e-9


@settings(deadline=None, max_examples=60)
@given(steps())
def test_events_are_those_of_the_lists(step) -> None:
    """Each stream does one thing at a time, in the list's order; nothing starts before what it
    needs; the critical path has no holes."""
    _, lists, works, endings, _, send_s, tied_s = step
    found = play(lists, works, send_s, endings, tied_s)
    for rank, words in lists.items():
        own = [e for e in found.events if e.rank == rank]
        for stream in {e.stream for e in own}:
            mine = [e for e in own if e.stream == stream]
            assert all(a.stop_s <= b.start_s for a, b in pairwise(mine))
        played = [name(e) for e in own if e.stream == COMPUTE and e.kind in COMPUTES]
        listed = [w for w in words if any(w == f"{s}{k}{m}" for s, k, m in [split(w)])]
        assert played == [w for w in listed if split(w)[1] in COMPUTES]
    path = found.critical_path()
    assert path[0].start_s == 0.0 and path[-1].stop_s == found.stop_s
    assert all(a.stop_s == b.start_s for a, b in pairwise(path))
    assert sum(e.spent_s for e in path) == pytest.approx(found.stop_s)


def name(event: Event) -> str:
    return f"{event.stage}{event.kind}{event.microbatch}"


def split(word: str) -> tuple[str, str, str]:
    head = word.rstrip("0123456789")
    stage = head.rstrip("FBIWSENDRCVUHAG_")
    return stage, head[len(stage) :], word[len(head) :]


def test_a_reduction_holds_up_no_message() -> None:
    """The last micro-batch's gradient leaves while the data ranks reduce."""
    lists = actions(Schedule.ONE_F_ONE_B, 2, 2, 1, 0)
    works = [StageWork(forward_s=1, backward_s=2, reduce_s=5)] * 2
    found = play(lists, works, 0.5, [Ending(update_s=1)] * 2)
    sums = {e.rank: e for e in found.events if e.stream == DATA}
    assert (sums[1].start_s, sums[0].start_s) == (4.5, 7.0)
    # the norm is known when both have theirs
    assert [e.start_s for e in found.events if e.kind == UPDATE] == [12.0, 12.0]


def test_messages_of_one_link_go_one_after_the_other() -> None:
    lists = {0: ["0F0", "0SEND_F0", "0F1", "0SEND_F1"], 1: ["1F0", "1F1"]}
    found = play(lists, [StageWork(forward_s=1, backward_s=0)] * 2, 10.0)
    assert [e.stop_s for e in found.events if e.kind == "SEND_F"] == [11.0, 21.0]


def test_nothing_to_play_takes_no_time() -> None:
    assert Played(events=()).stop_s == 0.0 and Played(events=()).critical_path() == []
