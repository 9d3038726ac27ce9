"""A tiny language model written as emitted programs are, and the same in plain PyTorch.

B batch  T tokens  t tokens of this tensor rank  D width  V vocabulary  v this rank's part of it
H heads  h this rank's heads  E head size
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmspec.runtime.collectives import all_gather, narrow, reduce_scatter
from llmspec.runtime.initialise import Constant, Normal, Uniform
from llmspec.runtime.loss import (
    vocabulary_parallel_cross_entropy_sum,
    vocabulary_parallel_embedding,
)
from llmspec.runtime.mesh import Mesh
from llmspec.runtime.norms import rms_norm
from llmspec.runtime.parameters import Group, local, parameter
from llmspec.runtime.random import dropout
from llmspec.runtime.split_backward import linear

V, D, T, H, E, WIDE, LAYERS = 13, 8, 4, 4, 2, 10, 3  # V splits unevenly over 2 ranks
SEED = 5
DROPOUT = 0.25
TYPE = torch.float64

SHAPES = {"embed.weight": (V, D), "position.weight": (T, D), "norm.weight": (D,)}
for _i in range(LAYERS):
    SHAPES |= {
        f"layer.{_i}.norm.weight": (D,),
        f"layer.{_i}.q.weight": (H * E, D),
        f"layer.{_i}.k.weight": (H * E, D),
        f"layer.{_i}.v.weight": (H * E, D),
        f"layer.{_i}.o.weight": (D, H * E),
        f"layer.{_i}.o.bias": (D,),
        f"layer.{_i}.up.weight": (WIDE, D),
        f"layer.{_i}.up.bias": (WIDE,),
        f"layer.{_i}.down.weight": (D, WIDE),
    }


def init_of(name: str):
    if "norm" in name:
        return Constant(value=1.0)
    return Uniform(low=-0.3, high=0.3) if "bias" in name else Normal(std=0.3)


class Block(nn.Module):
    def __init__(self, mesh: Mesh, number: int):
        super().__init__()

        def make(name: str, **how) -> nn.Parameter:
            full = f"layer.{number}.{name}"
            return parameter(SHAPES[full], mesh=mesh, init=init_of(full), dtype=TYPE, **how)

        rows, columns = {"split": {"tensor": 0}}, {"split": {"tensor": 1}}
        self.norm = Group(weight=make("norm.weight", partial=True))
        self.q = Group(weight=make("q.weight", **rows))
        self.k = Group(weight=make("k.weight", **rows))
        self.v = Group(weight=make("v.weight", **rows))
        self.o = Group(weight=make("o.weight", **columns), bias=make("o.bias", partial=True))
        self.up = Group(weight=make("up.weight", **rows), bias=make("up.bias", **rows))
        self.down = Group(weight=make("down.weight", **columns))
        self.tensor, self.number = mesh.tensor, number

    def forward(self, x_BtD: Tensor, samples_B: Tensor) -> Tensor:
        normed_BtD = rms_norm(x_BtD, local(self.norm.weight), 1e-6)
        normed_BTD = all_gather(normed_BtD, 1, self.tensor)
        heads = [
            linear(normed_BTD, local(part.weight)).unflatten(-1, (-1, E)).transpose(1, 2)
            for part in (self.q, self.k, self.v)
        ]
        mixed_BhTE = F.scaled_dot_product_attention(*heads, is_causal=True)
        partial_BTD = linear(mixed_BhTE.transpose(1, 2).flatten(2), local(self.o.weight))
        out_BtD = reduce_scatter(partial_BTD, 1, self.tensor) + local(self.o.bias)
        t = T // self.tensor.size
        x_BtD = x_BtD + dropout(
            out_BtD,
            DROPOUT,
            samples_B,
            operator=self.number,
            seed=SEED,
            start=(self.tensor.rank * t, 0),
            shape=(T, D),
            training=self.training,
        )
        x_BTD = all_gather(x_BtD, 1, self.tensor)
        wide_BTw = F.gelu(linear(x_BTD, local(self.up.weight), local(self.up.bias)))
        partial_BTD = linear(wide_BTw, local(self.down.weight))
        return x_BtD + reduce_scatter(partial_BTD, 1, self.tensor)


class Stage(nn.Module):
    """layers: this stage's; the first stage embeds, the last computes the loss, both tied."""

    def __init__(self, mesh: Mesh, layers: range):
        super().__init__()
        self.tensor = mesh.tensor
        self.first, self.last = layers.start == 0, layers.stop == LAYERS

        def make(name: str, **how) -> nn.Parameter:
            return parameter(SHAPES[name], mesh=mesh, init=init_of(name), dtype=TYPE, **how)

        if self.first or self.last:
            self.embed = Group(weight=make("embed.weight", split={"tensor": 0}))
        if self.first:
            self.position = Group(weight=make("position.weight", partial=True))
        self.layer = nn.ModuleDict({str(i): Block(mesh, i) for i in layers})
        if self.last:
            self.norm = Group(weight=make("norm.weight", partial=True))

    def forward(self, x: Tensor, targets_BT: Tensor, samples_B: Tensor) -> Tensor:
        if self.first:
            partial_BTD = vocabulary_parallel_embedding(x, local(self.embed.weight), V, self.tensor)
            position_tD = narrow(local(self.position.weight), 0, self.tensor)
            x = reduce_scatter(partial_BTD, 1, self.tensor) + position_tD
        for block in self.layer.values():
            x = block(x, samples_B)
        if not self.last:
            return x
        normed_BTD = all_gather(rms_norm(x, local(self.norm.weight), 1e-6), 1, self.tensor)
        logits_BTv = linear(normed_BTD, local(self.embed.weight))
        return vocabulary_parallel_cross_entropy_sum(logits_BTv, targets_BT, V, self.tensor)


