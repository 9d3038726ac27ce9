from __future__ import annotations

import pytest

from llmspec.dsl import SpecError
from llmspec.dsl.parameters import count_parameters
from llmspec.dsl.program import Model, Train
from tests.dsl.specs import CLUSTER, MODEL, program

BASE = "model = tiny; cluster = pod; dataset = synthetic"


def train(lines: str = "", cluster: str = CLUSTER) -> Train:
    return program(f"{MODEL}{cluster}train run {{ {BASE}\n{lines}\n}}").train


def test_defaults():
    made = train()
    assert made.sequence_length == 128
    assert made.batch_tokens == 2**19
    assert (made.optimizer.name, made.optimizer.option("clip")) == ("adamw", 1.0)
    assert made.precision.name == "bf16"
    assert made.objective.name == "next_token"
    assert made.validate is None
    assert made.checkpoint is not None and made.checkpoint.option("keep") == 3
    assert (made.log.steps, made.seed, made.name) == (10, 1, "run")


def test_the_default_batch_divides_over_any_world():
    for devices in (1, 3, 7, 8):
        made = train(cluster=f'cluster pod {{ node = {devices} * gpu("T4") }}\n')
        assert made.batch_sequences % devices == 0
        assert made.precision.name == "fp32"


def test_chinchilla():
    made = program(f"{MODEL}{CLUSTER}train {{ {BASE}; batch = 64 sequences }}")
    assert isinstance(made.model, Model)
    wanted = 20 * count_parameters(made.model)
    assert made.train.tokens == wanted
    assert made.train.steps is not None
    assert 0 <= made.train.steps * 64 * 128 - wanted < 64 * 128


def test_tokens_set_the_steps():
    made = train("tokens = 1M; batch = 64 sequences")
    assert (made.steps, made.tokens) == (123, 1_000_000)


def test_batch_in_tokens():
    assert train("batch = 8Ki tokens").batch_sequences == 64
    assert train("batch = 64 sequences; sequence_length = 32").batch_tokens == 2048


def test_ramp():
    """Doubling by default, else by increments; equal shares of tokens, or of steps."""
    made = train("batch = ramp(from=8 sequences, to=64 sequences, over=98_304 tokens); steps = 100")
    assert made.batch_sequences == 64
    assert made.ramp_stages == ((32, 8), (16, 16), (8, 32))  # 32,768 tokens each
    assert made.common_sequences == 8
    assert made.tokens_of(100) == 98_304 + 44 * 64 * 128
    assert made.tokens_of(33) == 32_768 + 16 * 128
    for steps in (1, 32, 33, 50, 56, 57, 100):
        assert made.steps_for(made.tokens_of(steps)) == steps
        assert made.steps_for(made.tokens_of(steps) + 1) == steps + 1

    made = train(
        "batch = ramp(from=10 sequences, to=48 sequences, steps=11, increment=10 sequences)"
    )
    assert made.ramp_stages == ((3, 10), (3, 20), (3, 30), (2, 40))
    assert made.common_sequences == 2


def test_tokens_of_a_run_with_a_ramp():
    made = train("tokens = 1M; batch = ramp(from=8 sequences, to=64 sequences, steps=30)")
    assert made.steps is not None and made.tokens_of(made.steps) >= 1_000_000
    assert made.tokens_of(made.steps - 1) < 1_000_000


@pytest.mark.parametrize(
    ("steps", "warmup"), [(5, None), (10, 1), (1000, 100), (20_000, 2000), (100_000, 2000)]
)
def test_default_learning_rate(steps, warmup):
    phases = train(f"steps = {steps}; optimizer = adamw(lr=3e-4)").learning_rate
    assert phases[-1].name == "cosine" and phases[-1].option("to") == 3e-5
    assert (phases[0].option("steps") if len(phases) > 1 else None) == warmup


def test_phases_in_order():
    phases = train(
        "steps = 100; learning_rate = warmup(5) then constant(20) then linear(to=1e-5, steps=30)"
    ).learning_rate
    assert [(p.name, p.option("steps")) for p in phases] == [
        ("warmup", 5),
        ("constant", 20),
        ("linear", 30),
    ]


def test_events():
    made = train(
        'validate = every(50, dataset=text("*.txt"), batches=3)\n'
        "checkpoint = none; log = every(7); steps = 100"
    )
    assert made.validate is not None and made.validate.steps == 50
    assert made.validate.option("dataset").name == "text"  # type: ignore[union-attr]
    assert made.validate.option("batches") == 3
    assert made.checkpoint is None and made.log.steps == 7


def test_several_train_blocks():
    text = f"{MODEL}{CLUSTER}train a {{ {BASE}; seed = 1 }}\ntrain b {{ {BASE}; seed = 2 }}\n"
    assert program(text, train="b").train.seed == 2
    with pytest.raises(SpecError, match="E0702"):
        program(text)
    with pytest.raises(SpecError, match="E0702"):
        program(text, train="c")


def test_key_spans_point_at_values():
    made = train("batch = 64 sequences")
    span = made.key_spans["batch"]
    assert span.end_column - span.column == len("64 sequences")


def test_datasets():
    made = train()
    assert made.dataset.options == ()
    text = 'text("a/*.py", "b/*.py", exclude=["a/x*.py", "b/x*.py"])'
    spec = f"{MODEL}{CLUSTER}train {{ model = tiny; cluster = pod; dataset = {text} }}"
    call = program(spec).train.dataset
    assert call.arguments == ("a/*.py", "b/*.py")
    assert call.option("exclude") == ("a/x*.py", "b/x*.py")
    assert call.option("tokenizer") == "bytes"
