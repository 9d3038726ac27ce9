"""Emitted by llmspec from mixture_experts.llmspec. Spec 4b44ea6241b6, plan 5508b9.
Change the spec or the plan, then: llmspec compile mixture_experts.llmspec

Mesh: shards 8 = 8 processes, experts over 4 data ranks. ZeRO 3.
Shapes of one micro-batch on one process: B 8 sequences; T 1_024 tokens; V 32_000 vocabulary;
    D 1_024 width; I 1_024 heads x head size; H 16 heads; E 64 head size;
    J 256 key/value heads x head size; K 4 key/value heads; X 16 experts;
    P 2 experts of a token; R 16_384 rows: each expert's tokens; F 2_048 hidden width;
    x 4 (X over expert)
"""

from math import sqrt

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from runtime.attention import attention
from runtime.exchange import exchange_counts, return_to_tokens, send_to_experts
from runtime.experts import combine, dispatch, grouped_linear
from runtime.initialise import Constant, Normal
from runtime.linear_loss import linear_cross_entropy_sum
from runtime.mesh import Mesh
from runtime.norms import rms_norm
from runtime.parameters import Group, buffer, local, parameter
from runtime.rotary import rotary
from runtime.routing import (
    choose_experts,
    expert_counts,
    expert_order,
    gate_weights,
    router,
    sequence_load,
    with_balance_loss,
)


class First(nn.Module):
    """What comes before the blocks, mixture_experts.llmspec:9."""

    def __init__(self, embed: Group):
        super().__init__()
        self.embed = embed

    def forward(self, tokens_BT: Tensor) -> Tensor:
        return F.embedding(tokens_BT, local(self.embed.table))


class LayerAttention(nn.Module):
    """attention of `layer`, mixture_experts.llmspec:6."""

    def __init__(self, mesh: Mesh):
        super().__init__()
        self.q = parameter((1024, 1024), mesh=mesh, init=Normal(std=0.02))
        self.k = parameter((256, 1024), mesh=mesh, init=Normal(std=0.02))
        self.v = parameter((256, 1024), mesh=mesh, init=Normal(std=0.02))
        self.out = parameter((1024, 1024), mesh=mesh, init=Normal(std=0.02 / sqrt(24)))

    def forward(self, normed_BTD: Tensor) -> Tensor:
        q_BTHE = F.linear(normed_BTD, local(self.q)).unflatten(-1, (-1, 64))
        k_BTKE = F.linear(normed_BTD, local(self.k)).unflatten(-1, (-1, 64))
        v_BTKE = F.linear(normed_BTD, local(self.v)).unflatten(-1, (-1, 64))
        q_BTHE = rotary(q_BTHE, base=10000.0)
        k_BTKE = rotary(k_BTKE, base=10000.0)
        mixed_BTI = attention(q_BTHE, k_BTKE, v_BTKE, causal=True).flatten(-2)
        return F.linear(mixed_BTI, local(self.out))


class LayerMoeExperts(nn.Module):
    """moe.experts of `layer`, mixture_experts.llmspec:7."""

    def __init__(self, mesh: Mesh):
        super().__init__()
        self.gate = parameter(
            (16, 2048, 1024), mesh=mesh, init=Normal(std=0.02), split={"expert": 0}
        )
        self.up = parameter((16, 2048, 1024), mesh=mesh, init=Normal(std=0.02), split={"expert": 0})
        self.down = parameter(
            (16, 1024, 2048), mesh=mesh, init=Normal(std=0.02 / sqrt(24)), split={"expert": 0}
        )

    def forward(self, rows_RD: Tensor, counts_x: Tensor) -> Tensor:
        gate_RF = grouped_linear(rows_RD, local(self.gate), counts_x)
        up_RF = grouped_linear(rows_RD, local(self.up), counts_x)
        gate_RF = F.silu(gate_RF)
        hidden_RF = gate_RF * up_RF
        return grouped_linear(hidden_RF, local(self.down), counts_x)


