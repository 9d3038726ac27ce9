"""Emitted by llmspec from llama_tensor_sequence_pipeline.llmspec. Spec 7b55b9315bd5, plan 1545f5.
Change the spec or the plan, then: llmspec compile llama_tensor_sequence_pipeline.llmspec

Mesh: pipeline 2 x tensor 4 = 8 processes. ZeRO 0.
Shapes of one micro-batch on one process: B 2 sequences; T 4_096 tokens; V 128_256 vocabulary;
    D 4_096 width; I 4_096 heads x head size; H 32 heads; E 128 head size;
    J 1_024 key/value heads x head size; K 8 key/value heads; F 14_336 hidden width;
    d 1_024 (D over tensor); t 1_024 (T over tensor); i 1_024 (I over tensor);
    h 8 (H over tensor); j 256 (J over tensor); k 2 (K over tensor); f 3_584 (F over tensor);
    v 32_064 (V over tensor)
"""

from math import sqrt

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from runtime.attention import attention
from runtime.collectives import all_gather, all_to_all, reduce_scatter
from runtime.initialise import Constant, Normal
from runtime.linear_loss import vocabulary_parallel_linear_cross_entropy_sum
from runtime.mesh import Mesh
from runtime.norms import rms_norm
from runtime.parameters import Group, local, parameter
from runtime.rotary import rotary

COMPUTE = torch.bfloat16  # weights are stored in float32
# blocks of each pipeline stage: first, stop
STAGES = ((0, 5), (5, 8))


class First(nn.Module):
    """What comes before the blocks, library/llama.llmspec:13."""

    def __init__(self, mesh: Mesh, embed: Group):
        super().__init__()
        self.embed = embed
        self.tensor = mesh.tensor

    def forward(self, tokens_BT: Tensor) -> Tensor:
        x_BTd = F.embedding(tokens_BT, local(self.embed.table, COMPUTE))
        # exchange over tensor: 64 MiB, 0.0543 ms predicted; backward: exchange
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
        # gather over tensor: 64 MiB, 0.168 ms predicted; backward: sum and scatter
        normed_BTD = all_gather(normed_BtD, dim=1, axis=self.tensor)
        q_BThE = F.linear(normed_BTD, local(self.q, COMPUTE)).unflatten(-1, (-1, 128))
        k_BTkE = F.linear(normed_BTD, local(self.k, COMPUTE)).unflatten(-1, (-1, 128))
        v_BTkE = F.linear(normed_BTD, local(self.v, COMPUTE)).unflatten(-1, (-1, 128))
        q_BThE = rotary(q_BThE, base=10000.0)
        k_BTkE = rotary(k_BTkE, base=10000.0)
        mixed_BTi = attention(q_BThE, k_BTkE, v_BTkE, causal=True).flatten(-2)
        out_BTD = F.linear(mixed_BTi, local(self.out, COMPUTE))
        # sum and scatter over tensor: 64 MiB, 0.168 ms predicted; backward: gather
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
        # gather over tensor: 64 MiB, 0.168 ms predicted; backward: sum and scatter
        normed_BTD = all_gather(normed_BtD, dim=1, axis=self.tensor)
        gate_BTf = F.linear(normed_BTD, local(self.gate, COMPUTE))
        up_BTf = F.linear(normed_BTD, local(self.up, COMPUTE))
        gate_BTf = F.silu(gate_BTf)
        hidden_BTf = gate_BTf * up_BTf
        down_BTD = F.linear(hidden_BTf, local(self.down, COMPUTE))
        # sum and scatter over tensor: 64 MiB, 0.168 ms predicted; backward: gather
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
        normed_BtD = rms_norm(x_BtD, local(self.rmsnorm.weight, COMPUTE), eps=1e-05)
        attention_BtD = self.attention(normed_BtD)
        x_BtD = x_BtD + attention_BtD
        normed_BtD = rms_norm(x_BtD, local(self.rmsnorm_2.weight, COMPUTE), eps=1e-05)
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
        normed_BtD = rms_norm(x_BtD, local(self.rmsnorm.weight, COMPUTE), eps=1e-05)
        # gather over tensor: 64 MiB, 0.168 ms predicted; backward: sum and scatter
        normed_BTD = all_gather(normed_BtD, dim=1, axis=self.tensor)
        # 501 MiB of logits, 250.5 MiB at a time;
        # their gradients are made at once: 314.5 MiB wait for the backward
        return vocabulary_parallel_linear_cross_entropy_sum(
            normed_BTD,
            local(self.unembed.table, COMPUTE),
            targets_BT,
            whole_vocab=128256,
            axis=self.tensor,
            rows=4096,
        )


class Model(nn.Module):
    """One pipeline stage of `small`, 8 blocks. Stage 0 takes tokens,
    the others what the stage before sent; the last returns the loss.
    """

    def __init__(self, mesh: Mesh, stage: int):
        super().__init__()
        first, stop = STAGES[stage]
        self.is_first, self.is_last = stage == 0, stage == len(STAGES) - 1
        if self.is_first:
            self.embed = Group(
                table=parameter(
                    (128256, 4096), mesh=mesh, init=Normal(std=0.02), split={"tensor": 1}
                )
            )
            self.first = First(mesh, self.embed)
        self.layer = nn.ModuleDict({str(i): Layer(mesh) for i in range(first, stop)})
        if self.is_last:
            self.rmsnorm = Group(
                weight=parameter((4096,), mesh=mesh, init=Constant(value=1.0), partial=True)
            )
            self.unembed = Group(
                table=parameter(
                    (128256, 4096), mesh=mesh, init=Normal(std=0.02), split={"tensor": 0}
                )
            )
            self.last = Last(mesh, self.rmsnorm, self.unembed)

    def forward(self, x: Tensor, targets_BT: Tensor, samples_B: Tensor) -> Tensor:
        if self.is_first:
            x = self.first(x)
        for block in self.layer.values():
            x = block(x)
        if self.is_last:
            return self.last(x, targets_BT)
        return x
