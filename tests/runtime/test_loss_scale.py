import json

import pytest
import torch

from llmspec.runtime.errors import UserError
from llmspec.runtime.loss_scale import MOST_SKIPPED, LossScale

GOOD, BAD = torch.tensor(1.5, dtype=torch.float64), torch.tensor(float("inf"), dtype=torch.float64)


def test_as_pytorch():
    """The scale before and after each step is that of torch.amp.GradScaler."""
    overflows = [0, 0, 1, 0, 0, 0, 0, 1, 1, 0, 0, 0, 0, 0, 0, 0]
    own = LossScale(1024.0, grow_every=3)
    weight = torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([weight], lr=0.0)
    theirs = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=3)
    for overflow in overflows:
        factor = float("inf") if overflow else 1.0
        theirs.scale((weight * factor).sum()).backward()
        theirs.step(optimizer)
        theirs.update()
        weight.grad = None
        assert own.accepts(BAD if overflow else GOOD) == (not overflow)
        assert own.value == theirs.get_scale()
    assert own.skipped == sum(overflows)


def test_used_is_of_the_step():
    scale = LossScale(8.0, grow_every=1)
    assert scale.accepts(GOOD) and (scale.used, scale.value) == (8.0, 16.0)
    assert not scale.accepts(torch.tensor(float("nan"))) and (scale.used, scale.value) == (16, 8)
    assert scale.report() == {"loss_scale": 16.0, "skipped": 1}


def test_state_goes_through_json():
    one, other = LossScale(64.0, grow_every=4), LossScale(2.0, grow_every=4)
    for norm in (GOOD, BAD, GOOD, GOOD, GOOD):
        one.accepts(norm)
    other.restore({"step": 5, **json.loads(json.dumps(one.state()))})
    for scale in (one, other):
        assert scale.accepts(GOOD) and scale.value == 64.0
        assert scale.state() == {"loss_scale": [64.0, 4, 0, 1]}
    other.restore(None)
    other.restore({"step": 7})  # of a run without one
    assert other.value == 64.0


def test_fixed():
    scale = LossScale(100.0, dynamic=False)
    assert not scale.accepts(BAD) and scale.accepts(GOOD)
    assert scale.value == 100.0 and scale.skipped == 1
    again = LossScale(200.0, dynamic=False)
    again.restore(scale.state())
    assert again.value == 200.0, "the number in the spec is the number"


def test_gives_up():
    scale = LossScale()
    for _ in range(MOST_SKIPPED - 1):
        assert not scale.accepts(BAD)
    with pytest.raises(UserError, match="30 steps in a row overflowed"):
        scale.accepts(BAD)
