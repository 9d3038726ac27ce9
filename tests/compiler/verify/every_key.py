"""Every key of the plan block at once: levels of each, which combinations the language refuses, and
rows in which every three levels of three keys meet."""

from __future__ import annotations

import random
from collections.abc import Iterator
from functools import cache
from itertools import combinations, product
from math import prod

from tests.compiler.verify.models import spec_text

Row = dict[str, str]
Pairs = tuple[tuple[str, str], ...]
"""Some levels of a row: (key, level), in the order of KEYS."""

KEYS: dict[str, tuple[str, ...]] = {
    "model": ("llama", "gpt", "moe"),
    "tensor": ("1", "2 off", "2 on"),
    "context": ("1", "2 ring", "2 ulysses", "2 gather"),
    "expert": ("1", "2"),
    "data": ("1", "2", "4 of 2"),
    "zero": ("0", "1", "2", "3"),
    "pipeline": ("1", "gpipe", "1f1b", "interleaved", "zero_bubble", "zbv", "dualpipev"),
    "microbatches": ("1", "2", "4"),
    "recompute": ("none", "selective", "full", "[attention]"),
    "offload": ("none", "optimizer", "activations", "parameters", "[activations, optimizer]"),
}
"""The first level of each is the simplest."""

MODELS = {
    "llama": """
model m {
    vocab = 67; context = 32; width = 32
    block layer(x) {
        x = x + attention(rmsnorm(x), heads=4, kv_heads=2, rope=10_000, causal)
        x = x + swiglu(rmsnorm(x), ffn=48)
    }
    tokens -> embed -> layer * 4 -> rmsnorm -> unembed
}""",
    "gpt": """
model m {
    vocab = 50; context = 32; width = 32
    block layer(x) {
        x = x + dropout(attention(layernorm(x), heads=4, causal, bias, window=7), 0.1)
        x = x + dropout(mlp(layernorm(x), ffn=64, activation=gelu, bias), 0.1)
    }
    tokens -> embed(positions=learned) -> dropout(0.1) -> layer * 4 -> layernorm -> unembed(tied)
}""",
    "moe": """
model m {
    vocab = 64; context = 32; width = 32
    block dense(x) {
        x = x + attention(rmsnorm(x), heads=4, kv_heads=2, rope=10_000, causal)
        x = x + swiglu(rmsnorm(x), ffn=48)
    }
    block sparse(x) {
        x = x + attention(rmsnorm(x), heads=4, rope=10_000, causal)
        x = x + moe(rmsnorm(x), experts=4, top_k=2, expert=swiglu(ffn=24), shared=swiglu(ffn=24))
    }
    tokens -> embed -> (dense -> sparse) * 2 -> rmsnorm -> unembed
}""",
}

SEQUENCE = 16
MOST_PROCESSES = 16
"""Of one row: enough for any three axes at once."""


def ranks(row: Row, key: str) -> int:
    level = row.get(key, "1")
    if key == "pipeline":
        return 1 if level == "1" else 2
    return int(level.split()[0])


def world_size(row: Row) -> int:
    return prod(ranks(row, key) for key in ("tensor", "context", "data", "pipeline"))


def refused(row: Row) -> str | None:
    """Why the language refuses a row, as far as its keys are known; None when it does not."""
    known = row.__contains__
    if row.get("expert") == "2":
        if row.get("data") == "1":
            return "expert ranks are some of the data ranks"
        if row.get("model", "moe") != "moe":
            return "there are no experts to split"
    if row.get("zero", "0") != "0" and row.get("data") == "1" and row.get("context") == "1":
        return "there is nobody to shard with"
    if known("zero") and "parameters" in row.get("offload", "") and row["zero"] != "3":
        return "parameters are offloaded by ZeRO 3"
    if _one_copy_of_experts(row):
        return "parameters that leave are gathered from several ranks"
    if row.get("data") == "4 of 2" and row.get("zero") == "0":
        return "ZeRO 0 shards nothing"
    return None


def _one_copy_of_experts(row: Row) -> bool:
    """And they are to leave."""
    if row.get("expert", "1") == "1" or "parameters" not in row.get("offload", ""):
        return False
    return "data" in row and "context" in row and ranks(row, "data") * ranks(row, "context") == 2


