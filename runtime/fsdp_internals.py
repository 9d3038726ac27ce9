"""What FSDP2 does after a unit's backward, done by hand: its private names, all of them here.

A split backward makes gradients that FSDP2's hooks do not see. torch.distributed.pipelining has
the same need and calls the same two functions (its stages' `perform_reduce_grad`).
"""

from collections.abc import Iterator
from typing import Any, cast

from torch import nn
from torch.distributed.fsdp import fully_shard


def units_by_parameter(model: nn.Module) -> dict[nn.Parameter, Any]:
    """FSDP2's group of each parameter, by the gathered parameter that autograd knows.

    Only after the first forward.
    """
    groups = (g for state in _root(model)._state_ctx.all_states for g in _groups(state))
    return {
        p.unsharded_param: group
        for group in groups
        for p in group.fsdp_params
        if hasattr(p, "_unsharded_param")
    }


def reduce_unit(group: Any) -> None:
    """Reduce its gradients, if the root is to, and free its parameters, if the root is to."""
    _in_one_type(group)
    group.post_backward()


def finish_backward(model: nn.Module) -> None:
    """The same for the units that are left; then wait for reductions, if the backward was the
    step's last."""
    for state in _root(model)._state_ctx.all_states:
        for group in _groups(state):
            _in_one_type(group)
    _root(model)._root_post_backward_final_callback()


def _in_one_type(group: Any) -> None:
    """FSDP2 reduces a unit's gradients together, and those of the first part of a split backward
    wait in the reduction's type: the second part's join them there."""
    params = [p for p in group.fsdp_params if hasattr(p, "_unsharded_param")]
    if any(p.unsharded_accumulated_grad is not None for p in params):
        for p in params:
            if p.unsharded_accumulated_grad is None:
                p.to_accumulated_grad_if_needed()


def _root(model: nn.Module) -> Any:
    return cast(Any, fully_shard).state(model)


def _groups(state: Any) -> Iterator[Any]:
    # torch 2.11 has one group a module, later ones may have several
    if hasattr(state, "_fsdp_param_groups"):
        yield from state._fsdp_param_groups
    elif state._fsdp_param_group is not None:
        yield state._fsdp_param_group
