"""Weights of the library's GPT-2 and Llama families under the names that Hugging Face gives them.

Both directions are linear, so gradients translate as weights do.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Row:
    """One parameter there; here one, or several, joined along their output. `{}`: the layer.

    turned: theirs stands input first (GPT-2's Conv1D).
    """

    theirs: str
    ours: tuple[str, ...]
    turned: bool = False


def _row(theirs: str, *ours: str, turned: bool = False) -> Row:
    return Row(theirs, ours, turned)


_H = "transformer.h.{}"
GPT2: tuple[Row, ...] = (
    _row("transformer.wte.weight", "embed.table"),
    _row("transformer.wpe.weight", "embed.positions"),
    _row(f"{_H}.ln_1.weight", "layer.{}.layernorm.weight"),
    _row(f"{_H}.ln_1.bias", "layer.{}.layernorm.bias"),
    _row(f"{_H}.attn.c_attn.weight", *(f"layer.{{}}.attention.{n}" for n in "qkv"), turned=True),
    _row(f"{_H}.attn.c_attn.bias", *(f"layer.{{}}.attention.{n}_bias" for n in "qkv")),
    _row(f"{_H}.attn.c_proj.weight", "layer.{}.attention.out", turned=True),
    _row(f"{_H}.attn.c_proj.bias", "layer.{}.attention.out_bias"),
    _row(f"{_H}.ln_2.weight", "layer.{}.layernorm_2.weight"),
    _row(f"{_H}.ln_2.bias", "layer.{}.layernorm_2.bias"),
    _row(f"{_H}.mlp.c_fc.weight", "layer.{}.mlp.up", turned=True),
    _row(f"{_H}.mlp.c_fc.bias", "layer.{}.mlp.up_bias"),
    _row(f"{_H}.mlp.c_proj.weight", "layer.{}.mlp.down", turned=True),
    _row(f"{_H}.mlp.c_proj.bias", "layer.{}.mlp.down_bias"),
    _row("transformer.ln_f.weight", "layernorm.weight"),
    _row("transformer.ln_f.bias", "layernorm.bias"),
)

_L = "model.layers.{}"
LLAMA: tuple[Row, ...] = (
    _row("model.embed_tokens.weight", "embed.table"),
    _row(f"{_L}.input_layernorm.weight", "layer.{}.rmsnorm.weight"),
    _row(f"{_L}.self_attn.q_proj.weight", "layer.{}.attention.q"),
    _row(f"{_L}.self_attn.k_proj.weight", "layer.{}.attention.k"),
    _row(f"{_L}.self_attn.v_proj.weight", "layer.{}.attention.v"),
    _row(f"{_L}.self_attn.o_proj.weight", "layer.{}.attention.out"),
    _row(f"{_L}.post_attention_layernorm.weight", "layer.{}.rmsnorm_2.weight"),
    _row(f"{_L}.mlp.gate_proj.weight", "layer.{}.swiglu.gate"),
    _row(f"{_L}.mlp.up_proj.weight", "layer.{}.swiglu.up"),
    _row(f"{_L}.mlp.down_proj.weight", "layer.{}.swiglu.down"),
    _row("model.norm.weight", "rmsnorm.weight"),
    _row("lm_head.weight", "unembed.table"),
)

NO_WEIGHTS = re.compile(r".*\.(attn\.bias|attn\.masked_bias|rotary_emb\.inv_freq)")
"""Buffers that older checkpoints hold."""


def _numbered(name: str) -> tuple[str, str]:
    """A name with `{}` for its layer's number, and the number."""
    found = re.fullmatch(r"((?:transformer\.h|model\.layers|layer)\.)(\d+)(\..*)", name)
    return (f"{found[1]}{{}}{found[3]}", found[2]) if found else (name, "")


def to_huggingface(named: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Their names for the library's. A tied head is not listed twice.

    Errors: ValueError, naming the parameter, for a model of neither family.
    """
    rows = GPT2 if "embed.positions" in named else LLAMA
    place = {ours: (row, i) for row in rows for i, ours in enumerate(row.ours)}
    parts: dict[tuple[Row, str], dict[int, Tensor]] = {}
    for name, tensor in named.items():
        general, layer = _numbered(name)
        if general not in place:
            raise ValueError(f"`{name}` has no name in Hugging Face's GPT-2 or Llama")
        row, i = place[general]
        parts.setdefault((row, layer), {})[i] = tensor
    out: dict[str, Tensor] = {}
    for (row, layer), found in parts.items():
        missing = [ours for i, ours in enumerate(row.ours) if i not in found]
        if missing:
            raise ValueError(f"`{missing[0].format(layer)}` is missing")
        joined = torch.cat([found[i] for i in range(len(row.ours))])
        out[row.theirs.format(layer)] = joined.T.contiguous() if row.turned else joined
    return out


def from_huggingface(named: Mapping[str, Tensor], *, tied: bool = False) -> dict[str, Tensor]:
    """The library's names for theirs; GPT-2's may lack `transformer.`, as its checkpoints do.

    tied: the head is the embedding's table (GPT-2's always is), a `lm_head.weight` is left out.
    Errors: ValueError, naming the parameter, for a model of neither family.
    """
    llama = any(name.startswith("model.") for name in named)
    rows = LLAMA if llama else GPT2
    place = {row.theirs: row for row in rows}
    out: dict[str, Tensor] = {}
    for name, tensor in named.items():
        if NO_WEIGHTS.fullmatch(name) or (name == "lm_head.weight" and (tied or not llama)):
            continue
        known = name if llama or name.startswith("transformer.") else f"transformer.{name}"
        general, layer = _numbered(known)
        if general not in place:
            raise ValueError(f"`{name}` is no weight of a GPT-2 or a Llama")
        row = place[general]
        straight = tensor.T.contiguous() if row.turned else tensor
        parts = straight.chunk(len(row.ours))
        out |= {o.format(layer): p for o, p in zip(row.ours, parts, strict=True)}
    return out
