"""A published run in, its spec out: the same model, devices and batch, its plan pinned."""

from __future__ import annotations

from bench.validation.profiles import Profile
from bench.validation.rows import NETWORK_GBITS, Row


class Missing(Exception):
    """What a run has and the language does not."""


def spec_text(row: Row, profile: Profile, *, pinned: bool = True) -> str:
    """`pinned`: to the published plan. Errors: Missing."""
    inside, nodes = row.nodes
    gbits = NETWORK_GBITS.get(row.interconnect)
    network = f"; network = {gbits} Gb/s per gpu" if gbits and nodes > 1 else ""
    return f"""{_model(row, profile)}
cluster c {{ node = {inside} * gpu("{row.gpu}"); nodes = {nodes}{network} }}
train t {{
    model = m; cluster = c; dataset = synthetic(); steps = 10
    batch = {row.batch} sequences
    optimizer = adamw; precision = {_precision(row, profile)}
}}
{f"plan {{ {'; '.join(pins(row, profile))} }}" if pinned else ""}
"""


def _model(row: Row, profile: Profile) -> str:
    if "experts" in row.model:
        return _latent_experts(row)
    words = (("vocab", "vocab"), ("context", "seq_len"), ("width", "hidden"))
    sizes = "; ".join(f"{key} = {row.size(name)}" for key, name in words)
    heads = f"heads={row.size('heads')}, kv_heads={row.size('kv_heads')}, causal"
    ffn = f"ffn={row.size('ffn')}"
    if profile.family == "llama":
        attention, mlp = f"attention(n, {heads}, rope=10_000)", f"swiglu(n, {ffn})"
        norm, ends = "rmsnorm", ("embed", "unembed")
    else:
        bias = ", bias" if profile.bias else ""
        square = ", explicit" if profile.explicit else ""
        attention = f"attention(n, {heads}{bias}{square})"
        mlp = f"mlp(n, {ffn}, activation=gelu_tanh{bias})"
        norm, ends = "layernorm", ("embed(positions=learned)", "unembed(tied)")
    options = "" if norm == "rmsnorm" or profile.bias else "bias=false"
    x = f"{norm}(x, {options})" if options else f"{norm}(x)"
    normed = f"{norm}({options})" if options else norm
    drop = f", {profile.dropout})" if profile.dropout else ""
    dropped = "dropout(" if profile.dropout else ""
    into = f" -> dropout({profile.dropout})" if profile.dropout else ""
    return f"""model m {{
    {sizes}
    block layer(x) {{
        x = x + {dropped}{attention.replace("(n,", f"({x},", 1)}{drop}
        x = x + {dropped}{mlp.replace("(n,", f"({x},", 1)}{drop}
    }}
    tokens -> {ends[0]}{into} -> layer * {row.size("layers")} -> {normed} -> {ends[1]}
}}"""


SHARED = {160: 2, 256: 1}
"""Shared experts of DeepSeek-V2 and V3 by the number of routed ones: config.json of the releases,
as the ranks and head sizes of latent attention below."""


def _latent_experts(row: Row) -> str:
    """DeepSeek's shape, cut to one dense layer and others with experts."""
    experts, ffn = row.size("experts"), row.size("moe_ffn")
    return f"""model m {{
    vocab = {row.size("vocab")}; context = {row.size("seq_len")}; width = {row.size("hidden")}
    block attend(x) {{
        x = x + latent_attention(rmsnorm(x), heads={row.size("heads")}, q_rank=1536, kv_rank=512,
                                 nope=128, rope_size=64, value=128, causal)
    }}
    block dense(x) {{
        x = attend(x)
        x = x + swiglu(rmsnorm(x), ffn={row.size("ffn")})
    }}
    block sparse(x) {{
        x = attend(x)
        x = x + moe(rmsnorm(x), experts={experts}, top_k={row.size("topk")},
                    expert=swiglu(ffn={ffn}), shared=swiglu(ffn={SHARED[experts] * ffn}))
    }}
    tokens -> embed -> dense * 1 -> sparse * {row.size("layers") - 1} -> rmsnorm -> unembed
}}"""


def _precision(row: Row, profile: Profile) -> str:
    word = str(row.plan["precision"])
    if word == "fp8":
        raise Missing("precision `fp8`")
    # of BigScience's runs those in bf16 summed gradients in float32
    short = profile.short_gradients and not row.sums_wide
    return f"{word}(reduce={word})" if short else word


def pins(row: Row, profile: Profile) -> list[str]:
    """The published plan, and nothing left open but what the source does not say."""
    plan = row.plan
    # on one data rank there is nothing to shard
    zero = plan["zero"] if row.ranks("data") * row.ranks("context") > 1 else 0
    found = [f"{axis} = {row.ranks(axis)}" for axis in ("data", "tensor", "pipeline")]
    found += [f"zero = {zero}", f"microbatch = {row.ranks('microbatch')}"]
    if row.ranks("tensor") > 1:
        found.append(f"sequence = {'on' if plan.get('sequence') else 'off'}")
    if row.ranks("pipeline") > 1:
        found.append("schedule = " + ("interleaved" if row.ranks("interleave") > 1 else "1f1b"))
    if row.ranks("pipeline") > 1 and profile.cut is not None:
        found.append(f"stages = {stages(row, profile.cut)}")
    if "CP via all-to-all" in (row.attention or ""):
        found.append("context_style = ulysses")
    for key in ("context", "expert", "interleave"):
        if row.ranks(key) > 1:
            found.append(f"{key} = {row.ranks(key)}")
    if zero and row.ranks("data") > 1:
        found.append(f"shard = {plan.get('shard', row.ranks('data'))}")
    recompute = profile.selective if plan["recompute"] == "selective" else plan["recompute"]
    return [*found, f"recompute = {recompute}"]


def stages(row: Row, cut: str) -> list[int]:
    """Blocks in each stage, as the software of the run divides them."""
    count, layers = row.ranks("pipeline") * row.ranks("interleave"), row.size("layers")
    if cut == "embeddings count" and row.sums_wide:
        each = (layers + 2) // count
        return [each - 1, *[each] * (count - 2), each - 1]
    each = -(-layers // count)
    return [*[each] * (count - 1), layers - each * (count - 1)]
