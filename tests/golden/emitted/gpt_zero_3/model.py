"""Emitted by llmspec from gpt_zero_3.llmspec. Spec 7c3abfaae653, plan 353889.
Change the spec or the plan, then: llmspec compile gpt_zero_3.llmspec

Mesh: shards 2 = 2 processes. ZeRO 3.
Shapes of one micro-batch on one process: B 4 sequences; T 256 tokens; V 50_257 vocabulary;
    D 384 width; C 256 positions; I 384 heads x head size; H 6 heads; E 64 head size;
    J 384 key/value heads x head size; K 6 key/value heads; F 1_536 hidden width
"""

from math import sqrt

import torch.nn.functional as F
from torch import Tensor, nn

from runtime.attention import attention
from runtime.initialise import Constant, Normal
from runtime.linear_loss import linear_cross_entropy_sum
from runtime.mesh import Mesh
from runtime.norms import layer_norm
from runtime.parameters import Group, local, parameter
from runtime.random import dropout

SEED = 1


class First(nn.Module):
    """What comes before the blocks, library/gpt2.llmspec:11."""

    def __init__(self, embed: Group, first_dropout: int):
        super().__init__()
        self.embed = embed
        self.first_dropout = first_dropout

    def forward(self, tokens_BT: Tensor, samples_B: Tensor) -> Tensor:
        x_BTD = F.embedding(tokens_BT, local(self.embed.table))
        places_TD = local(self.embed.positions)[: tokens_BT.shape[1]]
        x_BTD = x_BTD + places_TD
        return dropout(
            x_BTD,
            0.1,
            samples_B,
            operator=self.first_dropout,
            seed=SEED,
            start=(0, 0),
            shape=(256, 384),
            training=self.training,
        )


class LayerAttention(nn.Module):
    """attention of `layer`, library/gpt2.llmspec:8."""

    def __init__(self, mesh: Mesh):
        super().__init__()
        self.q = parameter((384, 384), mesh=mesh, init=Normal(std=0.02))
        self.q_bias = parameter((384,), mesh=mesh, init=Constant(value=0.0))
        self.k = parameter((384, 384), mesh=mesh, init=Normal(std=0.02))
        self.k_bias = parameter((384,), mesh=mesh, init=Constant(value=0.0))
        self.v = parameter((384, 384), mesh=mesh, init=Normal(std=0.02))
        self.v_bias = parameter((384,), mesh=mesh, init=Constant(value=0.0))
        self.out = parameter((384, 384), mesh=mesh, init=Normal(std=0.02 / sqrt(12)))
        self.out_bias = parameter((384,), mesh=mesh, init=Constant(value=0.0))

    def forward(self, normed_BTD: Tensor) -> Tensor:
        q_BTHE = F.linear(normed_BTD, local(self.q), local(self.q_bias)).unflatten(-1, (-1, 64))
        k_BTKE = F.linear(normed_BTD, local(self.k), local(self.k_bias)).unflatten(-1, (-1, 64))
        v_BTKE = F.linear(normed_BTD, local(self.v), local(self.v_bias)).unflatten(-1, (-1, 64))
        mixed_BTI = attention(q_BTHE, k_BTKE, v_BTKE, causal=True).flatten(-2)
        return F.linear(mixed_BTI, local(self.out), local(self.out_bias))


class LayerMlp(nn.Module):
    """mlp of `layer`, library/gpt2.llmspec:9."""

    def __init__(self, mesh: Mesh):
        super().__init__()
        self.up = parameter((1536, 384), mesh=mesh, init=Normal(std=0.02))
        self.up_bias = parameter((1536,), mesh=mesh, init=Constant(value=0.0))
        self.down = parameter((384, 1536), mesh=mesh, init=Normal(std=0.02 / sqrt(12)))
        self.down_bias = parameter((384,), mesh=mesh, init=Constant(value=0.0))

    def forward(self, normed_BTD: Tensor) -> Tensor:
        up_BTF = F.linear(normed_BTD, local(self.up), local(self.up_bias))
        hidden_BTF = F.gelu(up_BTF, approximate="tanh")
        return F.linear(hidden_BTF, local(self.down), local(self.down_bias))


