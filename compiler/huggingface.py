"""Weights of the library's families under the names that Hugging Face's models give them.

Both directions are linear, so gradients translate as weights do.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Row:
    """One parameter there; here one, or several, joined. `{}`: the layer.

    turned: theirs stands input first (GPT-2's Conv1D).
    join: how ours are joined: along their output by default.
    """

    theirs: str
    ours: tuple[str, ...]
    turned: bool = False
    join: Join | None = None


@dataclass(frozen=True, slots=True)
class Join:
    """together: ours to theirs. apart: theirs to ours. Both get the sizes of latent attention."""

    together: Callable[[list[Tensor], Latent], Tensor]
    apart: Callable[[Tensor, Latent], list[Tensor]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Latent:
    """Sizes of latent attention; zeros in a model without."""

    heads: int = 0
    rope: int = 0
    value: int = 0


# --------------------------------------------------------------------------------------------------
# Joins


def in_pairs(x: Tensor) -> Tensor:
    """Rows of […, R, I] that turn with the one R / 2 further on, moved to stand beside it."""
    return x.unflatten(-2, (2, -1)).transpose(-3, -2).flatten(-3, -2)


def in_halves(x: Tensor) -> Tensor:
    return x.unflatten(-2, (-1, 2)).transpose(-3, -2).flatten(-3, -2)


def _queries(parts: list[Tensor], sizes: Latent) -> Tensor:
    plain, turned = (p.unflatten(0, (sizes.heads, -1)) for p in parts)
    return torch.cat([plain, in_pairs(turned)], 1).flatten(0, 1)


def _queries_apart(x: Tensor, sizes: Latent) -> list[Tensor]:
    heads = x.unflatten(0, (sizes.heads, -1))
    plain, turned = heads[:, : -sizes.rope], heads[:, -sizes.rope :]
    return [plain.flatten(0, 1), in_halves(turned).flatten(0, 1)]


def _values(parts: list[Tensor], sizes: Latent) -> Tensor:
    return torch.cat([p.unflatten(0, (sizes.heads, -1)) for p in parts], 1).flatten(0, 1)


def _values_apart(x: Tensor, sizes: Latent) -> list[Tensor]:
    heads = x.unflatten(0, (sizes.heads, -1))
    return [p.flatten(0, 1) for p in (heads[:, : -sizes.value], heads[:, -sizes.value :])]


HEADS_OF_QUERIES = Join(_queries, _queries_apart)
HEADS_OF_VALUES = Join(_values, _values_apart)
DOWN = Join(
    lambda parts, sizes: torch.cat([parts[0], in_pairs(parts[1])]),
    lambda x, sizes: [x[: -sizes.rope], in_halves(x[-sizes.rope :])],
)
EXPERTS = Join(lambda parts, _: torch.cat(parts, 1), lambda x, _: list(x.chunk(2, 1)))


# --------------------------------------------------------------------------------------------------
# Tables


def _row(theirs: str, *ours: str, turned: bool = False, join: Join | None = None) -> Row:
    return Row(theirs, ours, turned, join)


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
_ENDS = (
    _row("model.embed_tokens.weight", "embed.table"),
    _row("model.norm.weight", "rmsnorm.weight"),
    _row("lm_head.weight", "unembed.table"),
)


def _gated(theirs: str, ours: str) -> tuple[Row, ...]:
    return tuple(
        _row(f"{_L}.{theirs}.{n}_proj.weight", f"layer.{{}}.{ours}.{n}")
        for n in ("gate", "up", "down")
    )


_MIXTURE = (
    _row(f"{_L}.mlp.gate.weight", "layer.{}.moe.router"),
    _row(f"{_L}.mlp.gate.e_score_correction_bias", "layer.{}.moe.bias"),
    _row(
        f"{_L}.mlp.experts.gate_up_proj",
        "layer.{}.moe.experts.gate",
        "layer.{}.moe.experts.up",
        join=EXPERTS,
    ),
    _row(f"{_L}.mlp.experts.down_proj", "layer.{}.moe.experts.down"),
    *_gated("mlp.shared_experts", "moe.shared"),
    *_gated("mlp", "swiglu"),
)
LLAMA: tuple[Row, ...] = (
    *_ENDS,
    _row(f"{_L}.input_layernorm.weight", "layer.{}.rmsnorm.weight"),
    *(
        _row(f"{_L}.self_attn.{theirs}_proj.weight", f"layer.{{}}.attention.{ours}")
        for theirs, ours in (("q", "q"), ("k", "k"), ("v", "v"), ("o", "out"))
    ),
    *(
        _row(f"{_L}.self_attn.{n}_norm.weight", f"layer.{{}}.attention.{n}_norm.weight")
        for n in "qk"
    ),
    _row(f"{_L}.post_attention_layernorm.weight", "layer.{}.rmsnorm_2.weight"),
    *_MIXTURE,
)
"""Llama, and what is built as it is but for its experts: Mixtral, Qwen3's mixtures."""


def _latent(queries: str) -> tuple[Row, ...]:
    """DeepSeek's. queries: what the projection that gives all heads' queries is called."""
    ours, theirs = "layer.{}.attend.latent_attention", f"{_L}.self_attn"
    return (
        *_ENDS,
        _row(f"{_L}.input_layernorm.weight", "layer.{}.attend.rmsnorm.weight"),
        _row(f"{theirs}.q_a_proj.weight", f"{ours}.q_down"),
        _row(f"{theirs}.q_a_layernorm.weight", f"{ours}.q_norm.weight"),
        _row(f"{theirs}.{queries}.weight", f"{ours}.q", f"{ours}.q_rope", join=HEADS_OF_QUERIES),
        _row(f"{theirs}.{DOWN_PROJECTION}", f"{ours}.kv_down", f"{ours}.k_rope", join=DOWN),
        _row(f"{theirs}.kv_a_layernorm.weight", f"{ours}.kv_norm.weight"),
        _row(f"{theirs}.kv_b_proj.weight", f"{ours}.k", f"{ours}.v", join=HEADS_OF_VALUES),
        _row(f"{theirs}.o_proj.weight", f"{ours}.out"),
        _row(f"{_L}.post_attention_layernorm.weight", "layer.{}.rmsnorm.weight"),
        *_MIXTURE,
    )


DOWN_PROJECTION = "kv_a_proj_with_mqa.weight"
DEEPSEEK, DEEPSEEK_WHOLE_QUERIES = _latent("q_b_proj"), _latent("q_proj")

NO_WEIGHTS = re.compile(r".*\.(attn\.bias|attn\.masked_bias|rotary_emb\.inv_freq)")
"""Buffers that older checkpoints hold."""
COUNTS = re.compile(r".*\.moe\.load")
"""Buffers that nobody else has."""


# --------------------------------------------------------------------------------------------------
# Both ways


def _numbered(name: str) -> tuple[str, str]:
    """A name with `{}` for its layer's number, and the number."""
    found = re.fullmatch(r"((?:transformer\.h|model\.layers|layer)\.)(\d+)(\..*)", name)
    return (f"{found[1]}{{}}{found[3]}", found[2]) if found else (name, "")


def _in_one_row(named: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Ours with all layers counted as one row: the dense ones that come first, then the others."""
    dense = {n.split(".")[1] for n in named if n.startswith("first_layer.")}

    def moved(name: str) -> str:
        head, _, rest = name.partition(".")
        if head == "first_layer":
            return f"layer.{rest}"
        general, layer = _numbered(name)
        return general.format(int(layer) + len(dense)) if layer else name

    return {moved(name): tensor for name, tensor in named.items()}


def _own_layer(name: str, dense: int) -> str:
    """The other way round."""
    general, layer = _numbered(name)
    if not layer or not dense:
        return name
    if int(layer) < dense:
        return f"first_{general.format(layer)}"
    return general.format(int(layer) - dense)


def to_huggingface(named: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Their names for the library's. A tied head is not listed twice.

    Errors: ValueError, naming the parameter, for a model of no family of the library.
    """
    latent = [name for name in named if name.endswith("latent_attention.q_rope")]
    rows = GPT2 if "embed.positions" in named else LLAMA
    if latent:
        low = latent[0].replace("q_rope", "q_down") in named
        rows = DEEPSEEK if low else DEEPSEEK_WHOLE_QUERIES
    sizes = _our_sizes(named, latent[0]) if latent else Latent()
    place = {ours: (row, i) for row in rows for i, ours in enumerate(row.ours)}
    parts: dict[tuple[Row, str], dict[int, Tensor]] = {}
    for name, tensor in _in_one_row(named).items():
        general, layer = _numbered(name)
        if COUNTS.fullmatch(name):
            continue
        if general not in place:
            raise ValueError(f"`{name}` has no name in Hugging Face's GPT-2, Llama or mixtures")
        row, i = place[general]
        parts.setdefault((row, layer), {})[i] = tensor
    out: dict[str, Tensor] = {}
    for (row, layer), found in parts.items():
        missing = [ours for i, ours in enumerate(row.ours) if i not in found]
        if missing:
            raise ValueError(f"`{missing[0].format(layer)}` is missing")
        ordered = [found[i] for i in range(len(row.ours))]
        joined = row.join.together(ordered, sizes) if row.join else torch.cat(ordered)
        out[row.theirs.format(layer)] = joined.T.contiguous() if row.turned else joined
    return out


def from_huggingface(named: Mapping[str, Tensor], *, tied: bool = False) -> dict[str, Tensor]:
    """The library's names for theirs; GPT-2's may lack `transformer.`, as its checkpoints do.

    tied: the head is the embedding's table (GPT-2's always is), a `lm_head.weight` is left out.
    Errors: ValueError, naming the parameter, for a model of no family of the library.
    """
    llama = any(name.startswith("model.") for name in named)
    latent = [name for name in named if name.endswith(DOWN_PROJECTION)]
    rows = LLAMA if llama else GPT2
    if latent:
        whole = latent[0].replace(DOWN_PROJECTION, "q_proj.weight") in named
        rows = DEEPSEEK_WHOLE_QUERIES if whole else DEEPSEEK
    sizes = _their_sizes(named, latent[0]) if latent else Latent()
    dense = sum(name.endswith(".mlp.gate_proj.weight") for name in named) if latent else 0
    place = {row.theirs: row for row in rows}
    out: dict[str, Tensor] = {}
    for name, tensor in named.items():
        if NO_WEIGHTS.fullmatch(name) or (name == "lm_head.weight" and (tied or not llama)):
            continue
        known = name if llama or name.startswith("transformer.") else f"transformer.{name}"
        general, layer = _numbered(known)
        if general not in place:
            raise ValueError(f"`{name}` is no weight of a GPT-2, a Llama or a mixture")
        row = place[general]
        for ours, part in zip(row.ours, _apart(row, tensor, sizes), strict=True):
            out[_own_layer(ours.format(layer), dense)] = part
    return out


def _apart(row: Row, tensor: Tensor, sizes: Latent) -> Iterator[Tensor]:
    if row.join is not None:
        yield from row.join.apart(tensor, sizes)
        return
    straight = tensor.T.contiguous() if row.turned else tensor
    yield from straight.chunk(len(row.ours))


def _our_sizes(named: Mapping[str, Tensor], q_rope: str) -> Latent:
    start = q_rope.removesuffix("q_rope")
    rope = named[f"{start}k_rope"].shape[0]
    heads = named[q_rope].shape[0] // rope
    return Latent(heads=heads, rope=rope, value=named[f"{start}v"].shape[0] // heads)


def _their_sizes(named: Mapping[str, Tensor], down: str) -> Latent:
    """Rows of queries are heads × (plain + turned), of keys and values heads × (plain + value)."""
    start = down.removesuffix(DOWN_PROJECTION)
    rope = named[down].shape[0] - named[f"{start}kv_a_layernorm.weight"].shape[0]
    both = (f"{start}q_b_proj.weight", f"{start}q_proj.weight")
    queries = next(name for name in both if name in named)
    values = named[f"{start}o_proj.weight"].shape[1]
    plain = named[f"{start}kv_b_proj.weight"].shape[0] - values
    heads = (named[queries].shape[0] - plain) // rope
    return Latent(heads=heads, rope=rope, value=values // heads)
