"""Emitted by llmspec from quickstart.llmspec. Spec 5ca2650b624e, plan 0c4ddf.
Change the spec or the plan, then: llmspec compile quickstart.llmspec

Mesh: replicas 2 = 2 processes. ZeRO 0.
Shapes of one micro-batch on one process: B 8 sequences; T 256 tokens; V 256 vocabulary;
    D 192 width; I 192 heads x head size; H 6 heads; E 32 head size;
    J 64 key/value heads x head size; K 2 key/value heads; F 512 hidden width
"""

from math import sqrt

import torch.nn.functional as F
from torch import Tensor, nn

from runtime.attention import attention
from runtime.initialise import Constant, Normal
from runtime.linear_loss import linear_cross_entropy_sum
from runtime.mesh import Mesh
from runtime.norms import rms_norm
from runtime.parameters import Group, local, parameter
from runtime.rotary import rotary


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
        self.q = parameter((192, 192), mesh=mesh, init=Normal(std=0.02))
        self.k = parameter((64, 192), mesh=mesh, init=Normal(std=0.02))
        self.v = parameter((64, 192), mesh=mesh, init=Normal(std=0.02))
        self.out = parameter((192, 192), mesh=mesh, init=Normal(std=0.02 / sqrt(8)))

    def forward(self, normed_BTD: Tensor) -> Tensor:
        q_BTHE = F.linear(normed_BTD, local(self.q)).unflatten(-1, (-1, 32))
        k_BTKE = F.linear(normed_BTD, local(self.k)).unflatten(-1, (-1, 32))
        v_BTKE = F.linear(normed_BTD, local(self.v)).unflatten(-1, (-1, 32))
        q_BTHE = rotary(q_BTHE, base=10000.0)
        k_BTKE = rotary(k_BTKE, base=10000.0)
        mixed_BTI = attention(q_BTHE, k_BTKE, v_BTKE, causal=True).flatten(-2)
        return F.linear(mixed_BTI, local(self.out))


class LayerSwiglu(nn.Module):
    """swiglu of `layer`, library/llama.llmspec:11."""

    def __init__(self, mesh: Mesh):
        super().__init__()
        self.gate = parameter((512, 192), mesh=mesh, init=Normal(std=0.02))
        self.up = parameter((512, 192), mesh=mesh, init=Normal(std=0.02))
        self.down = parameter((192, 512), mesh=mesh, init=Normal(std=0.02 / sqrt(8)))

    def forward(self, normed_BTD: Tensor) -> Tensor:
        gate_BTF = F.linear(normed_BTD, local(self.gate))
        up_BTF = F.linear(normed_BTD, local(self.up))
        gate_BTF = F.silu(gate_BTF)
        hidden_BTF = gate_BTF * up_BTF
        return F.linear(hidden_BTF, local(self.down))


class Layer(nn.Module):
    """Block `layer`, library/llama.llmspec:13."""

    def __init__(self, mesh: Mesh):
        super().__init__()
        self.rmsnorm = Group(weight=parameter((192,), mesh=mesh, init=Constant(value=1.0)))
        self.attention = LayerAttention(mesh)
        self.rmsnorm_2 = Group(weight=parameter((192,), mesh=mesh, init=Constant(value=1.0)))
        self.swiglu = LayerSwiglu(mesh)

    def forward(self, x_BTD: Tensor) -> Tensor:
        normed_BTD = rms_norm(x_BTD, local(self.rmsnorm.weight), eps=1e-05)
        attention_BTD = self.attention(normed_BTD)
        x_BTD = x_BTD + attention_BTD
        normed_BTD = rms_norm(x_BTD, local(self.rmsnorm_2.weight), eps=1e-05)
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
        # 2 MiB of logits;
        # their gradients are made at once: 1.688 MiB wait for the backward
        return linear_cross_entropy_sum(
            normed_BTD, local(self.unembed.table), targets_BT, rows=2048
        )


class Model(nn.Module):
    """`tiny`, 4 blocks: from tokens to the summed loss of their targets."""

    def __init__(self, mesh: Mesh):
        super().__init__()
        self.embed = Group(table=parameter((256, 192), mesh=mesh, init=Normal(std=0.02)))
        self.first = First(self.embed)
        self.layer = nn.ModuleDict({str(i): Layer(mesh) for i in range(4)})
        self.rmsnorm = Group(weight=parameter((192,), mesh=mesh, init=Constant(value=1.0)))
        self.unembed = Group(table=parameter((256, 192), mesh=mesh, init=Normal(std=0.02)))
        self.last = Last(self.rmsnorm, self.unembed)

    def forward(self, tokens_BT: Tensor, targets_BT: Tensor, samples_B: Tensor) -> Tensor:
        x = self.first(tokens_BT)
        for block in self.layer.values():
            x = block(x)
        return self.last(x, targets_BT)
