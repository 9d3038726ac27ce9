"""Emitted by llmspec from offload_last.llmspec. Spec 8a16ceb6971e, plan b4d5d1.
Change the spec or the plan, then: llmspec compile offload_last.llmspec

Mesh: shards 2 = 2 processes. ZeRO 3. In host memory: activations and parameters and the optimizer.
Shapes of one micro-batch on one process: B 16 sequences; T 1_024 tokens; V 32_000 vocabulary;
    D 1_024 width; I 1_024 heads x head size; H 16 heads; E 64 head size;
    J 512 key/value heads x head size; K 8 key/value heads; F 2_816 hidden width
"""

from collections.abc import Collection
from math import sqrt

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from runtime.attention import attention
from runtime.host_activations import HostActivations
from runtime.initialise import Constant, Normal
from runtime.linear_loss import linear_cross_entropy_sum
from runtime.mesh import Mesh
from runtime.norms import rms_norm
from runtime.parameters import Group, local, parameter
from runtime.recompute import again, recomputed
from runtime.rotary import rotary

# rmsnorm, rmsnorm_2, swiglu (gate, up, hidden): 416.1 MiB less, 2.38 ms more predicted
DROPPED_1 = {
    "rmsnorm_normed",
    "rmsnorm_2_normed",
    "swiglu_gate_1",
    "swiglu_up_1",
    "swiglu_gate_2",
    "swiglu_hidden",
}
# rmsnorm, rmsnorm_2, swiglu (gate, hidden): 240.1 MiB less, 0.913 ms more predicted
DROPPED_2 = {"rmsnorm_normed", "rmsnorm_2_normed", "swiglu_gate_2", "swiglu_hidden"}
# What each block `layer` drops after its forward and computes again in its backward.
RECOMPUTE = (
    *11 * [DROPPED_1],
    DROPPED_2,
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
        self.q = parameter((1024, 1024), mesh=mesh, init=Normal(std=0.02))
        self.k = parameter((512, 1024), mesh=mesh, init=Normal(std=0.02))
        self.v = parameter((512, 1024), mesh=mesh, init=Normal(std=0.02))
        self.out = parameter((1024, 1024), mesh=mesh, init=Normal(std=0.02 / sqrt(24)))

    def forward(self, normed_BTD: Tensor) -> Tensor:
        q_BTHE = F.linear(normed_BTD, local(self.q)).unflatten(-1, (-1, 64))
        k_BTKE = F.linear(normed_BTD, local(self.k)).unflatten(-1, (-1, 64))
        v_BTKE = F.linear(normed_BTD, local(self.v)).unflatten(-1, (-1, 64))
        q_BTHE = rotary(q_BTHE, base=10000.0)
        k_BTKE = rotary(k_BTKE, base=10000.0)
        mixed_BTI = attention(q_BTHE, k_BTKE, v_BTKE, causal=True).flatten(-2)
        return F.linear(mixed_BTI, local(self.out))


class LayerSwiglu(nn.Module):
    """swiglu of `layer`, library/llama.llmspec:11."""

    def __init__(self, mesh: Mesh):
        super().__init__()
        self.gate = parameter((2816, 1024), mesh=mesh, init=Normal(std=0.02))
        self.up = parameter((2816, 1024), mesh=mesh, init=Normal(std=0.02))
        self.down = parameter((1024, 2816), mesh=mesh, init=Normal(std=0.02 / sqrt(24)))

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
        self.rmsnorm = Group(weight=parameter((1024,), mesh=mesh, init=Constant(value=1.0)))
        self.attention = LayerAttention(mesh)
        self.rmsnorm_2 = Group(weight=parameter((1024,), mesh=mesh, init=Constant(value=1.0)))
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
        # 1000 MiB of logits, 250 MiB at a time;
        # their gradients are made at once: 94.5 MiB wait for the backward
        return linear_cross_entropy_sum(
            normed_BTD, local(self.unembed.table), targets_BT, rows=4096
        )


class Model(nn.Module):
    """`tight`, 12 blocks: from tokens to the summed loss of their targets."""

    def __init__(self, mesh: Mesh):
        super().__init__()
        self.host = HostActivations(mesh)
        self.embed = Group(table=parameter((32000, 1024), mesh=mesh, init=Normal(std=0.02)))
        self.first = First(self.embed)
        self.layer = nn.ModuleDict({str(i): Layer(mesh, RECOMPUTE[i]) for i in range(12)})
        self.rmsnorm = Group(weight=parameter((1024,), mesh=mesh, init=Constant(value=1.0)))
        self.unembed = Group(table=parameter((32000, 1024), mesh=mesh, init=Normal(std=0.02)))
        self.last = Last(self.rmsnorm, self.unembed)

    def forward(self, tokens_BT: Tensor, targets_BT: Tensor, samples_B: Tensor) -> Tensor:
        x = self.first(tokens_BT)
        for block in self.layer.values():
            # what the backward needs of a block waits in host memory; the device has two blocks'
            # 2.12 GiB a process predicted, 34.9 ms of a step's copies not hidden
            with self.host.keep(block, x):
                x = block(x)
        return self.last(x, targets_BT)

    def units(self) -> list[nn.Module]:
        """What is gathered together, in the order of the forward."""
        return [self.first, *self.layer.values(), self.last]
