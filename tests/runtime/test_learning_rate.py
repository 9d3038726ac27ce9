import math
from itertools import pairwise

import pytest

from llmspec.runtime.learning_rate import constant, cosine, linear, schedule, warmup


def test_warmup_then_cosine():
    rate = schedule(3e-4, 1000, warmup(100), cosine(to=3e-5))
    assert rate(0) == pytest.approx(3e-6)
    assert rate(99) == rate(100) == pytest.approx(3e-4)
    assert rate(550) == pytest.approx((3e-4 + 3e-5) / 2)
    assert rate(325) == pytest.approx(3e-5 + 2.7e-4 * (1 + math.cos(math.pi / 4)) / 2)
    assert rate(1000) == rate(5000) == 3e-5


def test_warmup_stable_decay():
    rate = schedule(1.0, 100, warmup(10), constant(), linear(to=0.0, steps=20))
    assert [rate(10), rate(79), rate(80), rate(90), rate(100)] == [1.0, 1.0, 1.0, 0.5, 0.0]


def test_never_rises_after_warmup():
    rate = schedule(1.0, 50, warmup(5), cosine(to=0.2, steps=20), linear(to=0.0))
    values = [rate(step) for step in range(60)]
    assert values[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert all(a >= b for a, b in pairwise(values[4:]))
    assert values[25] == pytest.approx(0.2)


def test_no_phase_and_no_steps():
    assert schedule(0.5, 10)(3) == 0.5
    assert schedule(0.5, 10, constant())(30) == 0.5
    assert schedule(0.5, 10, warmup(0), cosine(to=0.0))(0) == 0.5
    assert schedule(0.5, 10, warmup(20), cosine(to=0.0))(9) == pytest.approx(0.25)


def test_two_open_phases_are_refused():
    with pytest.raises(ValueError, match="2 phases"):
        schedule(1.0, 10, constant(), cosine(to=0.0))
