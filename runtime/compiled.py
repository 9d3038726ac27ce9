"""Fused groups as functions that torch.compile compiles: one graph each, forward and backward.

LLMSPEC_COMPILE_BACKEND names another backend of torch.compile than inductor, which needs a C++
compiler on CPUs: `aot_eager` traces the same graphs and runs their operators one by one.
"""

import inspect
import os
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

BACKEND = os.environ.get("LLMSPEC_COMPILE_BACKEND", "inductor")


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """The whole function in one graph, compiled for each shape that it meets; no gradients."""
    made = torch.compile(function, backend=BACKEND, fullgraph=True, dynamic=False)
    names = list(inspect.signature(function).parameters)
    stream = names.index("stream") if "stream" in names else None

    def run(*args: Any) -> Any:
        if stream is not None:
            args = (*args[:stream], _tensor(args[stream], args[0].device), *args[stream + 1 :])
        with torch.no_grad():
            return made(*args)

    return run


@cache
def _tensor(stream: int, device: torch.device) -> Tensor:
    """A dropout's stream differs from layer to layer: a number would be compiled for each."""
    with torch.inference_mode(False):
        return torch.tensor(stream, device=device)


def operator(
    name: str,
    plain: Callable[..., Any],
    gradients: Callable[..., Any] | None = None,
    keep: Callable[..., None] | None = None,
) -> Any:
    """A torch.library operator that runs `plain` compiled.

    keep(ctx, inputs, output), gradients(ctx, *gradients): its autograd.
    """
    schema = torch.library.infer_schema(plain, mutates_args=())
    made = torch.library.custom_op(
        f"kernels::{name}", compiled(plain), mutates_args=(), schema=schema
    )
    made.register_fake(plain)
    if gradients is not None:
        made.register_autograd(gradients, setup_context=keep)
    return made
