"""What the software of each source did, as named switches: operators, types, overlap.

A profile says how a program differs from one that this compiler emits. It holds nothing fitted to
measurements: every switch is a documented property of the software that ran.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from bench.validation.rows import Row


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Profile:
    """family: `gpt` (layer norms with biases, learned positions, GELU, tied head) or `llama`.

    bias: biases of linears and norms. dropout: of attention's output, the MLP's, the embedding's.
    explicit: attention with its square written out, as before FlashAttention.
    packed: a micro-batch is one sequence of all its tokens.
    constants: of the device (see `compiler/cost/hardware.py`), each with a reason in `why`.
    """

    name: str
    family: str
    bias: bool = False
    dropout: float = 0.0
    explicit: bool = False
    packed: bool = False
    constants: Mapping[str, float] = field(default_factory=dict)
    why: tuple[str, ...] = ()


NO_OVERLAP = {"overlap": 0.0}

MEGATRON = Profile(
    name="Megatron 2020-2022",
    family="gpt",
    bias=True,
    dropout=0.1,
    explicit=True,
    constants=NO_OVERLAP,
    why=(
        "attention's square is written out: FlashAttention came in 2022",
        "dropout 0.1 on hidden states: the papers' own formulas count its masks",
        "gradients are reduced after the last backward, in the open: overlap came in 2023",
    ),
)

PROFILES = {
    "Megatron 2020": MEGATRON,
    "Megatron 2021": MEGATRON,
    "Korthikanti 2022": MEGATRON,
    "BigScience": Profile(
        name="Megatron-DeepSpeed, BLOOM",
        family="gpt",
        bias=True,
        explicit=True,
        constants=NO_OVERLAP,
        why=(
            "attention's square is written out, as in Megatron of 2021",
            "no dropout, as in the launch scripts of the run",
            "ZeRO 1 of DeepSpeed with a pipeline reduces after the last backward, in the open",
        ),
    ),
    "llm-foundry": Profile(
        name="Composer and FSDP",
        family="gpt",
        why=(
            "FlashAttention in Triton",
            "MPT has no biases, neither in linears nor in norms",
            "FSDP gathers ahead and reduces behind: overlap as our own programs",
        ),
    ),
    "InternEvo": Profile(
        name="InternEvo",
        family="llama",
        why=("FlashAttention", "gathers and reductions of its optimizer are overlapped"),
    ),
    "InternEvo, packed": Profile(
        name="InternEvo, packed",
        family="llama",
        packed=True,
        why=("as InternEvo; a micro-batch is one sequence of all its tokens",),
    ),
    "SimuMax B200": Profile(
        name="Megatron 2025, overlap off",
        family="llama",
        constants=NO_OVERLAP,
        why=("attention of Transformer Engine", "all overlap is off: the source says so"),
    ),
    "llm.c": Profile(
        name="llm.c",
        family="gpt",
        bias=True,
        why=("attention of cuDNN", "gradients are reduced layer by layer behind the backward"),
    ),
    "Alpa": Profile(
        name="Alpa",
        family="gpt",
        bias=True,
        explicit=True,
        constants=NO_OVERLAP,
        why=("attention's square is written out", "XLA of 2022 runs collectives in the open"),
    ),
}


def profile_of(row: Row) -> Profile:
    return PROFILES[row.family]
