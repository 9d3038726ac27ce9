"""Emitted by llmspec from llama3_8b_long.llmspec. Spec be1786578ad0, plan c9f331.
Change the spec or the plan, then: llmspec compile llama3_8b_long.llmspec

Mesh: shards 8 x context 4 = 32 processes. ZeRO 3.
Shapes of one micro-batch on one process: B 1 sequences;
    T 32_768 tokens (131_072 over context, early ones and late ones on each rank);
    V 128_256 vocabulary; D 4_096 width; I 4_096 heads x head size; H 32 heads;
    E 128 head size; J 1_024 key/value heads x head size; K 8 key/value heads;
    F 14_336 hidden width
"""

from collections.abc import Collection
from math import sqrt

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from runtime.context_attention import ring_attention
from runtime.initialise import Constant, Normal
from runtime.linear_loss import linear_cross_entropy_sum
from runtime.mesh import Mesh
from runtime.norms import rms_norm
from runtime.parameters import Group, local, parameter
from runtime.recompute import again, recomputed
from runtime.rotary import rotary

# rmsnorm, attention (v), rmsnorm_2, swiglu (gate, up, hidden): 4,160.2 MiB less, 15.7 ms more
# predicted
DROPPED_1 = {
    "rmsnorm_normed",
    "attention_v_1",
    "rmsnorm_2_normed",
    "swiglu_gate_1",
    "swiglu_up_1",
    "swiglu_gate_2",
    "swiglu_hidden",
}
# rmsnorm, rmsnorm_2, swiglu (gate, hidden): 2,304.2 MiB less, 2.56 ms more predicted
DROPPED_2 = {"rmsnorm_normed", "rmsnorm_2_normed", "swiglu_gate_2", "swiglu_hidden"}
# What each block `layer` drops after its forward and computes again in its backward.
RECOMPUTE = (
    *18 * [DROPPED_1],
    *14 * [DROPPED_2],
)


class First(nn.Module):
    """What comes before the blocks, library/llama.llmspec:13."""

    def __init__(self, embed: Group):
        super().__init__()
        self.embed = embed

    def forward(self, tokens_BT: Tensor) -> Tensor:
        return F.embedding(tokens_BT, local(self.embed.table))


class LayerAttention(nn.Module):
    """attention of `layer`, library/llama.llmspec:10."""

    def __init__(self, mesh: Mesh):
        super().__init__()
        self.q = parameter((4096, 4096), mesh=mesh, init=Normal(std=0.02))
        self.k = parameter((1024, 4096), mesh=mesh, init=Normal(std=0.02))
        self.v = parameter((1024, 4096), mesh=mesh, init=Normal(std=0.02))
        self.out = parameter((4096, 4096), mesh=mesh, init=Normal(std=0.02 / sqrt(64)))
        self.context = mesh.context

    def forward(self, normed_BTD: Tensor) -> Tensor:
        q_BTHE = F.linear(normed_BTD, local(self.q)).unflatten(-1, (-1, 128))
        k_BTKE = F.linear(normed_BTD, local(self.k)).unflatten(-1, (-1, 128))
        v_BTKE = again("attention_v_1", F.linear, normed_BTD, local(self.v)).unflatten(
            -1, (-1, 128)
        )
        q_BTHE = rotary(q_BTHE, base=500000.0, context=self.context)
        k_BTKE = rotary(k_BTKE, base=500000.0, context=self.context)
        # pass keys and values over context meanwhile: 3 x 128 MiB, 1.23 ms predicted; backward too
        # backward: pass their gradients over context meanwhile, 4 x 256 MiB, 3.25 ms predicted
        mixed_BTI = ring_attention(q_BTHE, k_BTKE, v_BTKE, self.context, causal=True).flatten(-2)
        return F.linear(mixed_BTI, local(self.out))


class LayerSwiglu(nn.Module):
    """swiglu of `layer`, library/llama.llmspec:11."""

    def __init__(self, mesh: Mesh):
        super().__init__()
        self.gate = parameter((14336, 4096), mesh=mesh, init=Normal(std=0.02))
        self.up = parameter((14336, 4096), mesh=mesh, init=Normal(std=0.02))
        self.down = parameter((4096, 14336), mesh=mesh, init=Normal(std=0.02 / sqrt(64)))

    def forward(self, normed_BTD: Tensor) -> Tensor:
        gate_BTF = again("swiglu_gate_1", F.linear, normed_BTD, local(self.gate))
        up_BTF = again("swiglu_up_1", F.linear, normed_BTD, local(self.up))
        gate_BTF = again("swiglu_gate_2", F.silu, gate_BTF)
        hidden_BTF = again("swiglu_hidden", torch.mul, gate_BTF, up_BTF)
        return F.linear(hidden_BTF, local(self.down))


class Layer(nn.Module):
    """Block `layer`, library/llama.llmspec:13."""

    def __init__(self, mesh: Mesh, recompute: Collection[str]):
        super().__init__()
        self.rmsnorm = Group(weight=parameter((4096,), mesh=mesh, init=Constant(value=1.0)))
        self.attention = LayerAttention(mesh)
        self.rmsnorm_2 = Group(weight=parameter((4096,), mesh=mesh, init=Constant(value=1.0)))
        self.swiglu = LayerSwiglu(mesh)
        self.recompute = recompute

    def forward(self, x_BTD: Tensor) -> Tensor:
        return recomputed(self.run, self.recompute, x_BTD)

    def run(self, x_BTD: Tensor) -> Tensor:
        normed_BTD = again("rmsnorm_normed", rms_norm, x_BTD, local(self.rmsnorm.weight), eps=1e-05)
        attention_BTD = self.attention(normed_BTD)
        x_BTD = x_BTD + attention_BTD
        normed_BTD = again(
            "rmsnorm_2_normed", rms_norm, x_BTD, local(self.rmsnorm_2.weight), eps=1e-05
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
        normed_BTD = rms_norm(x_BTD, local(self.rmsnorm.weight), eps=1e-05)
        # 7.828 GiB of logits, 250.5 MiB at a time;
        # their gradients are made at once: 1.229 GiB wait for the backward
        return linear_cross_entropy_sum(
            normed_BTD, local(self.unembed.table), targets_BT, rows=1024
        )


class Model(nn.Module):
    """`long_8b`, 32 blocks: from tokens to the summed loss of their targets."""

    def __init__(self, mesh: Mesh):
        super().__init__()
        self.embed = Group(table=parameter((128256, 4096), mesh=mesh, init=Normal(std=0.02)))
        self.first = First(self.embed)
        self.layer = nn.ModuleDict({str(i): Layer(mesh, RECOMPUTE[i]) for i in range(32)})
        self.rmsnorm = Group(weight=parameter((4096,), mesh=mesh, init=Constant(value=1.0)))
        self.unembed = Group(table=parameter((128256, 4096), mesh=mesh, init=Normal(std=0.02)))
        self.last = Last(self.rmsnorm, self.unembed)

    def forward(self, tokens_BT: Tensor, targets_BT: Tensor, samples_B: Tensor) -> Tensor:
        x = self.first(tokens_BT)
        for block in self.layer.values():
            x = block(x)
        return self.last(x, targets_BT)

    def units(self) -> list[nn.Module]:
        """What is gathered together, in the order of the forward."""
        return [self.first, *self.layer.values(), self.last]
