"""Small language models in the many ways in which people write their parts."""

import math

import torch
import torch.nn.functional as F
from torch import nn

WIDTH, HEADS, VOCABULARY, TOKENS = 32, 4, 61, 16


class RMSNorm(nn.Module):
    def __init__(self, dim, eps=1e-6):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x):
        y = x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + self.eps)
        return y.type_as(x) * self.weight


class WrittenLayerNorm(nn.Module):
    def __init__(self, dim, eps=1e-5):
        super().__init__()
        self.eps = eps
        self.gamma = nn.Parameter(torch.ones(dim))
        self.beta = nn.Parameter(torch.zeros(dim))

    def forward(self, x):
        mean = x.mean(-1, keepdim=True)
        var = ((x - mean) ** 2).mean(-1, keepdim=True)
        return self.gamma * (x - mean) / torch.sqrt(var + self.eps) + self.beta


class Mlp(nn.Module):
    def __init__(self, act=F.silu):
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 48), nn.Linear(48, WIDTH)
        self.act = act

    def forward(self, x):
        return self.down(self.act(self.up(x)))


class Attention(nn.Module):
    """Separate projections; subclasses change what happens to q, k and v."""

    kv_heads = HEADS

    def __init__(self):
        super().__init__()
        size = WIDTH // HEADS
        self.wq = nn.Linear(WIDTH, WIDTH, bias=False)
        self.wk = nn.Linear(WIDTH, self.kv_heads * size, bias=False)
        self.wv = nn.Linear(WIDTH, self.kv_heads * size, bias=False)
        self.wo = nn.Linear(WIDTH, WIDTH, bias=False)

    def heads(self, x):
        size = WIDTH // HEADS
        return [w(x).view(*x.shape[:2], -1, size) for w in (self.wq, self.wk, self.wv)]

    def change(self, q, k):
        return q, k

    def forward(self, x):
        q, k, v = self.heads(x)
        q, k = self.change(q, k)
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        groups = HEADS // k.shape[1]
        k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.wo(y.transpose(1, 2).flatten(2))


class GroupedAttention(Attention):
    kv_heads = 2


class OneKeyAttention(Attention):
    kv_heads = 1


class FusedPermuted(Attention):
    """One projection, heads before the split, a permutation, then unbind."""

    def __init__(self):
        super().__init__()
        del self.wq, self.wk, self.wv
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)

    def heads(self, x):
        b, t, _ = x.shape
        qkv = self.qkv(x).reshape(b, t, 3, HEADS, -1).permute(2, 0, 1, 3, 4)
        return qkv.unbind(0)


class FusedByHead(FusedPermuted):
    """Each head's query, key and value lie together."""

    def heads(self, x):
        b, t, _ = x.shape
        return self.qkv(x).view(b, t, HEADS, -1).chunk(3, dim=-1)


