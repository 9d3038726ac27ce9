"""Emitted by llmspec from llama_kernels.llmspec. Spec fff24e7f24c9, plan 78b9b4.
Change the spec or the plan, then: llmspec compile llama_kernels.llmspec

Mesh: shards 4 x tensor 2 = 8 processes. ZeRO 1.
Shapes of one micro-batch on one process: B 4 sequences; T 4_096 tokens; V 128_256 vocabulary;
    D 4_096 width; I 4_096 heads x head size; H 32 heads; E 128 head size;
    J 1_024 key/value heads x head size; K 8 key/value heads; F 14_336 hidden width;
    d 2_048 (D over tensor); t 2_048 (T over tensor); i 2_048 (I over tensor);
    h 16 (H over tensor); j 512 (J over tensor); k 4 (K over tensor); f 7_168 (F over tensor);
    v 64_128 (V over tensor)
"""

from math import sqrt

import torch.nn.functional as F
from torch import Tensor, nn

import kernels
from runtime.attention import attention
from runtime.collectives import all_gather, all_to_all, reduce_scatter
from runtime.initialise import Constant, Normal
from runtime.linear_loss import vocabulary_parallel_linear_cross_entropy_sum
from runtime.mesh import Mesh
from runtime.parameters import Group, local, parameter
from runtime.rotary import rotary_tables


class First(nn.Module):
    """What comes before the blocks, library/llama.llmspec:13."""

    def __init__(self, mesh: Mesh, embed: Group):
        super().__init__()
        self.embed = embed
        self.tensor = mesh.tensor

    def forward(self, tokens_BT: Tensor) -> Tensor:
        x_BTd = F.embedding(tokens_BT, local(self.embed.table))
        # exchange over tensor: 128 MiB, 0.106 ms predicted; backward: exchange
        return all_to_all(x_BTd, split_dim=1, concat_dim=2, axis=self.tensor)


class LayerAttention(nn.Module):
    """attention of `layer`, library/llama.llmspec:10."""

    def __init__(self, mesh: Mesh):
        super().__init__()
        self.q = parameter((4096, 4096), mesh=mesh, init=Normal(std=0.02), split={"tensor": 0})
        self.k = parameter((1024, 4096), mesh=mesh, init=Normal(std=0.02), split={"tensor": 0})
        self.v = parameter((1024, 4096), mesh=mesh, init=Normal(std=0.02), split={"tensor": 0})
        self.out = parameter(
            (4096, 4096), mesh=mesh, init=Normal(std=0.02 / sqrt(16)), split={"tensor": 1}
        )
        self.tensor = mesh.tensor

    def forward(self, normed_BtD: Tensor) -> Tensor:
        # gather over tensor: 128 MiB, 0.207 ms predicted; backward: sum and scatter
        normed_BTD = all_gather(normed_BtD, dim=1, axis=self.tensor)
        q_BThE = F.linear(normed_BTD, local(self.q)).unflatten(-1, (-1, 128))
        k_BTkE = F.linear(normed_BTD, local(self.k)).unflatten(-1, (-1, 128))
        v_BTkE = F.linear(normed_BTD, local(self.v)).unflatten(-1, (-1, 128))
        q_BThE = kernels.rotary(q_BThE, *rotary_tables(q_BThE, 10000.0))
        k_BTkE = kernels.rotary(k_BTkE, *rotary_tables(k_BTkE, 10000.0))
        mixed_BTi = attention(q_BThE, k_BTkE, v_BTkE, causal=True).flatten(-2)
        out_BTD = F.linear(mixed_BTi, local(self.out))
        # sum and scatter over tensor: 128 MiB, 0.207 ms predicted; backward: gather
        return reduce_scatter(out_BTD, dim=1, axis=self.tensor)


