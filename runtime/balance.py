"""After a step: how evenly tokens chose among experts, and the biases that make it more even.

X experts
"""

from collections.abc import Iterable
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .mesh import Mesh
from .parameters import traits


class _Layer(NamedTuple):
    """Buffers of one layer; rate: how far a step moves the bias."""

    load_2X: Tensor
    bias_X: Tensor | None
    rate: float


@torch.no_grad()
def balance_experts(models: Iterable[nn.Module], mesh: Mesh) -> dict[str, Tensor]:
    """Move each layer's selection bias by its rate, up for experts that too few tokens of the whole
    batch chose, and begin to count anew.

    What runs again in the backward counts again: only how counts compare is used.
    Returns, of the worst layer: the largest expert's load over the mean one, the share dropped.
    Source: DeepSeek-V3, arXiv 2412.19437, 2.1.2.
    """
    layers = [layer for model in models for layer in _layers(model)]
    worst = torch.zeros(2, dtype=torch.float64, device=mesh.device)
    if layers:
        sizes = [layer.load_2X.numel() for layer in layers]
        loads = torch.cat([layer.load_2X.flatten() for layer in layers])
        if mesh.reduction.size > 1:
            dist.all_reduce(loads, group=mesh.reduction.group)
        for layer, flat in zip(layers, loads.split(sizes), strict=True):
            chosen_X, dropped_X = flat.view_as(layer.load_2X).double()
            if layer.bias_X is not None:
                missing_X = chosen_X.mean() - chosen_X
                layer.bias_X.add_(missing_X.sign().to(layer.bias_X.dtype), alpha=layer.rate)
            layer.load_2X.zero_()
            total = chosen_X.sum().clamp(min=1)
            own = torch.stack([chosen_X.max() / (total / len(chosen_X)), dropped_X.sum() / total])
            worst = torch.maximum(worst, own)
    if mesh.pipeline.size > 1:
        dist.all_reduce(worst, op=dist.ReduceOp.MAX, group=mesh.pipeline.group)
    return {"expert_load": worst[0], "dropped": worst[1]}


def _layers(model: nn.Module) -> list[_Layer]:
    """The modules that count their experts' load."""
    known = traits(model)
    found = []
    for name, module in model.named_modules():
        load, bias = module._buffers.get("load"), module._buffers.get("bias")
        if load is not None:
            rate = known[f"{name}.bias"].rate if bias is not None else None
            found.append(_Layer(load, bias, rate or 0.0))
    return found
