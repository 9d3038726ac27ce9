"""Training mixtures: biases follow the whole batch's load on every mesh, and outlive a stop."""

from __future__ import annotations

import math
import shutil
from pathlib import Path

import pytest

from tests.end_to_end import programs
from tests.end_to_end.programs import Emitted

MODEL = """model m {
    vocab = 256; context = 16; width = 32
    block layer(x) {
        x = x + attention(rmsnorm(x), heads=4, kv_heads=2, causal)
        x = x + moe(rmsnorm(x), experts=8, top_k=2, expert=swiglu(ffn=32), gate=sigmoid, capacity=1,
                    balance=bias(rate=0.05, aux=0.01), z_loss=0.001)
    }
    tokens -> embed -> layer * 2 -> rmsnorm -> unembed
}
"""
STEPS = 4
PLANS = {
    "one": "tensor = 1",
    "sharded": "data = 2; zero = 3",
    "tensor": "tensor = 2; sequence = on",
    "tensor, every rank all tokens": "tensor = 2; sequence = off",
    "pipeline": "pipeline = 2; microbatch = 2",
    "context": "context = 2",
}


def compiled(folder: Path, plan: str) -> Emitted:
    programs.write_data(folder)
    ranks = 1 if plan == "one" else 2
    text = programs.spec_text(
        MODEL, ranks, PLANS[plan], steps=STEPS, more="checkpoint = every(2, keep=2)"
    )
    return programs.compile_text(text, folder / "m.llmspec", folder / "build" / "run")


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, float]]:
    program = compiled(tmp_path_factory.mktemp("one"), "one")
    programs.run(program)
    return program.log()


def test_what_the_log_says(alone: list[dict[str, float]]) -> None:
    """The fullest expert over the mean one, the share that a capacity of 1 cannot hold, and what
    the losses of both layers add to that of the tokens."""
    assert all(1 < row["expert_load"] <= 8 for row in alone)
    assert all(0 < row["dropped"] < 1 for row in alone)
    # two layers; at first routers have learned nothing: shares of 1/8, logits near 0
    assert alone[0]["balance_loss"] == pytest.approx(2 * 0.01, rel=0.02)
    assert alone[0]["z_loss"] == pytest.approx(2 * 0.001 * math.log(8) ** 2, rel=0.02)
    assert all(row["balance_loss"] > 0 and row["z_loss"] > 0 for row in alone)


@pytest.mark.parametrize("plan", ["sharded", "context"])
def test_the_same_run_on_every_mesh(
    plan: str, alone: list[dict[str, float]], tmp_path: Path
) -> None:
    same_run(plan, alone, tmp_path)


@pytest.mark.long
@pytest.mark.parametrize("plan", ["tensor", "tensor, every rank all tokens", "pipeline"])
def test_the_same_run_on_other_meshes(
    plan: str, alone: list[dict[str, float]], tmp_path: Path
) -> None:
    same_run(plan, alone, tmp_path)


def same_run(plan: str, alone: list[dict[str, float]], folder: Path) -> None:
    program = compiled(folder, plan)
    programs.run(program)
    for row, other in zip(program.log(), alone, strict=True):
        for name, value in other.items():
            assert row[name] == pytest.approx(value, rel=2e-4), name


def test_biases_outlive_a_stop(tmp_path: Path) -> None:
    program = compiled(tmp_path, "sharded")
    programs.run(program)
    whole = program.log()
    shutil.rmtree(program.folder / "checkpoints" / "step_000004")
    programs.run(program)
    assert program.log() == whole