def pins(row: Row) -> str:
    """The plan block of a row; keys that it does not name are left to the search."""
    lines = []
    if "tensor" in row:
        count, *sequence = row["tensor"].split()
        lines += [f"tensor = {count}", *(f"sequence = {word}" for word in sequence)]
    if "context" in row:
        count, *style = row["context"].split()
        lines += [f"context = {count}", *(f"context_style = {word}" for word in style)]
    if "expert" in row:
        lines.append(f"expert = {row['expert']}")
    if "data" in row:
        lines.append(f"data = {ranks(row, 'data')}")
    if row.get("data") == "4 of 2":
        lines.append(f"shard = {2 * ranks(row, 'context')}")
    if "zero" in row:
        lines.append(f"zero = {row['zero']}")
    if "pipeline" in row:
        lines.append(f"pipeline = {ranks(row, 'pipeline')}")
        if row["pipeline"] != "1":
            lines.append(f"schedule = {row['pipeline']}")
        if row["pipeline"] in ("interleaved", "zbv", "dualpipev"):
            lines.append("interleave = 2")
    if "microbatches" in row:
        lines.append("microbatch = 2")
    for key in ("recompute", "offload"):
        if key in row:
            lines.append(f"{key} = {row[key]}")
    return "; ".join(lines)


def text_of(row: Row) -> str:
    """The spec of a row."""
    batch = ranks(row, "data") * 2 * int(row.get("microbatches", "1"))
    text = spec_text(MODELS[row.get("model", "moe")], world_size(row), batch, pins(row))
    return text.replace("steps = 10", f"steps = 10; sequence_length = {SEQUENCE}")


# --------------------------------------------------------------------------------------------------
# Rows


def triples() -> Iterator[Pairs]:
    """Every three levels of three keys."""
    for keys in combinations(KEYS, 3):
        for levels in product(*(KEYS[key] for key in keys)):
            yield tuple(zip(keys, levels, strict=True))


def completed(pairs: Pairs) -> Row | None:
    """The simplest row with these levels; None when every one is refused."""
    return _completed(pairs)


@cache
def _completed(pairs: Pairs) -> Row | None:
    row = dict(pairs)
    if refused(row) or world_size(row) > MOST_PROCESSES:
        return None
    left = [key for key in KEYS if key not in row]
    if not left:
        return row
    for level in KEYS[left[0]]:
        wider = {**row, left[0]: level}
        found = _completed(tuple((k, wider[k]) for k in KEYS if k in wider))
        if found is not None:
            return found
    return None


def met(row: Row) -> set[Pairs]:
    """Every three levels that meet in a row."""
    return {tuple((k, row[k]) for k in keys) for keys in combinations(KEYS, 3)}


def covering_rows(seed: int = 1) -> list[Row]:
    """Rows that the language accepts, in which every three levels that it accepts together meet.

    One row after the other, greedily: it starts from three levels that have not met, and takes of
    each further key the level that brings most new meetings (Cohen et al. 1997, AETG)."""
    rng = random.Random(seed)
    left = {pairs: None for pairs in triples() if completed(pairs) is not None}
    rows = []
    while left:
        row = dict(next(iter(left)))
        others = [key for key in KEYS if key not in row]
        rng.shuffle(others)
        for key in others:
            row[key] = _best_level(row, key, left)
        ordered = {key: row[key] for key in KEYS}
        for pairs in met(ordered):
            left.pop(pairs, None)
        rows.append(ordered)
    return rows


def _best_level(row: Row, key: str, left: dict[Pairs, None]) -> str:
    """Of the levels that leave a row that is accepted; the simplest among equals."""
    best, most = "", -1
    for level in KEYS[key]:
        wider = {**row, key: level}
        if completed(tuple((k, wider[k]) for k in KEYS if k in wider)) is None:
            continue
        names = [k for k in KEYS if k in wider]
        news = sum(
            tuple((k, wider[k]) for k in keys) in left
            for keys in combinations(names, 3)
            if key in keys
        )
        if news > most:
            best, most = level, news
    return best


def random_row(rng: random.Random) -> Row:
    """Of those that the language accepts."""
    while True:
        row = {key: rng.choice(levels) for key, levels in KEYS.items()}
        if refused(row) is None and world_size(row) <= MOST_PROCESSES // 2:
            return row
