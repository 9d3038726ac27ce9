import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed.pipelining import schedules as torchs

from llmspec.compiler.orders import Action, order
from llmspec.compiler.schedules import (
    Held,
    Schedule,
    actions,
    add_sends,
    held_at_once,
    parse_action,
    rank_of,
    stages_of,
)

SIZES = [(stages, m) for stages in (1, 2, 3, 4) for m in (1, 2, 3, 4, 8)]
SIMPLE = [Schedule.GPIPE, Schedule.ONE_F_ONE_B]
SEVERAL = [s for s in Schedule if s not in SIMPLE]
COMPUTES = ("F", "B", "I", "W")
UNITS = {"F": 1, "B": 2, "I": 1, "W": 1}


def interleaves(schedule: Schedule) -> list[int]:
    return [v for v in (1, 2, 3) if schedule.allows(v)]


def _compute_only(words):
    return [w for w in words if parse_action(w).kind in COMPUTES]


def _torchs_order(schedule, stages, microbatches):
    """What torch's own schedule computes on each rank, one stage on each."""
    cls = {Schedule.GPIPE: torchs.ScheduleGPipe, Schedule.ONE_F_ONE_B: torchs.Schedule1F1B}
    it = object.__new__(cls[schedule])
    it._num_stages, it._n_microbatches, it.pp_group_size = stages, microbatches, stages
    order = it._get_pipeline_order()
    words = {rank: [str(a) for a in own if a is not None] for rank, own in order.items()}
    if schedule is Schedule.ONE_F_ONE_B:
        # the order it prints for the last rank counts forwards from 1; what it executes does not
        words[stages - 1] = [
            f"{stages - 1}F{int(w.split('F')[1]) - 1}" if "F" in w else w for w in words[stages - 1]
        ]
    return {rank: _compute_only(own) for rank, own in words.items()}


@pytest.mark.parametrize("schedule", SIMPLE)
@pytest.mark.parametrize(("stages", "microbatches"), SIZES)
def test_computes_in_torchs_order(schedule, stages, microbatches):
    if schedule is Schedule.ONE_F_ONE_B and microbatches < stages:
        pytest.skip("torch's 1F1B wants as many micro-batches as stages")
    ours = actions(schedule, stages, stages, microbatches, 0)
    expected = _torchs_order(schedule, stages, microbatches)
    assert {rank: _compute_only(words) for rank, words in ours.items()} == expected


