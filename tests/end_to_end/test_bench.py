"""The benchmark measures what it says: both trainers learn, on sizes of milliseconds."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

from bench import step
from bench.plain_trainers import MODELS, Shape, plain_trainer
from llmspec.compiler import driver

SMALL = Shape(layers=2, width=32, heads=4, kv_heads=2, ffn=64, vocab=256, context=16)


@pytest.mark.parametrize("name", ["llama", "gpt"])
def test_plain_trainers_learn(name: str) -> None:
    data = np.arange(5000, dtype=np.uint8)
    trainer = plain_trainer(name, SMALL, data=data, batch=8, steps=40, parallel="alone")
    losses = [trainer.step() for _ in range(40)]
    assert abs(losses[0] - np.log(256)) < 0.2
    assert losses[-1] < losses[0] - 0.5


def test_ratios_compare_with_the_steps_on_both_sides() -> None:
    measured = step.Interleaved(plain=None, wait=lambda: None)  # type: ignore[arg-type]
    measured.emitted_s = [9.0] * step.WARM_UP + [3.0, 2.0]
    measured.plain_s = [1.0] * step.WARM_UP + [2.0, 2.0]
    assert measured.ratios() == [2.0, 1.0]


def test_a_case_is_measured_and_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "step.json"
    arguments = ["--tiny", "--steps", "8", "--only", "llama, 2 processes, DDP", "--out", str(out)]
    assert step.main([*arguments, "--bound", "1000"]) == 0
    record = json.loads(out.read_text())
    (result,) = record["results"]
    assert result["steps"] == 8 - step.WARM_UP
    assert 0 < result["quartiles"][0] <= result["ratio"] <= result["quartiles"][1]
    assert "llama, 2 processes, DDP" in capsys.readouterr().out


@pytest.mark.parametrize("model", ["llama", "gpt"])
def test_both_have_the_same_parameters(model: str, tmp_path: Path) -> None:
    """Otherwise their times would say nothing."""
    case = next(case for case in step.CASES if case.model == model)
    spec = tmp_path / "bench.llmspec"
    spec.write_text(step.spec_text(case, 10))
    graph = driver.open_session(str(spec)).graph(1)
    emitted = sum(math.prod(p.shape) for _, p in graph.parameters())
    assert emitted == sum(p.numel() for p in MODELS[model](case.shape).parameters())
