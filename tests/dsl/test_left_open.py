"""`precision in [..]`, `optimizer in [..]`: what a train block leaves to the search."""

from __future__ import annotations

import pytest

from llmspec.dsl import SpecError, explicit, program_under
from llmspec.dsl.left_open import each_settled, settled
from tests.dsl.specs import CLUSTER, MODEL, meaning, program

BASE = "model = tiny; cluster = pod; dataset = synthetic; batch = 64 sequences; steps = 100"
BOTH = "optimizer in [adamw, sgd(lr=0.5, momentum=0.9)]; precision in [bf16, fp32(tf32=on)]"


def spec(lines: str) -> str:
    return f"{MODEL}{CLUSTER}train run {{ {BASE}\n{lines}\n}}\n"


def single(lines: str) -> object:
    """Of a spec with one value each."""
    return meaning(program(spec(lines)).train)


def test_every_combination_is_the_run_that_it_would_be_alone() -> None:
    made = program(spec(BOTH))
    ways = {tuple(words.values()): one for words, one in each_settled(made)}
    assert list(ways) == [
        (precision, optimizer)
        for optimizer in ("adamw", "sgd(lr=0.5, momentum=0.9)")
        for precision in ("bf16", "fp32(tf32=on)")
    ]
    for (precision, optimizer), one in ways.items():
        assert one.trains == ()
        alone = single(f"optimizer = {optimizer}; precision = {precision}")
        assert meaning(one.train) == alone, "its learning rate too"
    assert made.train == made.trains[0]


def test_a_list_of_one_leaves_nothing_open() -> None:
    made = program(spec("precision in [bf16]; optimizer in [sgd, adamw]"))
    assert [words for words, _ in each_settled(made)] == [
        {"optimizer": "sgd"},
        {"optimizer": "adamw"},
    ]
    assert program(spec("precision in [bf16]")).trains == ()


def test_only_what_is_offered_can_be_settled() -> None:
    made = program(spec(BOTH))
    words = {"precision": "fp32(tf32=on)", "optimizer": "adamw"}
    chosen = settled(made, words)
    assert chosen is not None and chosen.train.precision.option("tf32") == "on"
    assert settled(made, {"precision": "bf16"}) is None
    assert settled(made, words | {"precision": "fp32"}) is None
    assert settled(chosen, {}) == chosen and settled(chosen, words) is None


def test_the_explicit_text_leaves_open_what_the_spec_does() -> None:
    for lines in (BOTH, BOTH + "; learning_rate = warmup(5) then linear(to=1e-6)"):
        made = program(spec(lines))
        again = program(explicit(made))
        assert meaning(again) == meaning(made)
        assert explicit(again) == explicit(made)


@pytest.mark.parametrize(
    ("lines", "code", "text"),
    [
        ("precision in [bf16, fp8]", "E0601", "`precision = fp8`"),
        ("optimizer in [adamw, adamw8bit(lr=1e-3)]", "E0601", "`optimizer = adamw8bit`"),
        ("seed in [1, 2]", "E0601", "a choice of `seed`"),
        ("precision in []", "E0504", "`in` needs a list"),
        ("precision in bf16", "E0504", "`in` needs a list"),
        ("precision <= bf16", "E0501", "given with `=`"),
        ("precision = [bf16, fp32]", "E0504", "a choice by name"),
        ("optimizer in [adamw, adamw(lr=3e-4)]", "E0217", "in the list twice"),
        ("optimizer in [adamw, sgd]; precision in [bf16, bf16(moments=bf16)]", "E0510", "moments"),
        ("precision in [bf16, bf17]; optimizer in [adamw, sgd, sgd(lr=1)]", "E0504", "bf17"),
    ],
)
def test_what_is_refused_is_said_once(lines: str, code: str, text: str) -> None:
    with pytest.raises(SpecError) as raised:
        program(spec(lines))
    (found,) = raised.value.diagnostics
    assert found.code == code and text in found.message


def test_a_question_may_name_what_the_spec_does_not_list() -> None:
    made = program(spec(BOTH + "\n}\nplan { tensor = 2; zero = 1"))
    asked = program_under("precision = bf16(moments=bf16), zero in [2, 3], optimizer=adamw", made)
    assert asked.trains == () and asked.train.precision.option("moments") == "bf16"
    assert [(line.key, line.values) for line in asked.plan] == [("zero", (2, 3)), ("tensor", (2,))]
    assert len(program_under("precision in [bf16, fp32]", made).trains) == 4
    assert program_under("tensor = 4", made).trains == made.trains
    for text in ("precision <= fp32", "precision = fp8", "precision = bf16(moments=bf16)", "sgd"):
        with pytest.raises(SpecError):
            program_under(f"{text}, optimizer = sgd", made)
