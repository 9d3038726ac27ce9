"""Seconds, operations and kept values of one operator at given local shapes: a roofline."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import lru_cache

from torch import fx

from llmspec.compiler.cost.hardware import Machine
from llmspec.compiler.graph import without_gradient
from llmspec.compiler.ops.registry import (
    REGISTRY,
    Choice,
    Entry,
    Kernel,
    Saved,
    Shapes,
    Tiled,
    entry_of,
    numel,
    shape_of,
    tensor_operands,
)
from llmspec.compiler.placement import local_shape

TILES = ((256, 128), (128, 128), (128, 64), (64, 64))
"""Output tiles that a matrix product may be cut into, best first, and what the smaller ones
reach."""
TILE_RATE = (1.0, 0.95, 0.80, 0.60)
BLOCKS_RAMP, KEYS_RAMP = 1.25, 256
"""Blocks of a fused kernel on each multiprocessor, and keys, at which half of its rate is reached.
FlashAttention-2's charts for A100 and H100 follow keys / (keys + 256) within 4 %, keys that a
causal mask hides not counted; SimuMax's shapes of few heads follow blocks / (blocks + 1.25 a
multiprocessor) within 15 %."""
ALIGNED_BYTES, MISALIGNED = 16, 0.5
"""Rows of operands and results that are no multiple of 16 bytes keep tensor cores waiting (NVIDIA,
Matrix Multiplication Background). Half: padding a vocabulary of 50257 to 50304 made GPT-2's step
a quarter faster (nanoGPT)."""
RAMP = 128
"""Depth of a product at which half of the multiprocessors' time goes into filling the pipe."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OperatorCost:
    """flops, backward_flops: executed; model_flops: forward, as the literature counts, products
    alone.
    """

    forward_s: float
    backward_s: float
    flops: float
    backward_flops: float
    model_flops: float
    saved: Saved
    working_bytes: int


def is_integer(node: fx.Node) -> bool:
    """Token ids, counters, choices, buffers: no gradient, the same on every tensor rank."""
    return without_gradient(node)


def local_shapes(node: fx.Node, choice: Choice, ranks: int) -> Shapes:
    operands = tuple(
        local_shape(shape_of(o), s, ranks)
        for o, s in zip(tensor_operands(node), choice.operands, strict=True)
    )
    return Shapes(operands, local_shape(shape_of(node), choice.result, ranks))


@lru_cache(maxsize=4096)
def tile_efficiency(
    rows: int, columns: int, depth: int, multiprocessors: int, groups: int = 1
) -> float:
    """The share of the achievable rate that `groups` outputs of rows × columns reach: whole tiles,
    whole waves over the multiprocessors, and a depth that hides the start."""
    if multiprocessors <= 1:
        return 1.0
    best = 0.0
    for (m, n), rate in zip(TILES, TILE_RATE, strict=True):
        tiles = groups * math.ceil(rows / m) * math.ceil(columns / n)
        waves = math.ceil(tiles / multiprocessors)
        filled = groups * rows * columns / (waves * multiprocessors * m * n)
        best = max(best, rate * filled)
    return best * depth / (depth + RAMP)


