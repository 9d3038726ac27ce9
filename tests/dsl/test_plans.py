from __future__ import annotations

import pytest

from llmspec.compiler.orders import Schedule
from llmspec.dsl import SpecError, parse_plan_block
from llmspec.dsl.options import STAGES_ON_A_RANK
from llmspec.dsl.program import Relation
from tests.dsl.specs import SPEC, program


def codes(plan: str) -> list[str]:
    with pytest.raises(SpecError) as error:
        program(SPEC + f"plan {{ {plan} }}")
    return [d.code for d in error.value.diagnostics]


def test_lines_become_constraints():
    found = parse_plan_block(
        "plan { tensor <= 8; pipeline = 4; zero in [1, 3]; recompute = auto; schedule = 1f1b\n"
        "stages = [2, 3, 3, 2]; sequence = on; offload = none; kernels = eager }"
    )
    assert [(c.key, c.relation, c.values) for c in found] == [
        ("tensor", Relation.LE, (8,)),
        ("pipeline", Relation.EQ, (4,)),
        ("zero", Relation.IN, (1, 3)),
        ("schedule", Relation.EQ, ("1f1b",)),
        ("stages", Relation.EQ, ((2, 3, 3, 2),)),
        ("sequence", Relation.EQ, ("on",)),
        ("offload", Relation.EQ, ("none",)),
        ("kernels", Relation.EQ, ("eager",)),
    ]


@pytest.mark.parametrize(
    "plan",
    [
        "data = 8; tensor = 1; pipeline = 1",
        "data = 2; tensor = 4",
        "tensor in [3, 4]",
        "context = 1; expert = 1; interleave = 1; context <= 4",
        "pipeline = 4; stages = [1, 1, 1, 1]",
        "data = 4; microbatch = 16",
        "data = 4; shard = 2; zero = 3",
        "tensor >= 2; tensor <= 4",
        "zero <= 2; recompute in [none, full]",
    ],
)
def test_legal(plan):
    assert program(SPEC + f"plan {{ {plan} }}").plan


@pytest.mark.parametrize(
    ("plan", "code"),
    [
        ("tensor = 8", "E0403"),  # 4 key/value heads
        ("tensor in [3, 8]", "E0403"),
        ("tensor >= 8", "E0403"),
        ("data = 3", "E0404"),
        ("data = 8; tensor = 2", "E0404"),
        ("pipeline = 8", "E0405"),
        ("stages = [1, 2, 3]", "E0406"),
        ("pipeline = 2; stages = [4]", "E0406"),
        ("tensor >= 4; tensor <= 2", "E0407"),
        ("zero in [1, 2]; zero = 3", "E0407"),
        ("shard = 3; data = 2", "E0407"),
        ("data = 8; microbatch = 3", "E0408"),
        ("microbatch = 65", "E0408"),
        ("context = 3", "E0404"),
        ("sequence = maybe", "E0402"),
        ("schedule <= gpipe", "E0402"),
        ("zero in []", "E0402"),
        ("zero in 3", "E0402"),
        ("sequense = on", "E0502"),
    ],
)
def test_illegal(plan, code):
    assert codes(plan) == [code]


def test_plans_by_name():
    text = SPEC + "plan a { tensor = 2 }\nplan b { tensor = 4 }\n"
    chosen = text.replace("steps = 10", "steps = 10; plan = b")
    assert program(chosen).plan[0].values == (4,)
    assert program(SPEC + "plan a { tensor = 2 }").plan[0].values == (2,)
    assert program(text + "plan { tensor = 1 }").plan[0].values == (1,)
    with pytest.raises(SpecError, match="E0703"):
        program(text)


@pytest.mark.parametrize(
    "text", ["", "plan", "plan { } plan { }", "train { }", "plan { x = 1 }", "{"]
)
def test_blocks_that_are_none(text):
    with pytest.raises(SpecError):
        parse_plan_block(text)


def test_schedules_take_the_stages_that_the_language_says():
    for word, (fewest, most) in STAGES_ON_A_RANK.items():
        for each in range(1, 6):
            fits = fewest <= each <= (most or each)
            assert Schedule(word).allows(each) == fits