@dataclass(frozen=True, kw_only=True)
class Micro:
    tokens_BT: Tensor
    targets_BT: Tensor
    samples_B: Tensor
    first: bool
    last: bool


@dataclass(frozen=True, kw_only=True)
class Batch:
    """rows: this rank's rows of the global batch, micro-batch by micro-batch."""

    tokens: Tensor
    targets: Tensor
    data_rank: int
    data_size: int

    @property
    def target_tokens(self) -> int:
        return int((self.targets != -100).sum())

    def microbatches(self, count: int) -> Iterator[Micro]:
        rows = len(self.tokens) // (count * self.data_size)
        for i in range(count):
            start = (i * self.data_size + self.data_rank) * rows
            yield Micro(
                tokens_BT=self.tokens[start : start + rows],
                targets_BT=self.targets[start : start + rows],
                samples_B=torch.arange(start, start + rows) + 1000,
                first=i == 0,
                last=i == count - 1,
            )


def global_batch(rows: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(V, (rows, T + 1), generator=generator)
    targets = tokens[:, 1:].clone()
    targets[0, 0] = targets[-1, -1] = -100
    return tokens[:, :-1], targets


def reference_loss(p: dict[str, Tensor], tokens: Tensor, targets: Tensor, training: bool) -> Tensor:
    """The whole global batch at once, no collective, nothing of the runtime but `dropout`."""
    x = F.embedding(tokens, p["embed.weight"]) + p["position.weight"]
    samples = torch.arange(len(tokens)) + 1000
    for i in range(LAYERS):
        w = {name: p[f"layer.{i}.{name}"] for name in _BLOCK}
        normed = F.rms_norm(x, (D,), w["norm.weight"], 1e-6)
        heads = [
            F.linear(normed, w[f"{n}.weight"]).unflatten(-1, (H, E)).transpose(1, 2) for n in "qkv"
        ]
        mixed = F.scaled_dot_product_attention(*heads, is_causal=True).transpose(1, 2).flatten(2)
        out = F.linear(mixed, w["o.weight"], w["o.bias"])
        x = x + dropout(
            out,
            DROPOUT,
            samples,
            operator=i,
            seed=SEED,
            start=(0, 0),
            shape=(T, D),
            training=training,
        )
        x = x + F.linear(F.gelu(F.linear(x, w["up.weight"], w["up.bias"])), w["down.weight"])
    logits = F.linear(F.rms_norm(x, (D,), p["norm.weight"], 1e-6), p["embed.weight"])
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-100)


_BLOCK = [name.removeprefix("layer.0.") for name in SHAPES if name.startswith("layer.0.")]
