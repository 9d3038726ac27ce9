"""Trainers as people write them by hand, without llmspec: what its programs are measured against.

B batch  T tokens  D width  H query heads  K key/value heads  E head size
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """kv_heads and ffn: of the Llama; the GPT has as many as heads, and 4 times the width."""

    layers: int
    width: int
    heads: int
    kv_heads: int
    ffn: int
    vocab: int
    context: int
    dropout: float = 0.0


# --------------------------------------------------------------------------------------------------
# Llama


class RmsNorm(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, 1e-5)


def rotary_tables(length: int, size: int, base: float) -> tuple[Tensor, Tensor]:
    frequency = 1.0 / base ** (torch.arange(0, size, 2).float() / size)
    angle = torch.outer(torch.arange(length).float(), frequency)
    return angle.cos(), angle.sin()


def rotate(x_BHTE: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    cos, sin = cos.to(x_BHTE.dtype), sin.to(x_BHTE.dtype)  # under autocast they would widen it
    left, right = x_BHTE.chunk(2, dim=-1)
    return torch.cat((left * cos - right * sin, right * cos + left * sin), dim=-1)


class LlamaAttention(nn.Module):
    def __init__(self, shape: Shape):
        super().__init__()
        self.size = shape.width // shape.heads
        self.q = nn.Linear(shape.width, shape.heads * self.size, bias=False)
        self.k = nn.Linear(shape.width, shape.kv_heads * self.size, bias=False)
        self.v = nn.Linear(shape.width, shape.kv_heads * self.size, bias=False)
        self.out = nn.Linear(shape.heads * self.size, shape.width, bias=False)
        self.grouped = shape.heads != shape.kv_heads

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        batch, length, _ = x.shape
        q = self.q(x).view(batch, length, -1, self.size).transpose(1, 2)
        k = self.k(x).view(batch, length, -1, self.size).transpose(1, 2)
        v = self.v(x).view(batch, length, -1, self.size).transpose(1, 2)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=self.grouped)
        return self.out(y.transpose(1, 2).reshape(batch, length, -1))


class LlamaBlock(nn.Module):
    def __init__(self, shape: Shape):
        super().__init__()
        self.norm_1, self.norm_2 = RmsNorm(shape.width), RmsNorm(shape.width)
        self.attention = LlamaAttention(shape)
        self.gate = nn.Linear(shape.width, shape.ffn, bias=False)
        self.up = nn.Linear(shape.width, shape.ffn, bias=False)
        self.down = nn.Linear(shape.ffn, shape.width, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.attention(self.norm_1(x), cos, sin)
        y = self.norm_2(x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))


class Llama(nn.Module):
    def __init__(self, shape: Shape):
        super().__init__()
        self.embed = nn.Embedding(shape.vocab, shape.width)
        self.blocks = nn.ModuleList(LlamaBlock(shape) for _ in range(shape.layers))
        self.norm = RmsNorm(shape.width)
        self.head = nn.Linear(shape.width, shape.vocab, bias=False)
        cos, sin = rotary_tables(shape.context, shape.width // shape.heads, 10_000.0)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)
        self.apply(_initialise)

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x, self.cos, self.sin)
        return self.loss(x, targets)

    def loss(self, x: Tensor, targets: Tensor) -> Tensor:
        logits = self.head(self.norm(x))
        return F.cross_entropy(logits.view(-1, logits.shape[-1]), targets.view(-1))


# --------------------------------------------------------------------------------------------------
# GPT, after nanoGPT, with the tanh form of GELU as in GPT-2


class GptAttention(nn.Module):
    def __init__(self, shape: Shape):
        super().__init__()
        self.heads, self.dropout = shape.heads, shape.dropout
        self.qkv = nn.Linear(shape.width, 3 * shape.width)
        self.out = nn.Linear(shape.width, shape.width)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        q, k, v = (
            part.view(batch, length, self.heads, width // self.heads).transpose(1, 2)
            for part in self.qkv(x).split(width, dim=2)
        )
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        y = self.out(y.transpose(1, 2).contiguous().view(batch, length, width))
        return F.dropout(y, self.dropout, self.training)


class GptBlock(nn.Module):
    def __init__(self, shape: Shape):
        super().__init__()
        self.norm_1, self.norm_2 = nn.LayerNorm(shape.width), nn.LayerNorm(shape.width)
        self.attention = GptAttention(shape)
        self.up = nn.Linear(shape.width, 4 * shape.width)
        self.down = nn.Linear(4 * shape.width, shape.width)
        self.dropout = nn.Dropout(shape.dropout)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm_1(x))
        return x + self.dropout(self.down(F.gelu(self.up(self.norm_2(x)), approximate="tanh")))


class Gpt(nn.Module):
    def __init__(self, shape: Shape):
        super().__init__()
        self.embed = nn.Embedding(shape.vocab, shape.width)
        self.positions = nn.Embedding(shape.context, shape.width)
        self.dropout = nn.Dropout(shape.dropout)
        self.blocks = nn.ModuleList(GptBlock(shape) for _ in range(shape.layers))
        self.norm = nn.LayerNorm(shape.width)
        self.head = nn.Linear(shape.width, shape.vocab, bias=False)
        self.head.weight = self.embed.weight
        self.apply(_initialise)

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        places = torch.arange(tokens.shape[1], device=tokens.device)
        x = self.dropout(self.embed(tokens) + self.positions(places))
        for block in self.blocks:
            x = block(x)
        logits = self.head(self.norm(x))
        return F.cross_entropy(logits.view(-1, logits.shape[-1]), targets.view(-1))


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=0.02)
    if isinstance(module, nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)


# --------------------------------------------------------------------------------------------------
# the trainer

MODELS: dict[str, Callable[[Shape], Llama | Gpt]] = {"llama": Llama, "gpt": Gpt}


@dataclass(slots=True, kw_only=True)
class PlainTrainer:
    """rows: sequences of a step on this process. call: the model, wrapped or not."""

    model: Llama | Gpt
    call: nn.Module
    optimizer: torch.optim.Optimizer
    data: np.ndarray
    rows: int
    length: int
    steps: int
    random: np.random.Generator
    done: int = 0

    def step(self) -> float:
        """One optimizer step; the loss."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate()
        tokens, targets = self.batch()
        loss = self.call(tokens, targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.done += 1
        return loss.item()

    def batch(self) -> tuple[Tensor, Tensor]:
        starts = self.random.integers(0, len(self.data) - self.length - 1, self.rows)
        ids = np.stack([self.data[i : i + self.length + 1] for i in starts]).astype(np.int64)
        whole = torch.from_numpy(ids)
        return whole[:, :-1].contiguous(), whole[:, 1:].contiguous()

    def learning_rate(self) -> float:
        done = self.done / self.steps
        return 3e-4 + 0.5 * (3e-3 - 3e-4) * (1 + math.cos(math.pi * min(1.0, done)))


def plain_trainer(
    name: str, shape: Shape, *, data: np.ndarray, batch: int, steps: int, parallel: str
) -> PlainTrainer:
    """parallel: `alone`, `ddp` or `fsdp2` over all processes of the default group."""
    torch.manual_seed(1)
    world, rank = (1, 0) if parallel == "alone" else (dist.get_world_size(), dist.get_rank())
    model = MODELS[name](shape)
    call: nn.Module = model
    if parallel == "ddp":
        call = DistributedDataParallel(model)
    elif parallel == "fsdp2":
        mesh = init_device_mesh("cpu", (world,))
        for block in model.blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    return PlainTrainer(
        model=model,
        call=call,
        optimizer=torch.optim.AdamW(groups, lr=3e-3, betas=(0.9, 0.95), fused=True),
        data=data,
        rows=batch // world,
        length=shape.context,
        steps=steps,
        random=np.random.default_rng(rank),
    )
