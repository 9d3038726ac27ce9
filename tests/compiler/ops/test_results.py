"""What operators are said to give is what PyTorch gives; and what is not imported for that."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from llmspec.compiler.ops.results import RESULTS, result_of

ROOT = Path(__file__).resolve().parents[3]
B, T, D, H, K, E, X, P, V, R = 2, 6, 16, 4, 2, 8, 4, 2, 32, 24


def tensor(*shape: int) -> torch.Tensor:
    return torch.empty(shape, device="meta")


def whole(*shape: int) -> torch.Tensor:
    return torch.empty(shape, dtype=torch.int64, device="meta")


X3, ROW, HEADS = tensor(B, T, D), tensor(D), tensor(B, T, H, E)
KEYS, WEIGHTS = tensor(B, T, K, E), tensor(B, H, T, T)
STRETCHED, MIXED = (tensor(B, 1, D), tensor(T, 1)), (X3, whole(B, T, 1))
LOGITS, PICKS = tensor(B, T, X), whole(B, T, P)

UNARY = ("gelu", "gelu_tanh", "relu", "silu", "tanh", "sigmoid", "turn_halves", "turn_pairs")
BINARY = ("add", "subtract", "multiply", "divide")
CALLS = {
    **{name: [(X3,)] for name in UNARY},
    **{name: [(X3, X3), (X3, ROW), (ROW, X3), (X3, 2.0), STRETCHED, MIXED] for name in BINARY},
    "add": [(X3, ROW), (X3, tensor(T, D)), (whole(B, T), whole(B, T)), (whole(B, T), 1.5)],
    "rms_norm": [(X3, ROW, 1e-5)],
    "layer_norm": [(X3, ROW, ROW, 1e-5)],
    "layer_norm_no_bias": [(X3, ROW, 1e-5)],
    "rotary": [(HEADS, 1e4)],
    "dropout": [(X3, whole(B), 0.1, 0)],
    "masked_softmax": [(WEIGHTS, True, None)],
    "balance_loss": [(LOGITS, whole(B, X), 0.1, "softmax", P, T)],
    "z_loss": [(LOGITS, 0.1)],
    "drop_over_capacity": [(PICKS, X, 3)],
    "cross_entropy": [(tensor(B, T, V), whole(B, T))],
    "linear_cross_entropy": [(X3, tensor(V, D), whole(B, T), 4)],
    "linear": [(X3, tensor(V, D)), (X3, tensor(3, V, D))],
    "projection": [(X3, tensor(D, V)), (X3, tensor(D, 3, V))],
    "embedding": [(whole(B, T), tensor(V, D))],
    "attention": [(HEADS, KEYS, tensor(B, T, K, 2 * E), True, None, False)],
    "scores": [(HEADS, KEYS)],
    "mixture": [(WEIGHTS, KEYS)],
    "join": [(HEADS, tensor(B, T, 1, 3)), (HEADS, tensor(B, T, H, 3))],
    "router": [(X3, tensor(X, D))],
    "choose_experts": [(LOGITS, P, "softmax", 1, 1), (LOGITS, P, "sigmoid", 2, 1, tensor(X))],
    "sequence_load": [(PICKS, X)],
    "gate_weights": [(LOGITS, PICKS, "softmax", True, 1.0, True)],
    "expert_counts": [(PICKS, whole(2, X), X)],
    "dispatch": [(X3, whole(R), P)],
    "expert_order": [(PICKS, False)],
    "exchange_counts": [(whole(X), 2)],
    "own_counts": [(whole(2, X),)],
    "grouped_linear": [(tensor(R, D), tensor(X, V, D), whole(X))],
    "grouped_bias": [(tensor(R, D), tensor(X, D), whole(X))],
    "combine": [(tensor(R, D), tensor(B, T, P), whole(R))],
}


@pytest.mark.parametrize("function", RESULTS, ids=lambda f: f.__name__)
def test_results(function):
    for args in CALLS[function.__name__]:
        made, true = result_of(function, args), function(*args)
        assert made.is_meta
        assert (made.shape, made.dtype) == (true.shape, true.dtype)


UNWANTED = ("torch._dynamo", "torch._inductor", "sympy", "matplotlib")
PLANNED = f"""
import sys
from llmspec.compiler.cli.main import main
try:
    main(["plan", sys.argv[1]])
except SystemExit as end:
    assert not end.code
print("imported", *[name for name in {UNWANTED} if name in sys.modules])
"""


@pytest.mark.parametrize("spec", ["llama_kernels", "mixture_experts"])
def test_planning_imports_no_compiler(spec):
    path = ROOT / "tests" / "golden" / "specs" / f"{spec}.llmspec"
    made = subprocess.run(
        [sys.executable, "-c", PLANNED, str(path)], capture_output=True, text=True, check=True
    )
    assert made.stdout.splitlines()[-1] == "imported"
