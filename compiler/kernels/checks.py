"""Print test_kernels.py: every kernel against its plain function, on odd shapes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from llmspec.compiler.kernels.direction import Direction, backward_of, forward_of
from llmspec.compiler.kernels.group import Group
from llmspec.compiler.kernels.kinds import INDUCTOR, TRITON
from llmspec.compiler.ops.formula import Expr
from llmspec.compiler.ops.registry import Shape, shape_of
from llmspec.compiler.text import Text, formatted

ODD = (2, 5, 3, 3)
"""Of the grid's dimensions but the last."""
COLUMNS, HALVES = 37, 38
"""Of a row; of one whose halves turn."""
GIVEN = {"stream": "1234567", "threshold": "-(1 << 62)", "raised": "4 / 3"}


IN_TRITON = """
from __future__ import annotations

import os

import torch
from torch import Tensor

import kernels

# the interpreter runs on CPUs: TRITON_INTERPRET=1 python test_kernels.py
DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"
"""
COMPILED = """
from __future__ import annotations

import torch
from torch import Tensor

import kernels
from runtime.compiled import compiled

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
"""
BEGINNING = {TRITON: IN_TRITON, INDUCTOR: COMPILED}
OURS = {
    TRITON: 'getattr(kernels, f"{name}_triton")',
    INDUCTOR: 'compiled(getattr(kernels, f"{name}_plain"))',
}
WORDS = {TRITON: "in Triton", INDUCTOR: "compiled"}
COMPARING = '''
GENERATOR = torch.Generator().manual_seed(1)


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, generator=GENERATOR)


def results(made: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return made if isinstance(made, tuple) else (made,)


def compare(name: str, *given: Tensor | float) -> None:
    """float32 @words@ against float64 in plain PyTorch, relative to the largest number."""
    there = [g.to(DEVICE) if isinstance(g, Tensor) else g for g in given]
    wide = [g.double() if isinstance(g, Tensor) and g.is_floating_point() else g for g in given]
    ours, theirs = @ours@, getattr(kernels, f"{name}_plain")
    pairs = zip(results(ours(*there)), results(theirs(*wide)), strict=True)
    for number, (made, wanted) in enumerate(pairs):
        assert made.shape == wanted.shape, (name, number, made.shape, wanted.shape)
        error = (made.cpu().double() - wanted).abs().max() / wanted.abs().max().clamp(min=1)
        assert error < 1e-5, f"{name}, result {number}: off by {error:.2g}"
'''
ENDING = """
if __name__ == "__main__":
    for name, check in list(globals().items()):
        if name.startswith("test_"):
            check()
            print(f"{name.removeprefix('test_')} is right")
"""


def print_checks(
    kernels: Mapping[str, tuple[Group, Sequence[str]]], *, header: Sequence[str], by: str = TRITON
) -> str:
    text = Text()
    comparing = COMPARING.replace("@words@", WORDS[by]).replace("@ours@", OURS[by])
    text.lines += ['"""' + header[0], *header[1:], '"""']
    text.lines += [*BEGINNING[by].splitlines(), *comparing.splitlines()]
    for group, _ in kernels.values():
        text.blank(2)
        with text.block(f"def test_{group.name}() -> None:"):
            for one in (forward_of(group), backward_of(group)):
                if one is not None:
                    given = [_value(one, e) for _, e in one.reads]
                    given += [GIVEN[n] for n in one.scalars]
                    text.line(f'compare("{one.name}", {", ".join(given)})')
    text.blank(2)
    text.lines += ENDING.splitlines()
    return formatted(text.render(), "test_kernels.py")


def _value(one: Direction, e: Expr) -> str:
    whole, lead = _whole(one.group), len(one.group.whole) - 1
    found = one.input_of(e)
    if found is None:
        shape = (*whole[:-1], whole[-1] if e.columns else 1)
    elif found.node is not None:
        shape = _odd(shape_of(found.node), one.group.whole, whole, found.place.full)
    elif found.extra is not None and found.integer:
        first, stop = found.extra.per
        count = " * ".join(map(str, whole[first:stop])) or "1"
        step = f"{whole[-1]} * " if first and found.extra.drawn else ""
        return f"{step}torch.arange({count})"
    else:
        first, stop = found.place.first, found.place.stop
        shape = (*whole[first:stop], *[1] * (lead - stop), whole[-1])
    return f"normal({', '.join(map(str, shape))})"


def _whole(group: Group) -> Shape:
    turns = any(e.op == "turn" for e in forward_of(group).order)
    columns = HALVES if turns else COLUMNS
    return (*ODD[: len(group.whole) - 1], columns)


def _odd(shape: Shape, real: Shape, whole: Shape, full: bool) -> Shape:
    """An input's shape where the grid has these sizes."""
    behind = len(whole) - len(shape)
    pairs = zip(shape, real[behind:], whole[behind:], strict=True)
    return tuple(w if full or size == r else 1 for size, r, w in pairs)
