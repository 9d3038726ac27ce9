"""Half precision through the whole loop: one rank's overflow is all ranks', a resume the run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.end_to_end import programs
from tests.end_to_end.programs import Emitted

STEPS, OVERFLOW = 6, 2
FP16 = "fp16(grow_every=2)"
PURE = "bf16(master=none, moments=bf16, reduce=bf16, rounding=stochastic)"
MESHES = {
    "data 2, zero 0": "data = 2; zero = 0",
    "data 2, zero 1": "data = 2; zero = 1",
    "data 2, zero 2": "data = 2; zero = 2",
    "data 2, zero 3": "data = 2; zero = 3",
    "tensor 2": "tensor = 2",
    "pipeline 2": "pipeline = 2; microbatch = 2",
    "context 2": "context = 2; zero = 0",
    "expert 2, zero 0": "data = 2; expert = 2; zero = 0",
    "expert 2, zero 3": "data = 2; expert = 2; zero = 3",
}
IN_SHORT = ("data 2, zero 3", "pipeline 2", "expert 2, zero 0")
MIXTURE = """model m {
    vocab = 256; context = 16; width = 32
    block layer(x) {
        x = x + attention(rmsnorm(x), heads=4, kv_heads=2, causal)
        x = x + moe(rmsnorm(x), experts=4, top_k=2, expert=swiglu(ffn=32), balance=aux(0.01))
    }
    tokens -> embed -> layer * 2 -> rmsnorm -> unembed
}
"""
cases = [
    pytest.param(pins, id=name, marks=() if name in IN_SHORT else pytest.mark.long)
    for name, pins in MESHES.items()
]


def compiled(folder: Path, pins: str, precision: str = FP16) -> Emitted:
    programs.write_data(folder)
    model = MIXTURE if "expert" in pins else programs.LLAMA
    text = programs.spec_text(model, 2, pins, steps=STEPS, more="checkpoint = every(2)")
    text = text.replace("2 * cpu", '2 * gpu("H100")').replace("fp32", precision)
    return programs.compile_text(text, folder / "m.llmspec", folder / "build" / "run")


def overflowing(victim: int, of: str = "") -> Callable[[int], list[Any]]:
    """One gradient on one rank is infinite in one step; returns what each rank then did: whether
    it updated, and a sum over its weights after each step. of: a part of the weight's name."""

    def prepare(rank: int) -> list[Any]:
        train = programs.emitted_module("train")
        scale = programs.emitted_module("runtime.loss_scale").LossScale
        clip, accepts, seen = train.Trainer.clip, scale.accepts, []

        def weights(trainer: Any) -> list[float]:
            parts = [getattr(p, "_local_tensor", p) for m in trainer.models for p in m.parameters()]
            return [float(part.double().sum()) for part in parts]

        def infinite_once(self: Any, max_norm: float | None) -> Any:
            seen.append({"before": weights(self)})
            if len(seen) == OVERFLOW and rank == victim:
                named = [pair for m in self.models for pair in m.named_parameters()]
                p = next(p for name, p in named if of in name and p.grad is not None)
                getattr(p.grad, "_local_tensor", p.grad).view(-1)[0] = float("inf")
            return clip(self, max_norm)

        def noted(self: Any, norm: Any) -> bool:
            seen[-1]["updates"] = accepts(self, norm)
            seen[-1]["scale"] = self.used
            return bool(seen[-1]["updates"])

        train.Trainer.clip, scale.accepts = infinite_once, noted
        return seen

    return prepare


@pytest.mark.parametrize("pins", cases)
def test_an_overflow_on_one_rank_skips_the_step_on_all(tmp_path: Path, pins: str) -> None:
    program = compiled(tmp_path, pins)
    # no other rank has the weights of this one's experts
    prepare = overflowing(victim=1, of="experts" if "expert" in pins else "")
    for rank, steps in enumerate(programs.run(program, prepare)):
        assert [s["updates"] for s in steps] == [n != OVERFLOW for n in range(1, STEPS + 1)]
        # halved by the overflow, and back after two good steps
        assert [s["scale"] / 65536 for s in steps] == [1, 1, 0.5, 0.5, 1, 1], rank
        assert steps[OVERFLOW]["before"] == steps[OVERFLOW - 1]["before"], "weights have stayed"
        assert steps[OVERFLOW + 1]["before"] != steps[OVERFLOW]["before"]
    log = program.log()
    assert [row["skipped"] for row in log] == [0, 1, 1, 1, 1, 1]
    assert [row["loss_scale"] / 65536 for row in log] == [1, 1, 0.5, 0.5, 1, 1]
    assert log[OVERFLOW - 1]["gradient_norm"] is None
    assert [row["step"] for row in log] == list(range(1, STEPS + 1))


@pytest.mark.parametrize(
    ("precision", "pins"),
    [
        (FP16, "data = 2; zero = 0"),
        pytest.param(FP16, "pipeline = 2; microbatch = 2", marks=pytest.mark.long),
        (PURE, "data = 2; zero = 2"),
        pytest.param(PURE, "tensor = 2", marks=pytest.mark.long),
    ],
)
def test_a_resume_is_the_run(tmp_path: Path, precision: str, pins: str) -> None:
    """The scale, its counters and the random rounding go on where they were."""
    program = compiled(tmp_path, pins, precision)
    prepare = overflowing(victim=0) if precision == FP16 else None
    programs.run(program, prepare)
    whole = program.log()
    program.forget()

    def asked_to_stop(rank: int) -> None:
        if prepare is not None:
            prepare(rank)
        metrics = programs.emitted_module("runtime.metrics").Metrics
        record = metrics.step

        def stop_at(self: Any, step: int, *rest: Any, **more: Any) -> bool:
            return bool(record(self, step, *rest, **more | {"stop": step == OVERFLOW + 1}))

        metrics.step = stop_at

    programs.run(program, asked_to_stop)
    assert len(program.log()) == OVERFLOW + 1
    programs.run(program)
    assert program.log() == whole