def product_s(flops: float, shapes: Shapes, machine: Machine, width: int, groups: int = 1) -> float:
    """`width`: bytes of an element. `groups`: products side by side that share the rows, one for
    each expert."""
    elements = max(numel(shapes.result), 1)
    columns = shapes.result[-1] if shapes.result else 1
    depth = max(int(flops / (2 * elements)), 1)
    rows = max(elements // columns // groups, 1)
    share = tile_efficiency(rows, columns, depth, machine.multiprocessors, groups)
    aligned = all(width * n % ALIGNED_BYTES == 0 for n in (columns, depth))
    share *= 1.0 if aligned or machine.multiprocessors <= 1 else MISALIGNED
    return flops / (machine.matrix_flops * max(share, 1e-3))


def tiled_s(flops: float, tiled: Tiled, machine: Machine) -> float:
    """Of a kernel that holds its product inside."""
    if machine.multiprocessors <= 1:
        return flops / machine.attention_flops
    busy = tiled.blocks / (tiled.blocks + BLOCKS_RAMP * machine.multiprocessors)
    long = tiled.depth / (tiled.depth + KEYS_RAMP)
    return flops / (machine.attention_flops * max(busy * long, 1e-3))


def _bytes(entry: Entry, node: fx.Node, shapes: Shapes, width: int) -> tuple[int, int, int]:
    """Bytes of (what is read, the result, gradients of the operands)."""
    result = width * numel(shapes.result)
    read = gradients = 0
    for operand, shape in zip(tensor_operands(node), shapes.operands, strict=True):
        if is_integer(operand):
            read += 8 * numel(shape)
            continue
        size = width * numel(shape)
        read += min(size, result) if entry.looks_up else size
        gradients += size
    return read, result, gradients


def in_bytes(saved: Saved, width: int) -> Saved:
    extra = saved.extra_bytes + width * (saved.extra_elements + saved.weight_elements)
    return replace(saved, extra_bytes=extra, extra_elements=0)


def kernels_s(kernels: Iterable[Kernel], machine: Machine, width: int) -> tuple[float, int]:
    """Seconds at the device's rates, and how many are launched."""
    total, launches = 0.0, 0
    for kernel in kernels:
        busy = kernel.moved / machine.memory_bytes_per_s
        if kernel.depth:
            made = Shapes((), (kernel.rows, kernel.columns))
            flops = 2.0 * kernel.rows * kernel.columns * kernel.depth
            busy = max(busy, product_s(flops, made, machine, width))
        total += kernel.count * busy
        launches += kernel.count
    return total, launches


def kept_by(entry: Entry, machine: Machine) -> Callable[[fx.Node, Shapes], Saved]:
    if entry.lean is not None and entry.lean[0] in machine.fused:
        return entry.lean[1]
    return entry.saved


def _overwritten(node: fx.Node, machine: Machine) -> bool:
    """Its gradient comes where its result was."""
    if not machine.fused or len(node.users) != 1:
        return False
    reader = next(iter(node.users))
    entry = REGISTRY.get(reader.target) if reader.op == "call_function" else None  # type: ignore[arg-type]
    return entry is not None and entry.overwrites in machine.fused


def operator_cost(node: fx.Node, shapes: Shapes, machine: Machine, width: int) -> OperatorCost:
    """`width`: bytes of an element in the compute type."""
    entry = entry_of(node)
    kept = kept_by(entry, machine)(node, shapes)
    saved = in_bytes(kept, width)
    moved = _bytes(entry, node, shapes, width)
    forward, backward = _seconds(node, shapes, machine, width, saved, moved)
    executed = entry.kernels is not None or (entry.contraction and not _joined(entry, node))
    flops = entry.flops(node, shapes) if executed else 0.0
    counted = entry.model_flops or entry.flops
    return OperatorCost(
        forward_s=forward,
        backward_s=backward,
        flops=flops,
        backward_flops=entry.backward_factor(node) * flops if executed else 0.0,
        model_flops=counted(node, shapes) if executed else 0.0,
        saved=saved,
        working_bytes=_working_bytes(node, shapes, machine, width, kept, moved),
    )


def _joined(entry: Entry, node: fx.Node) -> bool:
    return entry.joins is not None and entry.joins(node)


def _working_bytes(
    node: fx.Node,
    shapes: Shapes,
    machine: Machine,
    width: int,
    kept: Saved,
    moved: tuple[int, int, int],
) -> int:
    """Of the backward: what is made beside what was kept."""
    entry, (_, result, gradients) = entry_of(node), moved
    if entry.alias:
        return 0
    in_place = entry.overwrites in machine.fused
    working = 0 if _overwritten(node, machine) else result
    working += (0 if entry.makes_gradients or in_place else gradients) + kept.extra_bytes
    if entry.buffers is not None and not in_place:
        working += entry.buffers(node, shapes, width)
    return working


def _seconds(
    node: fx.Node,
    shapes: Shapes,
    machine: Machine,
    width: int,
    saved: Saved,
    moved: tuple[int, int, int],
) -> tuple[float, float]:
    """Forward and backward: of the slower of moving and computing."""
    entry, (read, result, gradients) = entry_of(node), moved
    if entry.alias:
        return 0.0, 0.0
    if entry.kernels is not None:
        forward, backward = entry.kernels(node, shapes, width)
        return (
            machine.forward_s(entry.name, *kernels_s(forward, machine, width)),
            machine.backward_s(entry.name, *kernels_s(backward, machine, width)),
        )
    if _joined(entry, node):
        return 0.0, machine.backward_s(entry.name, result / machine.memory_bytes_per_s)
    moving, back_moving = (
        (read + result + saved.extra_bytes, result + saved.extra_bytes + gradients)
        if entry.moved is None
        else entry.moved(node, shapes, width, machine.fused)
    )
    forward_rate, backward_rate = (r or machine.memory_bytes_per_s for r in entry.rates)
    moving_s, back_moving_s = moving / forward_rate, back_moving / backward_rate
    if entry.contraction:
        return _product_seconds(node, shapes, machine, width, moving_s, back_moving_s)
    vector_s = entry.flops(node, shapes) / machine.vector_flops
    return (
        machine.forward_s(entry.name, max(vector_s, moving_s)),
        machine.backward_s(entry.name, max(vector_s, back_moving_s)),
    )


def _product_seconds(
    node: fx.Node,
    shapes: Shapes,
    machine: Machine,
    width: int,
    moving_s: float,
    back_moving_s: float,
) -> tuple[float, float]:
    entry = entry_of(node)
    flops = entry.flops(node, shapes)
    groups = 1 if entry.groups is None else entry.groups(shapes)
    tiled = entry.tiled(node, shapes) if entry.tiled is not None else None
    if tiled is None:
        product = product_s(flops, shapes, machine, width, groups)
    else:
        product = tiled_s(flops, tiled, machine)
    # products side by side are short: nothing of one hides what it reads
    spent = max(product, moving_s) if groups == 1 else product + moving_s
    factor = entry.backward_factor(node)
    back = factor * spent
    if entry.moved is not None:
        back = max(factor * product, back_moving_s)
    return machine.forward_s(entry.name, spent), machine.backward_s(entry.name, back, factor)
