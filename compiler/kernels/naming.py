"""What a kernel is called: after the operators in it, in the words of the literature."""

from __future__ import annotations

from collections.abc import Iterable

from torch import fx

from llmspec.compiler.graph import Unit
from llmspec.compiler.kernels.group import Group
from llmspec.compiler.kernels.kernel import groups_in
from llmspec.compiler.ops import elementwise
from llmspec.compiler.ops.registry import entry_of, shape_of

WORDS = {
    "rms_norm": "rmsnorm",
    "layer_norm": "layernorm",
    "layer_norm_no_bias": "layernorm",
    "gelu_tanh": "gelu",
    "context_dropout": "dropout",
    "context_rotary": "rotary",
    "masked_softmax": "softmax",
    "context_masked_softmax": "softmax",
}


def name_kernels(units: Iterable[Unit]) -> None:
    """One name for groups that the same kernel computes; a number where names would be equal."""
    known: dict[str, str] = {}
    taken: set[str] = set()
    for unit in units:
        for group in groups_in(unit):
            key = group.structure()
            if key not in known:
                known[key] = _unused(kernel_name(group), taken)
            group.name = known[key]


def _unused(word: str, taken: set[str]) -> str:
    name, number = word, 2
    while name in taken:
        name, number = f"{word}_{number}", number + 1
    taken.add(name)
    return name


def kernel_name(group: Group) -> str:
    """`residual_rmsnorm`, `silu_gate`, `bias_gelu`."""
    return "_".join(_word(n, group) for n in group.members)


def _word(node: fx.Node, group: Group) -> str:
    tensors = [a for a in node.args if isinstance(a, fx.Node)]
    vector = any(shape_of(a) != shape_of(node) for a in tensors)
    if node.target is elementwise.add and tensors:
        if len(tensors) < 2:
            return "shift"
        return "bias" if vector else "residual" if _flows(node) else "add"
    if node.target is elementwise.multiply:
        return "scale" if vector or len(tensors) < 2 else "gate"
    name = entry_of(node).name
    return WORDS.get(name, name)


def _flows(node: fx.Node) -> bool:
    """Whether the sum is the value that flows through a block: outside every operator."""
    return not node.meta["scope"]
