"""Models from PyTorch over context ranks: what the compiler knows, and what it takes as it is."""

from __future__ import annotations

from pathlib import Path

import pytest

from llmspec import dsl
from llmspec.compiler import driver
from llmspec.compiler.driver import Session
from llmspec.compiler.search.search import Found
from llmspec.compiler.verify.plan import verify_plan

MODEL = """
import math

import torch
from torch import nn
from torch.nn import functional as F


class Attention(nn.Module):
    def __init__(self, width, heads, dropout):
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x):
        B, T, D = x.shape
        q, k, v = (
            y.view(B, T, self.heads, D // self.heads).transpose(1, 2)
            for y in self.qkv(x).split(D, 2)
        )
        scores = q @ k.transpose(-2, -1) * (1.0 / math.sqrt(k.size(-1)))
        seen = torch.tril(torch.ones(T, T, dtype=torch.bool, device=x.device))
        weights = F.softmax(scores.masked_fill(~seen, float("-inf")), dim=-1)
        weights = F.dropout(weights, self.dropout, self.training)
        return self.out((weights @ v).transpose(1, 2).contiguous().view(B, T, D))


class Block(nn.Module):
    def __init__(self, width, heads, dropout, odd):
        super().__init__()
        self.first, self.second = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = Attention(width, heads, dropout)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.odd = odd

    def forward(self, x):
        x = x + self.attention(self.first(x))
        if self.odd:  # tokens mixed by an operator that has no rule
            x = x + 0.1 * torch.cumsum(x, 1) / x.shape[1]
        return x + self.down(F.gelu(self.up(self.second(x))))


class Model(nn.Module):
    def __init__(self, dropout=0.0, odd=False, width=32, heads=4, vocab=61, tokens=16):
        super().__init__()
        self.embed = nn.Embedding(vocab, width)
        self.places = nn.Embedding(tokens, width)
        self.blocks = nn.ModuleList([Block(width, heads, dropout, odd) for _ in range(2)])
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocab, bias=False)

    def forward(self, ids):
        x = self.embed(ids) + self.places(torch.arange(ids.shape[1], device=ids.device))
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))
"""

CASES = [
    ("dropout=0.2", 2, "context = 2"),
    ("odd=true", 2, "context = 2"),
    ("dropout=0.2", 4, "context = 2; tensor = 2; kernels = triton"),
    pytest.param("dropout=0.2", 2, "tensor = 2; kernels = triton", marks=pytest.mark.long),
    pytest.param("dropout=0.2", 2, "context = 2; kernels = inductor", marks=pytest.mark.long),
    pytest.param("dropout=0.2", 4, "context = 4", marks=pytest.mark.long),
    pytest.param("odd=true", 4, "context = 2; tensor = 2", marks=pytest.mark.long),
    pytest.param("odd=true", 4, "context = 2; data = 2; zero = 3", marks=pytest.mark.long),
]


@pytest.mark.parametrize(("options", "devices", "pins"), CASES)
def test_gradients(tmp_path: Path, options: str, devices: int, pins: str) -> None:
    (tmp_path / "model.py").write_text(MODEL)
    spec = tmp_path / "spec.llmspec"
    spec.write_text(f"""model m = python("model.py", "Model", {options})
cluster c {{ node = {devices} * gpu("H100-SXM") }}
train t {{
    model = m; cluster = c; dataset = synthetic(); batch = 8 sequences; sequence_length = 16
    steps = 5; precision = fp32
}}
plan {{ {pins}; microbatch = 2 }}
""")
    session = Session(dsl.load(spec), trust=True)
    found = driver.find_plan(session)
    assert isinstance(found, Found)
    if found.plan.kernels != "eager":  # attention's weights are computed in one pass
        text = driver.emit_plan(session, found.plan)["kernels.py"]
        assert "def softmax_dropout_plain(" in text
        assert "def softmax_dropout_backward_plain(" in text
    report, small = verify_plan(session, found.plan, largest=4)
    assert small.mesh == found.plan.mesh
    assert report.ok, [(d.what, d.error) for d in report.failures()[:8]]
