"""Emitted by llmspec from llama_kernels.llmspec. Spec fff24e7f24c9, plan 78b9b4.
Change the spec or the plan, then: llmspec compile llama_kernels.llmspec

Operators that one kernel computes together. Each is here twice: in plain PyTorch, which
CPUs run and test_kernels.py compares with, and in Triton, which GPUs run. Backwards are
derived from the operators' derivatives. Numbers are float32 inside, or wider. Rows are
all dimensions but the last one: columns.
Tiles are by rule (runtime/fused.py); `llmspec tune` measures others.
"""

from __future__ import annotations

import torch
from torch import Tensor

from runtime.fused import flat, jit, operator, tl, turned, whole_rows, wide

# --------------------------------------------------------------------------------------------------
# rmsnorm: `layer`, library/llama.llmspec:10; `last`, library/llama.llmspec:13
#
#   x [B, t, D]; weight [D] -> normed [B, t, D]
#   forward moves 128 MiB: 0.0518 ms predicted, bound by memory
#   backward moves 192 MiB: 0.0777 ms predicted, bound by memory
#   kept for the backward: x, weight


def rmsnorm_plain(x: Tensor, weight: Tensor) -> Tensor:
    kind = x.dtype
    x = wide(x)
    weight = wide(weight)
    scale = torch.rsqrt((x * x).mean(-1, keepdim=True) + 1e-05)
    unit = x * scale
    normed = unit * weight
    return normed.to(kind)


@jit()
def rmsnorm_kernel(
    x_ptr,
    weight_ptr,
    normed_ptr,
    rows,
    COLUMNS: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    TILE_COLUMNS: tl.constexpr,
):
    column = tl.arange(0, TILE_COLUMNS)[None, :]
    weight = tl.load(weight_ptr + column, mask=column < COLUMNS, other=0.0).to(tl.float32)
    row = tl.program_id(0) * TILE_ROWS + tl.arange(0, TILE_ROWS)[:, None]
    inside = (row < rows) & (column < COLUMNS)
    at = row.to(tl.int64) * COLUMNS + column
    x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(x * x, axis=1)[:, None] / COLUMNS + 1e-05)
    unit = x * scale
    normed = unit * weight
    tl.store(normed_ptr + at, normed, mask=inside)


def rmsnorm_triton(x: Tensor, weight: Tensor) -> Tensor:
    x = x.contiguous()
    rows, columns = x.shape[:-1].numel(), x.shape[-1]
    tile = whole_rows(columns)
    grid = tile.grid(rows)
    normed = torch.empty_like(x)
    rmsnorm_kernel[grid](x, weight, normed, rows, COLUMNS=columns, **tile.options)
    return normed