class LayerSwiglu(nn.Module):
    """swiglu of `layer`, library/llama.llmspec:11."""

    def __init__(self, mesh: Mesh):
        super().__init__()
        self.gate = parameter((14336, 4096), mesh=mesh, init=Normal(std=0.02), split={"tensor": 0})
        self.up = parameter((14336, 4096), mesh=mesh, init=Normal(std=0.02), split={"tensor": 0})
        self.down = parameter(
            (4096, 14336), mesh=mesh, init=Normal(std=0.02 / sqrt(16)), split={"tensor": 1}
        )
        self.tensor = mesh.tensor

    def forward(self, normed_BtD: Tensor) -> Tensor:
        # gather over tensor: 128 MiB, 0.207 ms predicted; backward: sum and scatter
        normed_BTD = all_gather(normed_BtD, dim=1, axis=self.tensor)
        gate_BTf = F.linear(normed_BTD, local(self.gate))
        up_BTf = F.linear(normed_BTD, local(self.up))
        hidden_BTf = kernels.silu_gate(gate_BTf, up_BTf)
        down_BTD = F.linear(hidden_BTf, local(self.down))
        # sum and scatter over tensor: 128 MiB, 0.207 ms predicted; backward: gather
        return reduce_scatter(down_BTD, dim=1, axis=self.tensor)


class Layer(nn.Module):
    """Block `layer`, library/llama.llmspec:13."""

    def __init__(self, mesh: Mesh):
        super().__init__()
        self.rmsnorm = Group(
            weight=parameter((4096,), mesh=mesh, init=Constant(value=1.0), partial=True)
        )
        self.attention = LayerAttention(mesh)
        self.rmsnorm_2 = Group(
            weight=parameter((4096,), mesh=mesh, init=Constant(value=1.0), partial=True)
        )
        self.swiglu = LayerSwiglu(mesh)

    def forward(self, x_BtD: Tensor) -> Tensor:
        normed_BtD = kernels.rmsnorm(x_BtD, local(self.rmsnorm.weight))
        attention_BtD = self.attention(normed_BtD)
        x_BtD, normed_BtD = kernels.residual_rmsnorm(
            x_BtD, attention_BtD, local(self.rmsnorm_2.weight)
        )
        swiglu_BtD = self.swiglu(normed_BtD)
        return x_BtD + swiglu_BtD


class Last(nn.Module):
    """What comes after the blocks, library/llama.llmspec:13."""

    def __init__(self, mesh: Mesh, rmsnorm: Group, unembed: Group):
        super().__init__()
        self.rmsnorm = rmsnorm
        self.unembed = unembed
        self.tensor = mesh.tensor

    def forward(self, x_BtD: Tensor, targets_BT: Tensor) -> Tensor:
        normed_BtD = kernels.rmsnorm(x_BtD, local(self.rmsnorm.weight))
        # gather over tensor: 128 MiB, 0.207 ms predicted; backward: sum and scatter
        normed_BTD = all_gather(normed_BtD, dim=1, axis=self.tensor)
        # 1.957 GiB of logits, 250.5 MiB at a time;
        # their gradients are made at once: 629 MiB wait for the backward
        return vocabulary_parallel_linear_cross_entropy_sum(
            normed_BTD,
            local(self.unembed.table),
            targets_BT,
            whole_vocab=128256,
            axis=self.tensor,
            rows=2048,
        )


class Model(nn.Module):
    """`small`, 8 blocks: from tokens to the summed loss of their targets."""

    def __init__(self, mesh: Mesh):
        super().__init__()
        self.embed = Group(
            table=parameter((128256, 4096), mesh=mesh, init=Normal(std=0.02), split={"tensor": 1})
        )
        self.first = First(mesh, self.embed)
        self.layer = nn.ModuleDict({str(i): Layer(mesh) for i in range(8)})
        self.rmsnorm = Group(
            weight=parameter((4096,), mesh=mesh, init=Constant(value=1.0), partial=True)
        )
        self.unembed = Group(
            table=parameter((128256, 4096), mesh=mesh, init=Normal(std=0.02), split={"tensor": 0})
        )
        self.last = Last(mesh, self.rmsnorm, self.unembed)

    def forward(self, tokens_BT: Tensor, targets_BT: Tensor, samples_B: Tensor) -> Tensor:
        x = self.first(tokens_BT)
        for block in self.layer.values():
            x = block(x)
        return self.last(x, targets_BT)

    def units(self) -> list[nn.Module]:
        """What is gathered together, in the order of the forward."""
        return [self.first, *self.layer.values(), self.last]
