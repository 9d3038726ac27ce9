import pytest
from torch.distributed.pipelining import schedules as torchs

from llmspec.compiler.schedules import Schedule, actions, parse_action

SIZES = [(stages, m) for stages in (1, 2, 3, 4) for m in (1, 2, 3, 4, 8)]


def _compute_only(words):
    return [w for w in words if parse_action(w).kind in ("F", "B")]


def _torchs_order(schedule, stages, microbatches):
    """What torch's own schedule computes on each rank."""
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


@pytest.mark.parametrize("schedule", list(Schedule))
@pytest.mark.parametrize(("stages", "microbatches"), SIZES)
def test_computes_in_torchs_order(schedule, stages, microbatches):
    if schedule is Schedule.ONE_F_ONE_B and microbatches < stages:
        pytest.skip("torch's 1F1B wants as many micro-batches as stages")
    ours = actions(schedule, stages, stages, microbatches, 0)
    expected = _torchs_order(schedule, stages, microbatches)
    assert {rank: _compute_only(words) for rank, words in ours.items()} == expected


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
        if a.kind == "B" and a.stage < last_stage and a._replace(kind="RECV_B") in at:
            assert at[a._replace(kind="RECV_B")] < i
        if a.kind == "B":
            assert at[a._replace(kind="F")] < i
        if a.kind == "B" and a.stage < last_stage:
            assert at[a._replace(stage=a.stage + 1)] < i
        if a.kind.startswith("SEND"):
            assert at[a._replace(kind=a.kind[-1])] < i


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
@pytest.mark.parametrize("schedule", list(Schedule))
@pytest.mark.parametrize(("stages", "microbatches"), SIZES)
def test_even_blocking_sends_never_deadlock(schedule, stages, microbatches, zero):
    for ranks in {stages, 1, 2} if schedule is Schedule.GPIPE else {stages}:
        if stages % ranks:
            continue
        lists = actions(schedule, stages, ranks, microbatches, zero)
        done = _play_with_rendezvous(lists)
        _check_dependencies(done, stages - 1)
        assert sum(a.kind in ("F", "B") for a in done) == 2 * stages * microbatches
        if ranks == 1:
            assert not any("SEND" in a.kind for a in done), "neighbours on one rank do not send"


def test_torch_accepts_the_sends():
    for schedule in Schedule:
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
    with pytest.raises(ValueError, match="1f1b has one stage on each rank, not 4 on 2"):
        actions(Schedule.ONE_F_ONE_B, 4, 2, 4, 0)
    with pytest.raises(ValueError, match="not a pipeline action: '0X1'"):
        parse_action("0X1")