class Layer(nn.Module):
    """Block `layer`, library/gpt2.llmspec:11."""

    def __init__(self, mesh: Mesh, first_dropout: int):
        super().__init__()
        self.layernorm = Group(
            weight=parameter((384,), mesh=mesh, init=Constant(value=1.0)),
            bias=parameter((384,), mesh=mesh, init=Constant(value=0.0)),
        )
        self.attention = LayerAttention(mesh)
        self.layernorm_2 = Group(
            weight=parameter((384,), mesh=mesh, init=Constant(value=1.0)),
            bias=parameter((384,), mesh=mesh, init=Constant(value=0.0)),
        )
        self.mlp = LayerMlp(mesh)
        self.first_dropout = first_dropout

    def forward(self, x_BTD: Tensor, samples_B: Tensor) -> Tensor:
        normed_BTD = layer_norm(
            x_BTD, local(self.layernorm.weight), local(self.layernorm.bias), eps=1e-05
        )
        attention_BTD = self.attention(normed_BTD)
        dropped_BTD = dropout(
            attention_BTD,
            0.1,
            samples_B,
            operator=self.first_dropout,
            seed=SEED,
            start=(0, 0),
            shape=(256, 384),
            training=self.training,
        )
        x_BTD = x_BTD + dropped_BTD
        normed_BTD = layer_norm(
            x_BTD, local(self.layernorm_2.weight), local(self.layernorm_2.bias), eps=1e-05
        )
        mlp_BTD = self.mlp(normed_BTD)
        dropped_BTD = dropout(
            mlp_BTD,
            0.1,
            samples_B,
            operator=self.first_dropout + 1,
            seed=SEED,
            start=(0, 0),
            shape=(256, 384),
            training=self.training,
        )
        return x_BTD + dropped_BTD


class Last(nn.Module):
    """What comes after the blocks, library/gpt2.llmspec:12."""

    def __init__(self, layernorm: Group, embed: Group):
        super().__init__()
        self.layernorm = layernorm
        self.embed = embed

    def forward(self, x_BTD: Tensor, targets_BT: Tensor) -> Tensor:
        normed_BTD = layer_norm(
            x_BTD, local(self.layernorm.weight), local(self.layernorm.bias), eps=1e-05
        )
        # 196.3 MiB of logits;
        # their gradients are made at once: 75.12 MiB wait for the backward
        return linear_cross_entropy_sum(normed_BTD, local(self.embed.table), targets_BT, rows=1024)


class Model(nn.Module):
    """`small`, 6 blocks: from tokens to the summed loss of their targets."""

    def __init__(self, mesh: Mesh):
        super().__init__()
        self.embed = Group(
            table=parameter((50257, 384), mesh=mesh, init=Normal(std=0.02)),
            positions=parameter((256, 384), mesh=mesh, init=Normal(std=0.02)),
        )
        self.first = First(self.embed, first_dropout=0)
        self.layer = nn.ModuleDict({str(i): Layer(mesh, 1000 * (i + 1)) for i in range(6)})
        self.layernorm = Group(
            weight=parameter((384,), mesh=mesh, init=Constant(value=1.0)),
            bias=parameter((384,), mesh=mesh, init=Constant(value=0.0)),
        )
        self.last = Last(self.layernorm, self.embed)

    def forward(self, tokens_BT: Tensor, targets_BT: Tensor, samples_B: Tensor) -> Tensor:
        x = self.first(tokens_BT, samples_B)
        for block in self.layer.values():
            x = block(x, samples_B)
        return self.last(x, targets_BT)

    def units(self) -> list[nn.Module]:
        """What is gathered together, in the order of the forward."""
        return [*self.layer.values()]
