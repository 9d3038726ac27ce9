import pytest

from llmspec.compiler.build.model import build_model
from llmspec.compiler.search import search
from tests.compiler.specs import GiB, cluster, llama, pin, program

MODEL = llama(layers=8, width=2048, heads=16, kv_heads=8, ffn=5632, vocab=32_000, context=2048)


@pytest.fixture(scope="module")
def found():
    spec = program(MODEL, cluster(1), batch=64, memory=4 * GiB)
    return search(spec, lambda b: build_model(MODEL, sequences=b, tokens=2048))


def test_every_value_of_every_key_won_or_is_said_to_have_lost(found):
    won = found.plan.predicted["plan"]
    lost = {lost.family for lost in found.lost}
    for key, values in {
        "tensor": [1, 2, 4, 8],
        "pipeline": [1, 2, 4, 8],
        "zero": [0, 1, 2, 3],
        "recompute": ["none", "selective"],
    }.items():
        for value in values:
            assert ((key, str(value)) in lost) != (won[key] == value)


def test_why_a_family_lost_has_its_numbers(found):
    texts = {" ".join(lost.family): lost for lost in found.lost}
    for lost in found.lost:
        if lost.excess_bytes:
            assert f"too large by {lost.excess_bytes / GiB:.1f} GiB: " in lost.text
            assert lost.slower is None
        else:
            assert lost.slower >= -1e-9
    assert texts["zero 0"].term in texts["zero 0"].text
    assert any(lost.excess_bytes for lost in found.lost)
    assert any(lost.slower for lost in found.lost)


def test_runners_up_are_slower_and_different(found):
    words = [words for words, _, _ in found.runners_up]
    steps = [step for _, step, _ in found.runners_up]
    assert len(set(words)) == len(words) > 1
    assert steps[0] == min(steps)


def test_tensor_ranks_say_what_their_placement_saves():
    spec = program(MODEL, cluster(1), batch=8, plan=(pin("tensor", 8),))
    found = search(spec, lambda b: build_model(MODEL, sequences=b, tokens=2048))
    head, *others = found.placed
    assert "swiglu.down by input" in head and "attention.q" in head
    assert {line.split(":")[0] for line in others} >= {"everything whole"}
