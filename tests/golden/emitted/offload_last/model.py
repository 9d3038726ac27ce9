"""Emitted by llmspec from offload_last.llmspec. Spec 874f5af2295b, plan 2a1fc2.
Change the spec or the plan, then: llmspec compile offload_last.llmspec

Mesh: pipeline 2 = 2 processes. ZeRO 0. In host memory: the optimizer.
Shapes of one micro-batch on one process: B 2 sequences; T 1_024 tokens; V 32_000 vocabulary;
    D 1_024 width; I 1_024 heads x head size; H 16 heads; E 64 head size;
    J 512 key/value heads x head size; K 8 key/value heads; F 2_816 hidden width
"""

from collections.abc import Collection

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from runtime.attention import attention
from runtime.initialise import Constant, Normal
from runtime.loss import cross_entropy_sum
from runtime.mesh import Mesh
from runtime.norms import rms_norm
from runtime.parameters import Group, local, parameter
from runtime.recompute import EVERYTHING, again, recomputed
from runtime.rotary import rotary

COMPUTE = torch.bfloat16  # weights are stored in float32
STAGES = ((0, 3), (3, 7), (7, 11), (11, 12))  # blocks of each pipeline stage: first, stop
# What each block `layer` drops after its forward and computes again in its backward.
RECOMPUTE = (
    # everything: 68.1 MiB less, 0.732 ms more predicted
    *6 * [EVERYTHING],
    # rmsnorm, rmsnorm_2, swiglu (gate, hidden): 30.0 MiB less, 0.129 ms more predicted
    *1 * [{"rmsnorm_normed", "rmsnorm_2_normed", "swiglu_gate_2", "swiglu_hidden"}],
    # everything: 68.1 MiB less, 0.732 ms more predicted
    *1 * [EVERYTHING],
    # rmsnorm, rmsnorm_2, swiglu (gate, hidden): 30.0 MiB less, 0.129 ms more predicted
    *4 * [{"rmsnorm_normed", "rmsnorm_2_normed", "swiglu_gate_2", "swiglu_hidden"}],
)


class First(nn.Module):
    """What comes before the blocks, library/llama.llmspec:13."""

    def __init__(self, embed: Group):
        super().__init__()
        self.embed = embed

    def forward(self, tokens_BT: Tensor) -> Tensor:
        return F.embedding(tokens_BT, local(self.embed.table, COMPUTE))


class LayerAttention(nn.Module):
    """attention of `layer`, library/llama.llmspec:10."""

    def __init__(self, mesh: Mesh):
        super().__init__()
        self.q = parameter((1024, 1024), mesh=mesh, init=Normal(std=0.02))
        self.k = parameter((512, 1024), mesh=mesh, init=Normal(std=0.02))
        self.v = parameter((512, 1024), mesh=mesh, init=Normal(std=0.02))
        self.out = parameter((1024, 1024), mesh=mesh, init=Normal(std=0.004082482904638631))

    def forward(self, normed_BTD: Tensor) -> Tensor:
        q_BTHE = F.linear(normed_BTD, local(self.q, COMPUTE)).unflatten(-1, (-1, 64))
        k_BTKE = F.linear(normed_BTD, local(self.k, COMPUTE)).unflatten(-1, (-1, 64))
        v_BTKE = F.linear(normed_BTD, local(self.v, COMPUTE)).unflatten(-1, (-1, 64))
        q_BTHE = rotary(q_BTHE, 10000.0)
        k_BTKE = rotary(k_BTKE, 10000.0)
        mixed_BTI = attention(q_BTHE, k_BTKE, v_BTKE, causal=True).flatten(-2)
        return F.linear(mixed_BTI, local(self.out, COMPUTE))


