"""The models that are trained, as emitted programs and as others have them, and their specs."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from bench.plain_trainers import Shape


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """batch: sequences of a step, one micro-batch. fit: as many layers as the device has memory
    for, up to the shape's."""

    name: str
    model: str
    shape: Shape
    batch: int
    fit: bool = False

    @staticmethod
    def of(data: dict[str, Any]) -> Case:
        """From what `asdict` made of it."""
        return Case(**data | {"shape": Shape(**data["shape"])})

    @property
    def tokens(self) -> int:
        return self.batch * self.shape.context


LLAMA_8B = Shape(
    layers=32, width=4096, heads=32, kv_heads=8, ffn=14_336, vocab=128_256, context=4096
)
CASES = (
    # nanoGPT's micro-batch, and its vocabulary
    Case(
        name="gpt2_124m",
        model="gpt",
        shape=Shape(
            layers=12, width=768, heads=12, kv_heads=12, ffn=3072, vocab=50_304, context=1024
        ),
        batch=12,
    ),
    Case(
        name="llama_1b",
        model="llama",
        shape=replace(LLAMA_8B, layers=16, width=2048, ffn=8192),
        batch=4,
    ),
    Case(name="llama_8b_layers", model="llama", shape=LLAMA_8B, batch=2, fit=True),
)


def tiny(case: Case) -> Case:
    """The same case in milliseconds: to test the benchmark, not the programs."""
    heads = {"heads": 4, "kv_heads": 4 if case.model == "gpt" else 2}
    small = replace(case.shape, layers=2, width=32, ffn=128, vocab=256, context=16, **heads)
    return replace(case, shape=small, batch=2, fit=False)


def model_text(case: Case) -> str:
    s = case.shape
    sizes = f"layers={s.layers}, width={s.width}, heads={s.heads}, vocab={s.vocab}"
    sizes += f", context={s.context}"
    if case.model == "llama":
        return f"import llama\nmodel m = llama({sizes}, kv_heads={s.kv_heads}, ffn={s.ffn})"
    return f"import gpt2\nmodel m = gpt2({sizes}, dropout=0.0)"


def spec_text(
    case: Case,
    device: str,
    *,
    precision: str,
    pins: str = "",
    steps: int = 100,
    memory_bytes: int | None = None,
) -> str:
    """`device`: as the language has it, `gpu("H200")` or `cpu`. memory_bytes: that a plan may
    use; None: all."""
    pinned = f"microbatch = {case.batch}" + (
        f"; {pins}" if pins else "; recompute = none; offload = none"
    )
    budget = f"budget {{ memory = {memory_bytes >> 20} MiB per gpu }}\n" if memory_bytes else ""
    return f"""{model_text(case)}
cluster here {{ node = 1 * {device} }}
train bench {{
    model = m; cluster = here; dataset = synthetic; batch = {case.batch} sequences
    steps = {steps}; precision = {precision}; seed = 1; log = every(1)
    optimizer = adamw(lr=3e-4, weight_decay=0.1, clip=1.0)
}}
plan {{ {pinned} }}
{budget}"""