def _torchs_several(schedule, ranks, interleave, microbatches):
    """The same with several stages on a rank, overlapped pairs as two actions; None: refused."""
    cls = {
        Schedule.INTERLEAVED: torchs.ScheduleInterleaved1F1B,
        Schedule.ZERO_BUBBLE: torchs.ScheduleInterleavedZeroBubble,
        Schedule.ZBV: torchs.ScheduleZBVZeroBubble,
        Schedule.DUALPIPEV: torchs.ScheduleDualPipeV,
    }
    it = object.__new__(cls[schedule])
    it.pp_group_size, it.n_local_stages, it._n_microbatches = ranks, interleave, microbatches
    it._num_stages = it.num_stages = ranks * interleave
    it.number_of_rounds = max(1, microbatches // ranks)
    it.microbatches_per_round = microbatches // it.number_of_rounds
    rounds = schedule in (Schedule.INTERLEAVED, Schedule.ZERO_BUBBLE)
    if rounds and microbatches % it.number_of_rounds:
        return None
    if schedule is Schedule.DUALPIPEV and microbatches < 2 * ranks:
        return None
    lists = {rank: it._calculate_single_rank_operations(rank) for rank in range(ranks)}
    kinds = {"FORWARD": "F", "FULL_BACKWARD": "B", "BACKWARD_INPUT": "I", "BACKWARD_WEIGHT": "W"}
    return {
        rank: [
            Action(a.stage_index, kinds[a.computation_type.name], a.microbatch_index)
            for slot in own
            if slot is not None
            for a in (slot.sub_actions or (slot,))
        ]
        for rank, own in lists.items()
    }


def _span(lists):
    """Units of time, F, I and W lasting one and B two, nothing for messages."""
    clock, position = dict.fromkeys(lists, 0), dict.fromkeys(lists, 0)
    owner = {a.stage: rank for rank, own in lists.items() for a in own}
    done: dict = {}
    left = sum(map(len, lists.values()))
    while left:
        before = left
        for rank, own in lists.items():
            while position[rank] < len(own):
                stage, kind, m = own[position[rank]]
                needs = [(stage - 1, "F", m)] if kind == "F" else [(stage + 1, "B", m)]
                needs = [] if kind == "W" else [n for n in needs if n[0] in owner]
                if any(n not in done for n in needs):
                    break
                start = max([clock[rank], *(done[n] for n in needs)])
                clock[rank] = start + UNITS[kind]
                done[stage, "F" if kind == "F" else "B" if kind != "W" else "W", m] = clock[rank]
                position[rank] += 1
                left -= 1
        assert left < before, "the lists wait for themselves"
    return max(clock.values())


def _most_held(own):
    """Micro-batches of stages between their F and the end of their W or B."""
    held = most = 0
    for action in own:
        held += {"F": 1, "B": -1, "I": 0, "W": -1}[action.kind]
        most = max(most, held)
    return most


@pytest.mark.parametrize("ranks", [2, 3, 4, 5])
@pytest.mark.parametrize("schedule", SEVERAL)
def test_torchs_lists_where_it_has_any(schedule, ranks):
    for interleave in interleaves(schedule):
        for microbatches in (1, 2, 3, 4, 6, 8, 10, 13, 16):
            ours = order(schedule, ranks * interleave, ranks, microbatches)
            theirs = _torchs_several(schedule, ranks, interleave, microbatches)
            if theirs is None:
                continue
            if schedule is Schedule.ZBV and microbatches < 2 * ranks:
                assert _span(ours) <= _span(theirs)
                most = max(map(_most_held, theirs.values()))
                assert max(map(_most_held, ours.values())) <= most
            else:
                assert ours == theirs


@pytest.mark.parametrize("ranks", [2, 4, 8])
@pytest.mark.parametrize("interleave", [1, 2, 3])
def test_bubbles_of_the_textbook(ranks, interleave):
    """In units of a stage's forward: what the busiest rank waits for, whatever the number of
    micro-batches from one for each rank on (in a V, two)."""
    for microbatches in (ranks, ranks + 1, 2 * ranks + 1, 4 * ranks, 5 * ranks - 1):
        busy = 3 * interleave * microbatches
        for schedule in Schedule:
            if not schedule.allows(interleave):
                continue
            waits = _span(order(schedule, ranks * interleave, ranks, microbatches)) - busy
            if schedule.splits:
                if not schedule.turns or microbatches >= 2 * ranks:
                    assert waits == ranks - 1, (schedule, microbatches)
            else:
                assert waits == 3 * (ranks - 1), (schedule, microbatches)


def test_zbv_with_few_micro_batches_waits_less_than_its_phases():
    theirs = _torchs_several(Schedule.ZBV, 4, 2, 4)
    assert _span(order(Schedule.ZBV, 8, 4, 4)) == 27 < _span(theirs) == 30


sizes = st.tuples(st.integers(1, 6), st.integers(1, 4), st.integers(1, 24))


@settings(deadline=None, max_examples=150)
@given(st.sampled_from(list(Schedule)), sizes)
def test_each_micro_batch_once_on_each_stage(schedule, size):
    ranks, interleave, microbatches = size
    if not schedule.allows(interleave):
        interleave = 2 if schedule.allows(2) else 1
    stages = ranks * interleave
    lists = order(schedule, stages, ranks, microbatches)
    _span(lists)
    for rank, own in lists.items():
        assert {a.stage for a in own} == set(stages_of(schedule, rank, stages, ranks))
        assert all(rank_of(schedule, a.stage, ranks) == rank for a in own)
        at = {a: i for i, a in enumerate(own)}
        assert len(at) == len(own)
        for stage in {a.stage for a in own}:
            for m in range(microbatches):
                ends = [Action(stage, k, m) for k in ("B", "I", "W") if Action(stage, k, m) in at]
                assert [a.kind for a in ends] in (["B"], ["I", "W"])
                times = [at[Action(stage, "F", m)], *(at[a] for a in ends)]
                assert times == sorted(times)


@settings(deadline=None, max_examples=60)
@given(st.sampled_from(list(Schedule)), sizes)
def test_what_is_held_at_once(schedule, size):
    ranks, interleave, microbatches = size
    if not schedule.allows(interleave):
        interleave = 2 if schedule.allows(2) else 1
    stages = ranks * interleave
    lists = add_sends(order(schedule, stages, ranks, microbatches))
    for rank, known in enumerate(held_at_once(schedule, stages, ranks, microbatches)):
        own_stages = stages_of(schedule, rank, stages, ranks)
        seen = set()
        for stop, action in enumerate(lists[rank]):
            if action.kind in ("B", "I", "W"):
                seen.add(_held_before(action, lists[rank][:stop], own_stages, microbatches))
        numbers = {
            h: (*h.forwards, *h.late, *h.come, *h.early, *(-d for d in h.done), h.messages)
            for h in seen | {*known}
        }
        for held in seen:
            alike = [h for h in known if (h.runs, h.kind) == (held.runs, held.kind)]
            pairs = [zip(numbers[h], numbers[held], strict=True) for h in alike]
            assert any(all(a >= b for a, b in pair) for pair in pairs)
        if schedule is not Schedule.GPIPE:
            assert set(known) <= seen


def _held_before(action, done, own_stages, microbatches):
    """As counted afresh."""
    ends = {s: [a.kind for a in done if a.stage == s and a.kind in "BIW"] for s in own_stages}
    ahead = {s: sum(a.stage == s and a.kind == "F" for a in done) for s in own_stages}
    used = {(a.stage, "B" if a.kind == "I" else a.kind, a.microbatch) for a in done}
    came = {(a.stage, a.kind[-1], a.microbatch) for a in done if a.kind[:4] == "RECV"}
    return Held(
        forwards=tuple(ahead[s] - ends[s].count("B") - ends[s].count("I") for s in own_stages),
        late=tuple(ends[s].count("I") - ends[s].count("W") for s in own_stages),
        messages=len(came - used),
        come=tuple(2 if {"B", "W"} & {*ends[s]} else len({*ends[s]}) for s in own_stages),
        early=tuple(int(ends[s][-1:] == ["I"]) for s in own_stages),
        runs=own_stages.index(action.stage),
        kind=action.kind,
        done=tuple(
            int(ends[s].count("B") + ends[s].count("W") == microbatches) for s in own_stages
        ),
    )


def _play_with_rendezvous(lists):
    """Every send waits for its receive, as NCCL may; returns what was done, in order."""
    lists = {rank: [parse_action(w) for w in words] for rank, words in lists.items()}
    owner = {a.stage: rank for rank, own in lists.items() for a in own}
    done = []
    while any(lists.values()):
        before = len(done)
        for own in lists.values():
            while own and not own[0].kind.startswith(("SEND", "RECV")):
                done.append(own.pop(0))
        for own in lists.values():
            if own and own[0].kind.startswith("SEND"):
                send = own[0]
                to = send.stage + (1 if send.kind == "SEND_F" else -1)
                there = lists[owner[to]]
                received = (to, send.kind.replace("SEND", "RECV"), send.microbatch)
                if there and tuple(there[0]) == received:
                    done += [own.pop(0), there.pop(0)]
        assert len(done) > before, f"stuck before {[own[:1] for own in lists.values()]}"
    return done


def _check_dependencies(done, last_stage):
    done = [a for a in done if a.microbatch is not None]
    at = {a: i for i, a in enumerate(done)}
    assert len(at) == len(done), "nothing twice"
    for a, i in at.items():
        if a.kind == "F" and a.stage and a._replace(kind="RECV_F") in at:
            assert at[a._replace(kind="RECV_F")] < i
        if a.kind in ("B", "I"):
            assert at[a._replace(kind="F")] < i
            if a._replace(kind="RECV_B") in at:
                assert at[a._replace(kind="RECV_B")] < i
            if a.stage < last_stage:
                above = [a._replace(stage=a.stage + 1, kind=k) for k in ("B", "I")]
                assert any(at.get(b, i) < i for b in above)
        if a.kind.startswith("SEND"):
            kinds = ("F",) if a.kind[-1] == "F" else ("B", "I")
            assert any(at.get(a._replace(kind=k), i) < i for k in kinds)
        if a.kind == "W":
            assert at[a._replace(kind="I")] < i


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
@pytest.mark.parametrize("schedule", list(Schedule))
@pytest.mark.parametrize(("ranks", "microbatches"), SIZES)
def test_even_blocking_sends_never_deadlock(schedule, ranks, microbatches, zero):
    for interleave in {*interleaves(schedule), *([2] if schedule is Schedule.GPIPE else [])}:
        stages = ranks * interleave
        lists = actions(schedule, stages, ranks, microbatches, zero)
        done = _play_with_rendezvous(lists)
        _check_dependencies(done, stages - 1)
        assert sum(a.kind in ("F", "B", "I") for a in done) == 2 * stages * microbatches
        if ranks == 1:
            assert not any("SEND" in a.kind for a in done), "neighbours on one rank do not send"


def test_the_turn_of_a_v_sends_nothing():
    for schedule in (Schedule.ZBV, Schedule.DUALPIPEV):
        words = " ".join(actions(schedule, 8, 4, 8, 0)[3])
        assert "3SEND_F" not in words and "4RECV_F" not in words and "4SEND_B" not in words


@pytest.mark.parametrize("schedule", Schedule)
def test_gradients_are_reduced_after_their_last_part(schedule):
    stages = 4 * (2 if not schedule.allows(1) else 1)
    for zero in range(4):
        for words in actions(schedule, stages, 4, 8, zero).values():
            own = [parse_action(w) for w in words]
            ends = [i for i, a in enumerate(own) if a.kind in ("B", "W")]
            for stage in {a.stage for a in own}:
                last = max(i for i in ends if own[i].stage == stage)
                reduced = [i for i, a in enumerate(own) if a == Action(stage, "REDUCE_GRAD")]
                assert reduced[-1] == last + 1
                assert len(reduced) == (8 if zero >= 2 else 1)


def test_torch_accepts_the_sends():
    for schedule in SIMPLE:
        lists = actions(schedule, 4, 4, 6, 0)
        parsed = {
            rank: [torchs._Action.from_str(w) for w in own if "REDUCE" not in w]
            for rank, own in lists.items()
        }
        torchs._simulate_comms_compute(parsed, lambda stage: stage, 4)


def test_1f1b_keeps_few_forwards_in_flight():
    for rank, words in actions(Schedule.ONE_F_ONE_B, 4, 4, 16, 0).items():
        in_flight, most = 0, 0
        for word in _compute_only(words):
            in_flight += 1 if parse_action(word).kind == "F" else -1
            most = max(most, in_flight)
        assert most == 4 - rank


@pytest.mark.parametrize(
    ("zero", "expected"),
    [
        (0, "0F0 0F1 0B0 0B1 0REDUCE_GRAD"),
        (1, "0UNSHARD 0F0 0F1 0B0 0B1 0REDUCE_GRAD 0RESHARD"),
        (2, "0UNSHARD 0F0 0F1 0B0 0REDUCE_GRAD 0B1 0REDUCE_GRAD 0RESHARD"),
        (3, "0F0 0F1 0B0 0REDUCE_GRAD 0B1 0REDUCE_GRAD"),
    ],
)
def test_zero_says_when_to_gather_and_reduce(zero, expected):
    assert " ".join(actions(Schedule.GPIPE, 1, 1, 2, zero)[0]) == expected


def test_the_whole_list_of_the_smallest_split_pipeline():
    lists = actions(Schedule.ZERO_BUBBLE, 2, 2, 2, 2)
    assert " ".join(lists[0]) == (
        "0UNSHARD 0F0 0SEND_F0 0F1 0SEND_F1 0RECV_B0 0I0 0W0 0REDUCE_GRAD 0RECV_B1 0I1 0W1 "
        "0REDUCE_GRAD 0RESHARD"
    )
    assert " ".join(lists[1]) == (
        "1RECV_F0 1UNSHARD 1F0 1RECV_F1 1I0 1SEND_B0 1F1 1I1 1SEND_B1 1W0 1REDUCE_GRAD 1W1 "
        "1REDUCE_GRAD 1RESHARD"
    )


def test_the_whole_list_of_the_smallest_pipeline():
    lists = actions(Schedule.ONE_F_ONE_B, 2, 2, 2, 0)
    assert " ".join(lists[0]) == (
        "0F0 0SEND_F0 0F1 0SEND_F1 0RECV_B0 0B0 0RECV_B1 0B1 0REDUCE_GRAD"
    )
    assert " ".join(lists[1]) == (
        "1RECV_F0 1F0 1RECV_F1 1B0 1SEND_B0 1F1 1B1 1REDUCE_GRAD 1SEND_B1"
    )


def test_misfits_are_refused():
    with pytest.raises(ValueError, match="3 stages do not divide over 2 pipeline ranks"):
        actions(Schedule.GPIPE, 3, 2, 4, 0)
    with pytest.raises(ValueError, match="zbv does not take 6 stages on 2 ranks"):
        actions(Schedule.ZBV, 6, 2, 4, 0)
    with pytest.raises(ValueError, match="1f1b does not take 4 stages on 2 ranks"):
        actions(Schedule.ONE_F_ONE_B, 4, 2, 4, 0)
    with pytest.raises(ValueError, match="not a pipeline action: '0X1'"):
        parse_action("0X1")