class LayerSwiglu(nn.Module):
    """swiglu of `layer`, library/llama.llmspec:11."""

    def __init__(self, mesh: Mesh):
        super().__init__()
        self.gate = parameter((2816, 1024), mesh=mesh, init=Normal(std=0.02))
        self.up = parameter((2816, 1024), mesh=mesh, init=Normal(std=0.02))
        self.down = parameter((1024, 2816), mesh=mesh, init=Normal(std=0.004082482904638631))

    def forward(self, normed_BTD: Tensor) -> Tensor:
        gate_BTF = F.linear(normed_BTD, local(self.gate, COMPUTE))
        up_BTF = F.linear(normed_BTD, local(self.up, COMPUTE))
        gate_BTF = again("swiglu_gate_2", F.silu, gate_BTF)
        hidden_BTF = again("swiglu_hidden", torch.mul, gate_BTF, up_BTF)
        return F.linear(hidden_BTF, local(self.down, COMPUTE))


class Layer(nn.Module):
    """Block `layer`, library/llama.llmspec:13."""

    def __init__(self, mesh: Mesh, recompute: Collection[str]):
        super().__init__()
        self.attention = LayerAttention(mesh)
        self.swiglu = LayerSwiglu(mesh)
        self.rmsnorm = Group(weight=parameter((1024,), mesh=mesh, init=Constant(value=1.0)))
        self.rmsnorm_2 = Group(weight=parameter((1024,), mesh=mesh, init=Constant(value=1.0)))
        self.recompute = recompute

    def forward(self, x_BTD: Tensor) -> Tensor:
        return recomputed(self.run, self.recompute, x_BTD)

    def run(self, x_BTD: Tensor) -> Tensor:
        normed_BTD = again(
            "rmsnorm_normed", rms_norm, x_BTD, local(self.rmsnorm.weight, COMPUTE), eps=1e-05
        )
        attention_BTD = self.attention(normed_BTD)
        x_BTD = x_BTD + attention_BTD
        normed_BTD = again(
            "rmsnorm_2_normed", rms_norm, x_BTD, local(self.rmsnorm_2.weight, COMPUTE), eps=1e-05
        )
        swiglu_BTD = self.swiglu(normed_BTD)
        return x_BTD + swiglu_BTD


class Last(nn.Module):
    """What comes after the blocks, library/llama.llmspec:13."""

    def __init__(self, rmsnorm: Group, unembed: Group):
        super().__init__()
        self.rmsnorm = rmsnorm
        self.unembed = unembed

    def forward(self, x_BTD: Tensor, targets_BT: Tensor) -> Tensor:
        normed_BTD = rms_norm(x_BTD, local(self.rmsnorm.weight, COMPUTE), eps=1e-05)
        logits_BTV = F.linear(normed_BTD, local(self.unembed.table, COMPUTE))
        return cross_entropy_sum(logits_BTV, targets_BT)


class Model(nn.Module):
    """One pipeline stage of `tight`, 12 blocks. Stage 0 takes tokens,
    the others what the stage before sent; the last returns the loss.
    """

    def __init__(self, mesh: Mesh, stage: int):
        super().__init__()
        first, stop = STAGES[stage]
        self.is_first, self.is_last = stage == 0, stage == len(STAGES) - 1
        if self.is_first:
            self.embed = Group(table=parameter((32000, 1024), mesh=mesh, init=Normal(std=0.02)))
            self.first = First(self.embed)
        self.layer = nn.ModuleDict({str(i): Layer(mesh, RECOMPUTE[i]) for i in range(first, stop)})
        if self.is_last:
            self.rmsnorm = Group(weight=parameter((1024,), mesh=mesh, init=Constant(value=1.0)))
            self.unembed = Group(table=parameter((32000, 1024), mesh=mesh, init=Normal(std=0.02)))
            self.last = Last(self.rmsnorm, self.unembed)

    def forward(self, x: Tensor, targets_BT: Tensor, samples_B: Tensor) -> Tensor:
        if self.is_first:
            x = self.first(x)
        for block in self.layer.values():
            x = block(x)
        if self.is_last:
            return self.last(x, targets_BT)
        return x
