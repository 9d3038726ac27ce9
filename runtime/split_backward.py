"""A backward in two parts: input gradients first, the weights' matrix products when there is time.

A stage before this one waits for the gradient of its result and for nothing else. So the first part
computes everything but the gradients of matrices that `linear` multiplies with, which is a third of
a model's operations; for each it queues a Product, and the second part works them off.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.nn import functional as F


@dataclass(frozen=True, slots=True, kw_only=True)
class Product:
    """The gradient of one use of a weight [O, I], still to be computed: x […, I] and the gradient
    of the result […, O]. weight: where autograd goes on from there, casts and views on the way.
    """

    weight: GradientEdge
    x: Tensor
    gradient: Tensor

    def parameter(self) -> nn.Parameter:
        """Whose gradient it is a part of."""
        node: Any = self.weight.node
        while not hasattr(node, "variable"):
            node = node.next_functions[0][0]
        return node.variable

    def run(self) -> None:
        of_weight = self.gradient.flatten(0, -2).t() @ self.x.flatten(0, -2)
        torch.autograd.backward((self.weight,), (of_weight,))


@dataclass(slots=True)
class _Splitting:
    queue: list[Product] | None = None


# One a process, not a context variable: a block that is recomputed runs its forward again inside
# the backward, on CUDA in a thread of autograd's own, and must make the same choices there.
_splitting = _Splitting()


@contextmanager
def splitting(queue: list[Product] | None) -> Iterator[None]:
    """Forwards inside are of a backward that will fill this queue; None: of a whole one."""
    before, _splitting.queue = _splitting.queue, queue
    try:
        yield
    finally:
        _splitting.queue = before


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """F.linear, its weight's gradient queued where the backward is split."""
    queue = _splitting.queue
    if queue is None or not (torch.is_grad_enabled() and x.requires_grad and weight.requires_grad):
        return F.linear(x, weight, bias)
    return _Linear.apply(x, weight.detach(), bias, get_gradient_edge(weight), queue)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, *late: Any) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.edge, ctx.queue = late
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        x, weight = ctx.saved_tensors
        ctx.queue.append(Product(weight=ctx.edge, x=x, gradient=gradient))
        of_bias = gradient.flatten(0, -2).sum(0) if ctx.needs_input_grad[2] else None
        return gradient @ weight, None, of_bias, None, None