class FusedGrouped(GroupedAttention):
    """One projection into parts of different size."""

    def __init__(self):
        super().__init__()
        del self.wq, self.wk, self.wv
        self.wqkv = nn.Linear(WIDTH, WIDTH + 2 * WIDTH // 2)

    def heads(self, x):
        parts = self.wqkv(x).split([WIDTH, WIDTH // 2, WIDTH // 2], dim=-1)
        return [p.view(*x.shape[:2], -1, WIDTH // HEADS) for p in parts]


def angles():
    size = WIDTH // HEADS
    steps = 1.0 / (10000 ** (torch.arange(0, size, 2).float() / size))
    return torch.outer(torch.arange(64).float(), steps)


class HalvesRotary(Attention):
    def __init__(self):
        super().__init__()
        self.register_buffer("cos", angles().cos()[None, :, None], persistent=False)
        self.register_buffer("sin", angles().sin()[None, :, None], persistent=False)

    def turn(self, x):
        cos, sin = self.cos[:, : x.shape[1]], self.sin[:, : x.shape[1]]
        x1, x2 = x.chunk(2, dim=-1)
        return torch.cat([x1 * cos - x2 * sin, x2 * cos + x1 * sin], dim=-1)

    def change(self, q, k):
        return self.turn(q), self.turn(k)


class PairsRotary(HalvesRotary):
    def turn(self, x):
        cos, sin = (t[:, : x.shape[1]].repeat_interleave(2, -1) for t in (self.cos, self.sin))
        turned = torch.stack((-x[..., 1::2], x[..., ::2]), dim=-1).flatten(-2)
        return x * cos + turned * sin


class ComplexRotary(Attention):
    def __init__(self):
        super().__init__()
        a = angles()
        self.freqs = torch.polar(torch.ones_like(a), a)

    def turn(self, x):
        pairs = torch.view_as_complex(x.float().reshape(*x.shape[:-1], -1, 2))
        freqs = self.freqs[: x.shape[1]].view(1, x.shape[1], 1, -1)
        return torch.view_as_real(pairs * freqs).flatten(3).type_as(x)

    def change(self, q, k):
        return self.turn(q), self.turn(k)


class NormedHeads(Attention):
    def __init__(self):
        super().__init__()
        self.q_norm, self.k_norm = RMSNorm(WIDTH // HEADS), RMSNorm(WIDTH // HEADS)

    def change(self, q, k):
        return self.q_norm(q), self.k_norm(k)


class ScaledFirst(Attention):
    """The query is scaled, the square written out, the mask made on the way."""

    def forward(self, x):
        q, k, v = (t.transpose(1, 2) for t in self.heads(x))
        q = q * (WIDTH // HEADS) ** -0.5
        scores = torch.matmul(q, k.transpose(2, 3))
        t = x.shape[1]
        hidden = torch.full((t, t), float("-inf"), device=x.device).triu(1)
        weights = (scores + hidden).softmax(-1)
        return self.wo((weights @ v).transpose(1, 2).reshape(x.shape))


class Windowed(ScaledFirst):
    def forward(self, x):
        q, k, v = (t.transpose(1, 2) for t in self.heads(x))
        places = torch.arange(x.shape[1], device=x.device)
        far = places[:, None] - places[None]
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=(far >= 0) & (far < 5))
        return self.wo(y.transpose(1, 2).reshape(x.shape))


class Alibi(Attention):
    """A bias that no operator of the dialect knows."""

    def forward(self, x):
        q, k, v = (t.transpose(1, 2) for t in self.heads(x))
        places = torch.arange(x.shape[1], device=x.device)
        far = (places[None] - places[:, None]).to(x.dtype)
        slopes = 2.0 ** -torch.arange(1, HEADS + 1, device=x.device).to(x.dtype)
        bias = far[None] * slopes[:, None, None]
        bias = bias.masked_fill(far > 0, float("-inf"))
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=bias[None])
        return self.wo(y.transpose(1, 2).reshape(x.shape))


class Block(nn.Module):
    def __init__(self, attention=Attention, norm=RMSNorm, act=F.silu):
        super().__init__()
        self.attention, self.mlp = attention(), Mlp(act)
        self.norm1, self.norm2 = norm(WIDTH), norm(WIDTH)

    def forward(self, x):
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class ParallelBlock(Block):
    def forward(self, x):
        y = self.norm1(x)
        return x + self.attention(y) + self.mlp(y)


class InPlaceBlock(Block):
    def forward(self, x):
        x = x + self.attention(self.norm1(x))
        x += self.mlp(self.norm2(x))
        return x


class OddBlock(Block):
    """An operator that nobody thought of."""

    def forward(self, x):
        x = x + self.attention(self.norm1(x))
        x = x + torch.cumsum(self.norm2(x), 1) / x.shape[1]
        return x + self.mlp(x.sin())


class Sinusoids(nn.Module):
    def __init__(self):
        super().__init__()
        table = torch.zeros(64, WIDTH)
        place = torch.arange(0, 64, dtype=torch.float).unsqueeze(1)
        step = torch.exp(torch.arange(0, WIDTH, 2).float() * (-math.log(10000.0) / WIDTH))
        table[:, 0::2] = torch.sin(place * step)
        table[:, 1::2] = torch.cos(place * step)
        self.register_buffer("table", table.unsqueeze(0))

    def forward(self, x):
        return x + self.table[:, : x.size(1)]


class Model(nn.Module):
    def __init__(self, block=Block, layers=2, positions=None, scale=None, **options):
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.positions = positions() if positions else None
        self.layers = nn.ModuleList([block(**options) for _ in range(layers)])
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.scale = scale

    def forward(self, ids):
        x = self.embed(ids)
        if self.scale:
            x = x * self.scale
        if self.positions is not None:
            x = self.positions(x)
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x))


class SkipModel(Model):
    """Every block reads the embedding: what flows is more than one tensor."""

    def forward(self, ids):
        first = x = self.embed(ids)
        for layer in self.layers:
            x = layer(x + 0.1 * first)
        return self.head(self.norm(x))


class SharedBlock(Block):
    pass


class SharedModel(nn.Module):
    """One block used twice."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.layers = nn.ModuleList([Block()])
        self.head = nn.Linear(WIDTH, VOCABULARY)

    def forward(self, ids):
        x = self.embed(ids)
        x = self.layers[0](self.layers[0](x))
        return self.head(x)
