"""What the software of each source did, as named switches: operators, types, overlap.

A profile says how a program differs from one that this compiler emits. It holds nothing fitted to
measurements: every switch is a documented property of the software that ran.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from bench.validation.rows import Row


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Profile:
    """family: `gpt` (layer norms with biases, learned positions, GELU, tied head) or `llama`.

    bias: biases of linears and norms. dropout: of attention's output, the MLP's, the embedding's.
    short_gradients: summed and reduced in the compute type, not in float32.
    explicit: attention with its square written out, as before FlashAttention.
    cut: how blocks are divided over stages: `equal`, or `embeddings count` as one block each
        in its later runs; None: not known, left to the search.
    selective: the operators that its selective recomputation runs again.
    constants: of every device (see `compiler/cost/hardware.py`), by_gpu: of one, wide: of runs
        that sum in float32, each with a reason in `why`.
    """

    name: str
    family: str
    bias: bool = False
    dropout: float = 0.0
    explicit: bool = False
    short_gradients: bool = False
    constants: Mapping[str, float] = field(default_factory=dict)
    by_gpu: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    wide: Mapping[str, float] = field(default_factory=dict)
    cut: str | None = None
    selective: str = "selective"
    why: tuple[str, ...] = ()


# Collectives and messages run in the open.
NO_OVERLAP = {"overlap": 0.0}
# Parameters are gathered in the open, gradients reduced behind the backward.
GATHERS_IN_THE_OPEN = {"gather_overlap": 0.0}
# A message between stages is cut over the tensor ranks, which gather it on the other side: Megatron
# since 2021 (Narayanan et al., 4.1); DeepSpeed of then wherever tensor ranks are
# (`is_pipe_partitioned = self.is_model_parallel` in runtime/pipe/engine.py of v0.6).
SCATTERED = {"cut_sends": 1.0}
# One kernel reads scores and writes weights of attention.
SOFTMAX = {"fused_softmax": 1.0}
# One kernel each for a norm, rotary positions, the loss.
FUSED = {"fused_norm": 1.0, "fused_rotary": 1.0, "fused_loss": 1.0}
# Products of weight gradients add to the buffer that is reduced.
IN_PLACE = {"fused_gradients": 1.0}
# Transformer Engine returns one tensor for each shape of weight in place of a gradient that was
# summed where it is reduced (`get_dummy_wgrad`, since 2.3).
SPARE = {"spare_gradients": 1.0}
# One kernel for the activation and the product of a gated MLP.
GATE = {"fused_gate": 1.0}
# Attention whose values are shorter than its keys; weights of experts join their activation, so
# that results of experts are not kept (Megatron 2025).
LATENT = {"fused_heads": 1.0, "fused_combine": 1.0}
# Sequence ranks keep their part of what a product gathers, and gather again (Korthikanti 2022, 4).
REGATHERS = {"regathers": 1.0}
# Weights are stored in the type that they are multiplied in. A micro-batch's gradients, in that
# type, are added to the sum by a kernel of its own; added in the product; divided and sent.
ADDED, IN_PRODUCT, DIVIDED = ({"gradient_bytes": bytes_} for bytes_ in (6.0, 0.0, 4.0))
# FlashAttention of 2022 (InternEvo's docs install 1.0.5): 69 of 155 TFLOP/s of FlashAttention-2 at
# 2048 tokens, heads of 128, causal (its chart for A100).
FLASH_1 = {"a100-80-sxm4": {"attention_efficiency": 0.29}}
# A context of 1573 MiB (the source's own reading), and a gigabyte of the channels of NCCL's groups.
CONTEXT = 1573 * 2**20 + 1e9
# DeepSpeed's defaults of `reduce_bucket_size` and `allgather_bucket_size`.
BUCKETS = {"fixed_bytes": CONTEXT + 2 * 2 * 5e8}
# ZeRO's step makes one flat copy of its part of the gradients in fp16, one in float32: longer than
# what activations have left in pieces, they are new memory.
FLAT_COPIES = {"part_bytes": 6.0}
# What NCCL's rings reach of Jean Zay's Omni-Path, which its messages pass: its own benchmark shows
# 40 of a node's 400 Gb/s (`experiments/bandwidth`) for one ring over all GPUs; for eight rings at
# once this is an estimate, from all runs of this source.
OMNI_PATH = {"ring_share": 0.25}
# DeepSpeed's bf16 runs sum whole float32 gradients, whatever ZeRO's level (`_bf16_reduce_grads`).
WHOLE_SUMS = {"whole_sums": 1.0}
# BF16_Optimizer adds to float32 sums after a backward: its bf16 gradients are whole until then. Its
# sums are reduced as flat copies that are full once they have over 500 million elements
# (`allreduce_no_retain`).
BOTH_GRADIENTS = {
    "part_bytes": 0.0,
    "held_bytes": 2.0,
    "fixed_bytes": CONTEXT,
    "bucket_elements": 5e8,
}
# AdamW written operator by operator: decay 8 bytes a parameter, first moment 20, second 20, root
# and bias 24, update 16; and clipping 16.
EAGER_ADAMW = {"optimizer_bytes": 104.0}
# FlashAttention-2 is 1.3 to 2.5 times as fast as FlashAttention in Triton (Dao 2023, 4.1); the
# middle of it, of FlashAttention-2's rate on each device.
TRITON = {
    "a100-40-sxm4": {"attention_efficiency": 0.39},
    "a100-80-sxm4": {"attention_efficiency": 0.39},
    "h100-80-sxm5": {"attention_efficiency": 0.22},
}

MEGATRON = Profile(
    name="Megatron 2020-2022",
    family="gpt",
    bias=True,
    dropout=0.1,
    explicit=True,
    short_gradients=True,
    constants=NO_OVERLAP | SOFTMAX | SCATTERED | ADDED | IN_PLACE,
    cut="equal",
    selective="[attention_mixed]",
    why=(
        "stages have as many blocks each; selective recomputation runs attention's inside again, "
        "without its projections",
        "attention's square is written out: FlashAttention came in 2022",
        "gradients are summed and reduced in fp16, its default then",
        "a message between stages is cut over the tensor ranks, in the open",
        "one kernel masks and normalises scores; the loss is a chain of operators",
        "dropout 0.1 on hidden states: the papers' own formulas count its masks",
        "gradients are reduced after the last backward, in the open: overlap came in 2023",
    ),
)

MEGATRON_3 = replace(
    MEGATRON,
    name="Megatron 3",
    constants=NO_OVERLAP
    | SOFTMAX
    | SCATTERED
    | IN_PLACE
    | IN_PRODUCT
    | REGATHERS
    | {"fused_norm": 1.0},
    why=(
        *MEGATRON.why,
        "since 2022 a norm is one persistent kernel, and products of weight gradients add to the "
        "sum by themselves",
        "sequence ranks keep their part of what a product gathers, and gather again",
    ),
)

INTERNEVO = Profile(
    name="InternEvo",
    family="llama",
    short_gradients=True,
    constants=FUSED | GATHERS_IN_THE_OPEN | ADDED,
    by_gpu=FLASH_1,
    why=(
        "FlashAttention of 2022 and Apex; attention of packed runs stays in sequences",
        "gradients are bf16 and reduced behind the backward; parameters are sent in the open "
        "(`overlap_sync_param=False` in its configurations)",
    ),
)

PROFILES = {
    "Megatron 2020": MEGATRON,
    "Megatron 2021": MEGATRON,
    "Korthikanti 2022": MEGATRON_3,
    "BigScience": Profile(
        name="Megatron-DeepSpeed, BLOOM",
        family="gpt",
        bias=True,
        explicit=True,
        short_gradients=True,
        constants=NO_OVERLAP
        | SOFTMAX
        | SCATTERED
        | ADDED
        | IN_PLACE
        | BUCKETS
        | FLAT_COPIES
        | OMNI_PATH,
        wide=BOTH_GRADIENTS | WHOLE_SUMS,
        cut="embeddings count",
        why=(
            "stages have as many blocks each, the last what is left; in its bf16 runs embeddings "
            "count as a block",
            "attention's square is written out, as in Megatron of 2021",
            "gradients are summed in fp16, or in float32 by its optimizer for bf16",
            "no dropout, as in the launch scripts of the run",
            "ZeRO 1 of DeepSpeed with a pipeline reduces after the last backward, in the open; for "
            "bf16 whole float32 sums, as without ZeRO",
            "a message between stages is cut over the tensor ranks",
            "rings between nodes reach a quarter of the network: estimated from these runs; alone, "
            "a ring of all GPUs reached a tenth",
            "its two buckets of 500 million elements stay in memory; its step copies its part of "
            "the gradients, and its optimizer for bf16 keeps them in bf16 beside the sums",
        ),
    ),
    "llm-foundry": Profile(
        name="Composer and FSDP",
        family="gpt",
        short_gradients=True,
        constants=EAGER_ADAMW | DIVIDED,
        by_gpu=TRITON,
        why=(
            "FlashAttention in Triton",
            "norms, loss and optimizer are chains of PyTorch's operators",
            "gradients are reduced in bf16, as its tables say",
            "MPT has no biases, neither in linears nor in norms",
            "FSDP gathers ahead and reduces behind: overlap as our own programs",
        ),
    ),
    "InternEvo": INTERNEVO,
    "InternEvo, packed": INTERNEVO,
    "SimuMax B200": Profile(
        name="Megatron 2025, overlap off",
        family="llama",
        constants=NO_OVERLAP | FUSED | GATE | LATENT | IN_PLACE | IN_PRODUCT | SPARE | REGATHERS,
        cut="equal",
        why=(
            "attention and norms of Transformer Engine, one kernel for a gate, a loss whose "
            "gradient overwrites the logits",
            "gradients in float32, summed where they are reduced; a spare one of each shape of "
            "weight",
            "sequence ranks keep their part of what a product gathers, and gather again",
            "weights of experts join their activation: their results are not kept",
            "all overlap is off: the source says so",
        ),
    ),
    "llm.c": Profile(
        name="llm.c",
        family="gpt",
        bias=True,
        short_gradients=True,
        constants=FUSED | IN_PRODUCT,
        why=(
            "attention of cuDNN, one kernel a norm and one for the loss, gradients in bf16",
            "gradients are reduced layer by layer behind the backward",
        ),
    ),
    "Alpa": Profile(
        name="Alpa",
        family="gpt",
        bias=True,
        explicit=True,
        short_gradients=True,
        constants=NO_OVERLAP | SOFTMAX | ADDED,
        why=("attention's square is written out", "XLA of 2022 runs collectives in the open"),
    ),
}


def profile_of(row: Row) -> Profile:
    found = PROFILES[row.family]
    if row.sums_wide and found.wide:
        return replace(found, constants={**found.constants, **found.wide})
    return found