def rmsnorm_backward_plain(d_normed: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    kind = d_normed.dtype
    d_normed = wide(d_normed)
    x = wide(x)
    weight = wide(weight)
    inner = d_normed * weight
    scale = torch.rsqrt((x * x).mean(-1, keepdim=True) + 1e-05)
    unit = x * scale
    along = (inner * unit).mean(-1, keepdim=True)
    d_x = (inner - unit * along) * scale
    d_weight = (d_normed * unit).flatten(0, -2).sum(0)
    return d_x.to(kind), d_weight


@jit()
def rmsnorm_backward_kernel(
    d_normed_ptr,
    x_ptr,
    weight_ptr,
    d_x_ptr,
    d_weight_ptr,
    rows,
    COLUMNS: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    TILE_COLUMNS: tl.constexpr,
    STAGES: tl.constexpr,
):
    column = tl.arange(0, TILE_COLUMNS)[None, :]
    weight = tl.load(weight_ptr + column, mask=column < COLUMNS, other=0.0).to(tl.float32)
    d_weight = tl.zeros((1, TILE_COLUMNS), tl.float32)
    for first in tl.range(
        tl.program_id(0) * TILE_ROWS, rows, tl.num_programs(0) * TILE_ROWS, num_stages=STAGES
    ):
        row = first + tl.arange(0, TILE_ROWS)[:, None]
        inside = (row < rows) & (column < COLUMNS)
        at = row.to(tl.int64) * COLUMNS + column
        d_normed = tl.load(d_normed_ptr + at, mask=inside, other=0.0).to(tl.float32)
        x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
        inner = d_normed * weight
        scale = tl.rsqrt(tl.sum(x * x, axis=1)[:, None] / COLUMNS + 1e-05)
        unit = x * scale
        along = tl.sum(inner * unit, axis=1)[:, None] / COLUMNS
        d_x = (inner - unit * along) * scale
        d_weight += tl.sum(d_normed * unit, axis=0)[None, :]
        tl.store(d_x_ptr + at, d_x, mask=inside)
    tl.store(d_weight_ptr + tl.program_id(0) * COLUMNS + column, d_weight, mask=column < COLUMNS)


def rmsnorm_backward_triton(d_normed: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    d_normed = d_normed.contiguous()
    x = x.contiguous()
    rows, columns = d_normed.shape[:-1].numel(), d_normed.shape[-1]
    tile = whole_rows(columns)
    grid = tile.sums(rows, d_normed.device)
    d_x = torch.empty_like(d_normed)
    d_weight = d_normed.new_empty(grid[0], columns, dtype=torch.float32)
    rmsnorm_backward_kernel[grid](
        d_normed,
        x,
        weight,
        d_x,
        d_weight,
        rows,
        STAGES=tile.stages,
        COLUMNS=columns,
        **tile.options,
    )
    return d_x, d_weight.sum(0)


rmsnorm_backward = operator("rmsnorm_backward", rmsnorm_backward_plain, rmsnorm_backward_triton)


def _keep_rmsnorm(ctx, inputs, output) -> None:
    x, weight = inputs
    ctx.save_for_backward(x, weight)


def _rmsnorm_gradients(ctx, d_normed):
    x, weight = ctx.saved_tensors
    d_x, d_weight = rmsnorm_backward(d_normed, x, weight)
    return d_x, d_weight


rmsnorm = operator("rmsnorm", rmsnorm_plain, rmsnorm_triton, _rmsnorm_gradients, _keep_rmsnorm)


# --------------------------------------------------------------------------------------------------
# rotary: `layer`, library/llama.llmspec:10
#
#   x [B, T, h, E] -> result [B, T, h, E]
#   forward moves 132 MiB: 0.0534 ms predicted, bound by memory
#   backward moves 132 MiB: 0.0534 ms predicted, bound by memory
#   kept for the backward: cos, sin


def rotary_plain(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    kind = x.dtype
    x = wide(x)
    cos = wide(cos)
    sin = wide(sin)
    result = x * cos + turned(x) * sin
    return result.to(kind)


@jit()
def rotary_kernel(
    x_ptr,
    cos_ptr,
    sin_ptr,
    result_ptr,
    rows,
    HEADS: tl.constexpr,
    TOKENS: tl.constexpr,
    COLUMNS: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    TILE_COLUMNS: tl.constexpr,
):
    column = tl.program_id(1) * TILE_COLUMNS + tl.arange(0, TILE_COLUMNS)[None, :]
    row = tl.program_id(0) * TILE_ROWS + tl.arange(0, TILE_ROWS)[:, None]
    inside = (row < rows) & (column < COLUMNS)
    at = row.to(tl.int64) * COLUMNS + column
    x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
    cos = tl.load(
        cos_ptr + ((row // HEADS) % TOKENS) * COLUMNS + column, mask=inside, other=0.0
    ).to(tl.float32)
    sin = tl.load(
        sin_ptr + ((row // HEADS) % TOKENS) * COLUMNS + column, mask=inside, other=0.0
    ).to(tl.float32)
    # the other half of the row; what comes from the upper one changes its sign
    other = (column + COLUMNS // 2) % COLUMNS
    sign = tl.where(column < COLUMNS // 2, -1.0, 1.0)
    turned_x = sign * tl.load(
        x_ptr + row.to(tl.int64) * COLUMNS + other, mask=inside, other=0.0
    ).to(tl.float32)
    result = x * cos + turned_x * sin
    tl.store(result_ptr + at, result, mask=inside)


def rotary_triton(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    x = x.contiguous()
    cos = cos.contiguous()
    sin = sin.contiguous()
    rows, columns = x.shape[:-1].numel(), x.shape[-1]
    tile = flat(columns)
    grid = tile.grid(rows)
    result = torch.empty_like(x)
    rotary_kernel[grid](
        x,
        cos,
        sin,
        result,
        rows,
        HEADS=x.shape[2],
        TOKENS=x.shape[1],
        COLUMNS=columns,
        **tile.options,
    )
    return result


def rotary_backward_plain(d_result: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    kind = d_result.dtype
    d_result = wide(d_result)
    cos = wide(cos)
    sin = wide(sin)
    d_x = d_result * cos - turned(d_result) * sin
    return d_x.to(kind)


@jit()
def rotary_backward_kernel(
    d_result_ptr,
    cos_ptr,
    sin_ptr,
    d_x_ptr,
    rows,
    HEADS: tl.constexpr,
    TOKENS: tl.constexpr,
    COLUMNS: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    TILE_COLUMNS: tl.constexpr,
):
    column = tl.program_id(1) * TILE_COLUMNS + tl.arange(0, TILE_COLUMNS)[None, :]
    row = tl.program_id(0) * TILE_ROWS + tl.arange(0, TILE_ROWS)[:, None]
    inside = (row < rows) & (column < COLUMNS)
    at = row.to(tl.int64) * COLUMNS + column
    d_result = tl.load(d_result_ptr + at, mask=inside, other=0.0).to(tl.float32)
    cos = tl.load(
        cos_ptr + ((row // HEADS) % TOKENS) * COLUMNS + column, mask=inside, other=0.0
    ).to(tl.float32)
    sin = tl.load(
        sin_ptr + ((row // HEADS) % TOKENS) * COLUMNS + column, mask=inside, other=0.0
    ).to(tl.float32)
    # the other half of the row; what comes from the upper one changes its sign
    other = (column + COLUMNS // 2) % COLUMNS
    sign = tl.where(column < COLUMNS // 2, -1.0, 1.0)
    turned_d_result = sign * tl.load(
        d_result_ptr + row.to(tl.int64) * COLUMNS + other, mask=inside, other=0.0
    ).to(tl.float32)
    d_x = d_result * cos - turned_d_result * sin
    tl.store(d_x_ptr + at, d_x, mask=inside)


def rotary_backward_triton(d_result: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    d_result = d_result.contiguous()
    cos = cos.contiguous()
    sin = sin.contiguous()
    rows, columns = d_result.shape[:-1].numel(), d_result.shape[-1]
    tile = flat(columns)
    grid = tile.grid(rows)
    d_x = torch.empty_like(d_result)
    rotary_backward_kernel[grid](
        d_result,
        cos,
        sin,
        d_x,
        rows,
        HEADS=d_result.shape[2],
        TOKENS=d_result.shape[1],
        COLUMNS=columns,
        **tile.options,
    )
    return d_x


rotary_backward = operator("rotary_backward", rotary_backward_plain, rotary_backward_triton)


def _keep_rotary(ctx, inputs, output) -> None:
    _, cos, sin = inputs
    ctx.save_for_backward()
    ctx.extras = cos, sin


def _rotary_gradients(ctx, d_result):
    cos, sin = ctx.extras
    d_x = rotary_backward(d_result, cos, sin)
    return d_x, None, None


rotary = operator("rotary", rotary_plain, rotary_triton, _rotary_gradients, _keep_rotary)


# --------------------------------------------------------------------------------------------------
# residual_rmsnorm: `layer`, library/llama.llmspec:13
#
#   x, out [B, t, D]; weight [D] -> x_2, normed [B, t, D]
#   forward moves 256 MiB: 0.104 ms predicted, bound by memory
#   backward moves 256 MiB: 0.104 ms predicted, bound by memory
#   kept for the backward: weight, x_2


def residual_rmsnorm_plain(x: Tensor, out: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    kind = x.dtype
    x = wide(x)
    out = wide(out)
    weight = wide(weight)
    x_2 = x + out
    scale = torch.rsqrt((x_2 * x_2).mean(-1, keepdim=True) + 1e-05)
    unit = x_2 * scale
    normed = unit * weight
    return x_2.to(kind), normed.to(kind)


@jit()
def residual_rmsnorm_kernel(
    x_ptr,
    out_ptr,
    weight_ptr,
    x_2_ptr,
    normed_ptr,
    rows,
    COLUMNS: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    TILE_COLUMNS: tl.constexpr,
):
    column = tl.arange(0, TILE_COLUMNS)[None, :]
    weight = tl.load(weight_ptr + column, mask=column < COLUMNS, other=0.0).to(tl.float32)
    row = tl.program_id(0) * TILE_ROWS + tl.arange(0, TILE_ROWS)[:, None]
    inside = (row < rows) & (column < COLUMNS)
    at = row.to(tl.int64) * COLUMNS + column
    x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
    out = tl.load(out_ptr + at, mask=inside, other=0.0).to(tl.float32)
    x_2 = x + out
    scale = tl.rsqrt(tl.sum(x_2 * x_2, axis=1)[:, None] / COLUMNS + 1e-05)
    unit = x_2 * scale
    normed = unit * weight
    tl.store(x_2_ptr + at, x_2, mask=inside)
    tl.store(normed_ptr + at, normed, mask=inside)


def residual_rmsnorm_triton(x: Tensor, out: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    x = x.contiguous()
    out = out.contiguous()
    rows, columns = x.shape[:-1].numel(), x.shape[-1]
    tile = whole_rows(columns)
    grid = tile.grid(rows)
    x_2 = torch.empty_like(x)
    normed = torch.empty_like(x)
    residual_rmsnorm_kernel[grid](
        x, out, weight, x_2, normed, rows, COLUMNS=columns, **tile.options
    )
    return x_2, normed


def residual_rmsnorm_backward_plain(
    d_x_2: Tensor, d_normed: Tensor, x_2: Tensor, weight: Tensor
) -> tuple[Tensor, Tensor]:
    kind = d_x_2.dtype
    d_x_2 = wide(d_x_2)
    d_normed = wide(d_normed)
    x_2 = wide(x_2)
    weight = wide(weight)
    inner = d_normed * weight
    scale = torch.rsqrt((x_2 * x_2).mean(-1, keepdim=True) + 1e-05)
    unit = x_2 * scale
    along = (inner * unit).mean(-1, keepdim=True)
    d_x = d_x_2 + (inner - unit * along) * scale
    d_weight = (d_normed * unit).flatten(0, -2).sum(0)
    return d_x.to(kind), d_weight


@jit()
def residual_rmsnorm_backward_kernel(
    d_x_2_ptr,
    d_normed_ptr,
    x_2_ptr,
    weight_ptr,
    d_x_ptr,
    d_weight_ptr,
    rows,
    COLUMNS: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    TILE_COLUMNS: tl.constexpr,
    STAGES: tl.constexpr,
):
    column = tl.arange(0, TILE_COLUMNS)[None, :]
    weight = tl.load(weight_ptr + column, mask=column < COLUMNS, other=0.0).to(tl.float32)
    d_weight = tl.zeros((1, TILE_COLUMNS), tl.float32)
    for first in tl.range(
        tl.program_id(0) * TILE_ROWS, rows, tl.num_programs(0) * TILE_ROWS, num_stages=STAGES
    ):
        row = first + tl.arange(0, TILE_ROWS)[:, None]
        inside = (row < rows) & (column < COLUMNS)
        at = row.to(tl.int64) * COLUMNS + column
        d_x_2 = tl.load(d_x_2_ptr + at, mask=inside, other=0.0).to(tl.float32)
        d_normed = tl.load(d_normed_ptr + at, mask=inside, other=0.0).to(tl.float32)
        x_2 = tl.load(x_2_ptr + at, mask=inside, other=0.0).to(tl.float32)
        inner = d_normed * weight
        scale = tl.rsqrt(tl.sum(x_2 * x_2, axis=1)[:, None] / COLUMNS + 1e-05)
        unit = x_2 * scale
        along = tl.sum(inner * unit, axis=1)[:, None] / COLUMNS
        d_x = d_x_2 + (inner - unit * along) * scale
        d_weight += tl.sum(d_normed * unit, axis=0)[None, :]
        tl.store(d_x_ptr + at, d_x, mask=inside)
    tl.store(d_weight_ptr + tl.program_id(0) * COLUMNS + column, d_weight, mask=column < COLUMNS)


def residual_rmsnorm_backward_triton(
    d_x_2: Tensor, d_normed: Tensor, x_2: Tensor, weight: Tensor
) -> tuple[Tensor, Tensor]:
    d_x_2 = d_x_2.contiguous()
    d_normed = d_normed.contiguous()
    x_2 = x_2.contiguous()
    rows, columns = d_x_2.shape[:-1].numel(), d_x_2.shape[-1]
    tile = whole_rows(columns)
    grid = tile.sums(rows, d_x_2.device)
    d_x = torch.empty_like(d_x_2)
    d_weight = d_x_2.new_empty(grid[0], columns, dtype=torch.float32)
    residual_rmsnorm_backward_kernel[grid](
        d_x_2,
        d_normed,
        x_2,
        weight,
        d_x,
        d_weight,
        rows,
        STAGES=tile.stages,
        COLUMNS=columns,
        **tile.options,
    )
    return d_x, d_weight.sum(0)


residual_rmsnorm_backward = operator(
    "residual_rmsnorm_backward", residual_rmsnorm_backward_plain, residual_rmsnorm_backward_triton
)


def _keep_residual_rmsnorm(ctx, inputs, output) -> None:
    _, _, weight = inputs
    x_2, _ = output
    ctx.save_for_backward(x_2, weight)


def _residual_rmsnorm_gradients(ctx, d_x_2, d_normed):
    x_2, weight = ctx.saved_tensors
    d_x, d_weight = residual_rmsnorm_backward(d_x_2, d_normed, x_2, weight)
    return d_x, d_x, d_weight


residual_rmsnorm = operator(
    "residual_rmsnorm",
    residual_rmsnorm_plain,
    residual_rmsnorm_triton,
    _residual_rmsnorm_gradients,
    _keep_residual_rmsnorm,
)


# --------------------------------------------------------------------------------------------------
# silu_gate: `layer`, library/llama.llmspec:11
#
#   gate, up [B, T, f] -> hidden [B, T, f]
#   forward moves 672 MiB: 0.272 ms predicted, bound by memory
#   backward moves 1.09 GiB: 0.453 ms predicted, bound by memory
#   kept for the backward: gate, up


def silu_gate_plain(gate: Tensor, up: Tensor) -> Tensor:
    kind = gate.dtype
    gate = wide(gate)
    up = wide(up)
    sigmoid = torch.sigmoid(gate)
    gate_2 = gate * sigmoid
    hidden = gate_2 * up
    return hidden.to(kind)


@jit()
def silu_gate_kernel(
    gate_ptr,
    up_ptr,
    hidden_ptr,
    rows,
    COLUMNS: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    TILE_COLUMNS: tl.constexpr,
):
    column = tl.program_id(1) * TILE_COLUMNS + tl.arange(0, TILE_COLUMNS)[None, :]
    row = tl.program_id(0) * TILE_ROWS + tl.arange(0, TILE_ROWS)[:, None]
    inside = (row < rows) & (column < COLUMNS)
    at = row.to(tl.int64) * COLUMNS + column
    gate = tl.load(gate_ptr + at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + at, mask=inside, other=0.0).to(tl.float32)
    sigmoid = tl.sigmoid(gate)
    gate_2 = gate * sigmoid
    hidden = gate_2 * up
    tl.store(hidden_ptr + at, hidden, mask=inside)


def silu_gate_triton(gate: Tensor, up: Tensor) -> Tensor:
    gate = gate.contiguous()
    up = up.contiguous()
    rows, columns = gate.shape[:-1].numel(), gate.shape[-1]
    tile = flat(columns)
    grid = tile.grid(rows)
    hidden = torch.empty_like(gate)
    silu_gate_kernel[grid](gate, up, hidden, rows, COLUMNS=columns, **tile.options)
    return hidden


def silu_gate_backward_plain(d_hidden: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    kind = d_hidden.dtype
    d_hidden = wide(d_hidden)
    gate = wide(gate)
    up = wide(up)
    sigmoid = torch.sigmoid(gate)
    d_gate = d_hidden * up * sigmoid * (1 + gate * (1 - sigmoid))
    gate_2 = gate * sigmoid
    d_up = d_hidden * gate_2
    return d_gate.to(kind), d_up.to(kind)


@jit()
def silu_gate_backward_kernel(
    d_hidden_ptr,
    gate_ptr,
    up_ptr,
    d_gate_ptr,
    d_up_ptr,
    rows,
    COLUMNS: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    TILE_COLUMNS: tl.constexpr,
):
    column = tl.program_id(1) * TILE_COLUMNS + tl.arange(0, TILE_COLUMNS)[None, :]
    row = tl.program_id(0) * TILE_ROWS + tl.arange(0, TILE_ROWS)[:, None]
    inside = (row < rows) & (column < COLUMNS)
    at = row.to(tl.int64) * COLUMNS + column
    d_hidden = tl.load(d_hidden_ptr + at, mask=inside, other=0.0).to(tl.float32)
    gate = tl.load(gate_ptr + at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + at, mask=inside, other=0.0).to(tl.float32)
    sigmoid = tl.sigmoid(gate)
    d_gate = d_hidden * up * sigmoid * (1 + gate * (1 - sigmoid))
    gate_2 = gate * sigmoid
    d_up = d_hidden * gate_2
    tl.store(d_gate_ptr + at, d_gate, mask=inside)
    tl.store(d_up_ptr + at, d_up, mask=inside)


def silu_gate_backward_triton(d_hidden: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    d_hidden = d_hidden.contiguous()
    gate = gate.contiguous()
    up = up.contiguous()
    rows, columns = d_hidden.shape[:-1].numel(), d_hidden.shape[-1]
    tile = flat(columns)
    grid = tile.grid(rows)
    d_gate = torch.empty_like(d_hidden)
    d_up = torch.empty_like(d_hidden)
    silu_gate_backward_kernel[grid](
        d_hidden, gate, up, d_gate, d_up, rows, COLUMNS=columns, **tile.options
    )
    return d_gate, d_up


silu_gate_backward = operator(
    "silu_gate_backward", silu_gate_backward_plain, silu_gate_backward_triton
)


def _keep_silu_gate(ctx, inputs, output) -> None:
    gate, up = inputs
    ctx.save_for_backward(gate, up)


def _silu_gate_gradients(ctx, d_hidden):
    gate, up = ctx.saved_tensors
    d_gate, d_up = silu_gate_backward(d_hidden, gate, up)
    return d_gate, d_up


silu_gate = operator(
    "silu_gate", silu_gate_plain, silu_gate_triton, _silu_gate_gradients, _keep_silu_gate
)
