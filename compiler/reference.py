"""The single-device meaning of a model: its dialect graph, run as it stands on whole parameters.

Shares nothing with sharding, lowering or emission: it is what they are compared with.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from llmspec.compiler.graph import Instance, ModelGraph, Parameter
from llmspec.compiler.ops.dropout import MASKS
from llmspec.compiler.ops.routing import AUXILIARY

DROPOUTS_PER_INSTANCE = 1000
"""Dropout operators are numbered 1000 × (instance in the chain) + (number in the unit)."""

Masks = Callable[[Tensor, float, Tensor, int], Tensor]


class Reference:
    """Runs a ModelGraph on parameters by full name. `masks` draws dropout masks; None: no
    dropout. Buffers that are not given are as a run begins.

    auxiliary: the losses of layers inside the model by name, of the last call of `loss`: sums over
        tokens too, and not part of what it returns.
    """

    def __init__(
        self, graph: ModelGraph, parameters: dict[str, Tensor], masks: Masks | None = None
    ):
        self.graph, self.parameters, self.masks = graph, parameters, masks
        self.auxiliary: list[tuple[str, Tensor]] = []

    def _run(self, instance: Instance, index: int, values: dict[str, Tensor]) -> Tensor:
        unit = self.graph.units[instance.unit]
        known: dict[torch.fx.Node, Tensor] = {}
        for node in unit.graph.nodes:
            match node.op:
                case "placeholder":
                    known[node] = values[str(node.target)]
                case "get_attr":
                    known[node] = self._parameter(instance, node.meta["parameter"])
                case "call_function":
                    args = torch.fx.map_arg(node.args, known.__getitem__)
                    known[node] = node.target(*args)  # type: ignore[operator]
        return known[unit.result()]

    def _parameter(self, instance: Instance, weight: Parameter) -> Tensor:
        name = weight.tied or instance.full_name(weight.path)
        if weight.buffer is None or name in self.parameters:
            return self.parameters[name]
        kind = torch.int64 if weight.buffer.integer else torch.float32
        return torch.full(weight.shape, weight.init.a, dtype=kind)

    def loss(self, tokens: Tensor, targets: Tensor, samples: Tensor) -> Tensor:
        """The summed loss of tokens [B, T], targets [B, T], samples [B]."""
        flow, self.auxiliary = tokens, []
        for index, instance in enumerate(self.graph.instances):
            unit = self.graph.units[instance.unit]
            values = {unit.inputs[0]: flow, "targets": targets, "samples": samples}
            token, losses = MASKS.set(self._shifted(index)), AUXILIARY.set(self.auxiliary)
            try:
                flow = self._run(instance, index, values)
            finally:
                MASKS.reset(token)
                AUXILIARY.reset(losses)
        return flow

    def _shifted(self, index: int) -> Masks | None:
        masks = self.masks
        if masks is None:
            return None
        return lambda x, p, samples, operator: masks(
            x, p, samples, DROPOUTS_PER_INSTANCE * index + operator
        )


def leaf_parameters(named: dict[str, Tensor]) -> dict[str, nn.Parameter]:
    return {name: nn.Parameter(value.detach().clone()) for name, value in named.items()}
