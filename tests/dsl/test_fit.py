from __future__ import annotations

import pytest

from llmspec.dsl import SpecError, fit_spec, load
from llmspec.dsl.fit import library_models


@pytest.mark.parametrize("model", sorted(library_models()))
def test_every_library_model(model):
    made = load(f"{model}.llmspec", text=fit_spec(model, on="2x8xH100"))
    assert made.model.name == model
    assert made.cluster.world_size == 16


def test_numbers_are_taken():
    made = load("x", text=fit_spec("llama3_8b", on="2xcpu", tokens=512, batch=6))
    assert (made.train.sequence_length, made.train.batch_sequences) == (512, 6)
    assert made.train.precision.name == "fp32"


@pytest.mark.parametrize(
    ("model", "on", "code"),
    [("llama3_9b", "8xH100", "E0201"), ("llama3_8b", "8xA100", "E0305"), ("gpt2_xl", "", "E0304")],
)
def test_unknown_names(model, on, code):
    with pytest.raises(SpecError) as error:
        fit_spec(model, on=on)
    (diagnostic,) = error.value.diagnostics
    assert diagnostic.code == code and diagnostic.helps