class LayerMoe(nn.Module):
    """moe of `layer`, mixture_experts.llmspec:7."""

    def __init__(self, mesh: Mesh):
        super().__init__()
        self.router = parameter((16, 1024), mesh=mesh, init=Normal(std=0.02))
        # picks of each expert since the last step, and dropped ones
        self.load = buffer((2, 16), init=Constant(value=0.0), dtype=torch.int64, kept=False)
        self.experts = LayerMoeExperts(mesh)
        self.expert = mesh.expert

    def forward(self, normed_BTD: Tensor) -> Tensor:
        logits_BTX = router(normed_BTD, local(self.router))
        experts_BTP = choose_experts(logits_BTX, top_k=2)
        load_BX = sequence_load(experts_BTP, experts=16)
        logits_BTX = with_balance_loss(
            logits_BTX, load_BX, coefficient=0.01 * 16 / (2 * 1024), gate="softmax"
        )
        weights_BTP = gate_weights(logits_BTX, experts_BTP, gate="softmax", normalise=True)
        order_R = expert_order(experts_BTP, drops=False)
        counts_X = expert_counts(experts_BTP, self.load)
        rows_RD = dispatch(normed_BTD, order_R, top_k=2)
        exchange = exchange_counts(counts_X, self.expert)
        counts_x = exchange.counts_x
        # exchange over expert: 32 MiB, 0.0921 ms predicted; backward: exchange
        rows_RD = send_to_experts(rows_RD, exchange)
        experts_RD = self.experts(rows_RD, counts_x)
        # exchange over expert: 32 MiB, 0.0921 ms predicted; backward: exchange
        rows_RD = return_to_tokens(experts_RD, exchange)
        return combine(rows_RD, weights_BTP, order_R)


class Layer(nn.Module):
    """Block `layer`, mixture_experts.llmspec:9."""

    def __init__(self, mesh: Mesh):
        super().__init__()
        self.rmsnorm = Group(weight=parameter((1024,), mesh=mesh, init=Constant(value=1.0)))
        self.attention = LayerAttention(mesh)
        self.rmsnorm_2 = Group(weight=parameter((1024,), mesh=mesh, init=Constant(value=1.0)))
        self.moe = LayerMoe(mesh)

    def forward(self, x_BTD: Tensor) -> Tensor:
        normed_BTD = rms_norm(x_BTD, local(self.rmsnorm.weight), eps=1e-05)
        attention_BTD = self.attention(normed_BTD)
        x_BTD = x_BTD + attention_BTD
        normed_BTD = rms_norm(x_BTD, local(self.rmsnorm_2.weight), eps=1e-05)
        moe_BTD = self.moe(normed_BTD)
        return x_BTD + moe_BTD


class Last(nn.Module):
    """What comes after the blocks, mixture_experts.llmspec:9."""

    def __init__(self, rmsnorm: Group, unembed: Group):
        super().__init__()
        self.rmsnorm = rmsnorm
        self.unembed = unembed

    def forward(self, x_BTD: Tensor, targets_BT: Tensor) -> Tensor:
        normed_BTD = rms_norm(x_BTD, local(self.rmsnorm.weight), eps=1e-05)
        # 500 MiB of logits, 250 MiB at a time;
        # their gradients are made at once: 78.5 MiB wait for the backward
        return linear_cross_entropy_sum(
            normed_BTD, local(self.unembed.table), targets_BT, rows=4096
        )


class Model(nn.Module):
    """`mixture`, 12 blocks: from tokens to the summed loss of their targets."""

    def __init__(self, mesh: Mesh):
        super().__init__()
        self.embed = Group(table=parameter((32000, 1024), mesh=mesh, init=Normal(std=0.02)))
        self.first = First(self.embed)
        self.layer = nn.ModuleDict({str(i): Layer(mesh) for i in range(12)})
        self.rmsnorm = Group(weight=parameter((1024,), mesh=mesh, init=Constant(value=1.0)))
        self.unembed = Group(table=parameter((32000, 1024), mesh=mesh, init=Normal(std=0.02)))
        self.last = Last(self.rmsnorm, self.unembed)

    def forward(self, tokens_BT: Tensor, targets_BT: Tensor, samples_B: Tensor) -> Tensor:
        x = self.first(tokens_BT)
        for block in self.layer.values():
            x = block(x)
        return self.last(x, targets_BT)

    def units(self) -> list[nn.Module]:
        """What is gathered together, in the order of the forward."""
        return [self.first, *self.layer.values(), self.last]
