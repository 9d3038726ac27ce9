"""Dry runs against plans: `python -m bench.dryruns [NAME …]`, all of them without names.

Each plan is searched for under its pins (the examples' under none), its program executed on fake
tensors as every distinct role, and the peak of each set beside the ledger's, every collective
beside the plan's. What comes out goes to bench/results/dryruns.json as it comes, and from there
into the table of docs/dryrun.md.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import time
from pathlib import Path
from typing import Any

import torch

from llmspec import dsl
from llmspec.compiler import driver
from llmspec.compiler.driver import Session
from llmspec.compiler.dryrun.run import Role, dry_run
from llmspec.compiler.plan import Plan
from llmspec.compiler.search.search import Found

ROOT = Path(__file__).resolve().parents[1]
RESULTS = Path(__file__).parent / "results" / "dryruns.json"
PAGE = ROOT / "docs" / "dryrun.md"
BEGIN, END = "<!-- bench.dryruns -->\n", "<!-- end -->\n"

DENSE = """
import llama
model m = llama(layers=8, width=2048, heads=16, kv_heads=8, ffn=5632, vocab=32_000, context=2048)
"""
DROPOUT = """
model m {
    vocab = 32_000; context = 2048; width = 2048
    block layer(x) {
        x = x + dropout(attention(layernorm(x), heads=16, causal, bias), 0.1)
        x = x + dropout(mlp(layernorm(x), ffn=4 * width, activation=gelu, bias), 0.1)
    }
    tokens -> embed(positions=learned) -> dropout(0.1) -> layer * 8 -> layernorm -> unembed(tied)
}
"""
MIXTURE = """
model m {
    vocab = 32_000; context = 2048; width = 1024
    block layer(x) {
        x = x + attention(rmsnorm(x), heads=8, rope=10_000, causal)
        x = x + moe(rmsnorm(x), experts=8, top_k=2, expert=swiglu(ffn=2048))
    }
    tokens -> embed -> layer * 4 -> rmsnorm -> unembed
}
"""
EXAMPLES = ("llama3_8b", "llama3_70b", "llama3_405b")
PLANS = {
    # name: (model, devices, pins)
    "one": (DENSE, 1, "microbatch = 4; recompute = none"),
    "dropout": (DROPOUT, 1, "microbatch = 4; recompute = none"),
    "listed": (DENSE, 1, "microbatch = 4; recompute = [rmsnorm, swiglu]"),
    "zero_0": (DENSE, 2, "data = 2; zero = 0; microbatch = 2"),
    "zero_1": (DENSE, 4, "data = 4; zero = 1; microbatch = 1"),
    "zero_1_replicas": (DENSE, 4, "data = 4; shard = 2; zero = 1; microbatch = 1"),
    "zero_2_replicas": (DENSE, 4, "data = 4; shard = 2; zero = 2; microbatch = 1"),
    "zero_3_replicas": (
        DENSE,
        4,
        "data = 4; shard = 2; zero = 3; microbatch = 1; recompute = full",
    ),
    "zero_3": (DENSE, 8, "data = 8; zero = 3; microbatch = 1; recompute = none"),
    "tensor": (DENSE, 2, "tensor = 2; sequence = off; microbatch = 2"),
    "tensor_sequence": (DENSE, 4, "tensor = 4; sequence = on; microbatch = 2; recompute = full"),
    "tensor_data": (DENSE, 4, "data = 2; tensor = 2; sequence = on; zero = 1; microbatch = 1"),
    "tensor_dropout": (DROPOUT, 4, "data = 2; tensor = 2; sequence = on; zero = 2; microbatch = 1"),
    "ring": (DENSE, 2, "context = 2; context_style = ring; zero = 0; microbatch = 2"),
    "ulysses": (DENSE, 2, "context = 2; context_style = ulysses; zero = 2; microbatch = 2"),
    "gather": (DENSE, 2, "context = 2; context_style = gather; zero = 3; microbatch = 2"),
    "offload_optimizer": (DENSE, 2, "offload = optimizer; data = 2; zero = 2; microbatch = 2"),
    "offload_activations": (DENSE, 2, "offload = activations; data = 2; zero = 3; microbatch = 2"),
    "offload_parameters": (DENSE, 2, "offload = parameters; data = 2; zero = 3; microbatch = 2"),
    "triton": (DENSE, 1, "kernels = triton; microbatch = 4; recompute = none"),
    "gpipe": (DENSE, 2, "pipeline = 2; schedule = gpipe; microbatch = 1"),
    "1f1b": (DENSE, 4, "pipeline = 4; schedule = 1f1b; microbatch = 1"),
    "1f1b_stages": (DENSE, 2, "pipeline = 2; schedule = 1f1b; stages = [5, 3]; microbatch = 1"),
    "1f1b_data": (DENSE, 4, "pipeline = 2; data = 2; zero = 0; schedule = 1f1b; microbatch = 1"),
    "interleaved": (
        DENSE,
        2,
        "pipeline = 2; schedule = interleaved; interleave = 2; microbatch = 1",
    ),
    "interleaved_zero_2": (
        DENSE,
        4,
        "pipeline = 2; data = 2; zero = 2; schedule = interleaved; interleave = 2; microbatch = 1",
    ),
    "zero_bubble": (DENSE, 2, "pipeline = 2; schedule = zero_bubble; microbatch = 1"),
    "zero_bubble_zero_1": (
        DENSE,
        4,
        "pipeline = 2; data = 2; zero = 1; schedule = zero_bubble; microbatch = 1",
    ),
    "zero_bubble_zero_3": (
        DENSE,
        8,
        "pipeline = 2; data = 4; shard = 2; zero = 3; schedule = zero_bubble; microbatch = 1",
    ),
    "zbv": (DENSE, 4, "pipeline = 2; tensor = 2; schedule = zbv; microbatch = 1"),
    "dualpipev": (DENSE, 2, "pipeline = 2; schedule = dualpipev; microbatch = 1"),
    "dualpipev_zero_3": (
        DENSE,
        4,
        "pipeline = 2; data = 2; zero = 3; schedule = dualpipev; microbatch = 1",
    ),
    "experts": (MIXTURE, 1, "microbatch = 2"),
    "experts_zero_3": (MIXTURE, 2, "data = 2; expert = 2; zero = 3; microbatch = 1"),
    "experts_zero_1": (MIXTURE, 4, "data = 4; expert = 2; zero = 1; microbatch = 1"),
    "experts_zero_0": (MIXTURE, 4, "data = 4; expert = 2; zero = 0; microbatch = 1"),
    "experts_1f1b": (MIXTURE, 2, "pipeline = 2; schedule = 1f1b; microbatch = 1"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help="default: all")
    parser.add_argument("--plan", metavar="FILE", help="a saved plan of the one example named")
    options = parser.parse_args()
    for name in options.names or [*PLANS, *EXAMPLES]:
        found = measured(name, options.plan)
        known = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
        known[name] = found
        RESULTS.write_text(json.dumps(known, indent=1, sort_keys=True) + "\n")
        print(line(name, known[name]), flush=True)
        write_page(known)


def measured(name: str, saved: str | None) -> dict[str, Any]:
    session, plan = the_plan(name, saved)
    start, before = time.perf_counter(), os.times()
    roles = dry_run(session, plan)
    after = os.times()
    spent = sum(getattr(after, n) - getattr(before, n) for n in ("user", "children_user"))
    return {
        "pins": PLANS[name][2] if name in PLANS else f"examples/{name}.llmspec",
        "devices": plan.mesh.world_size,
        "user_s": round(spent, 1),
        "wall_s": round(time.perf_counter() - start, 1),
        "date": datetime.date.today().isoformat(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "roles": [role_object(role) for role in roles],
    }


def the_plan(name: str, saved: str | None) -> tuple[Session, Plan]:
    if saved:
        return driver.open_plan(saved)
    if name in EXAMPLES:
        session = driver.open_session(str(ROOT / "examples" / f"{name}.llmspec"))
    else:
        model, devices, pins = PLANS[name]
        session = Session(dsl.load(f"{name}.llmspec", text=spec(model, devices, pins)))
    found = driver.find_plan(session)
    assert isinstance(found, Found), f"{name}: no plan fits: {found}"
    return session, found.plan


def spec(model: str, devices: int, pins: str) -> str:
    return f"""{model}
cluster c {{ node = {devices} * gpu("H200") }}
train t {{
    model = m; cluster = c; dataset = synthetic(); steps = 10
    batch = 16 sequences; precision = bf16
}}
plan {{ {pins} }}
"""


def role_object(role: Role) -> dict[str, Any]:
    return {
        "pipeline_rank": role.pipeline_rank,
        "peak_bytes": role.peak_bytes,
        "predicted_bytes": role.predicted_bytes,
        "collectives": sum(count for *_, count in role.collectives),
        "differing": len(role.differing),
        "counted": role.counted,
    }


def worst(run: dict[str, Any]) -> float:
    errors = [role["predicted_bytes"] / role["peak_bytes"] - 1 for role in run["roles"]]
    return max(errors, key=abs)


def line(name: str, run: dict[str, Any]) -> str:
    peak = max(role["peak_bytes"] for role in run["roles"])
    differing = sum(role["differing"] for role in run["roles"])
    sent = sum(role["collectives"] for role in run["roles"])
    collectives = f"{sent:,} equal" if not differing else f"**{differing} kinds differ**"
    error = f"{100 * worst(run):+.2f} %"
    error = error if abs(worst(run)) <= 0.01 else f"**{error}**"
    return (
        f"| {name} | `{run['pins']}` | {run['devices']:,} | {len(run['roles'])} | "
        f"{peak / 2**20:,.0f} | {error} | {collectives} | {run['user_s']} |"
    )


def write_page(known: dict[str, dict[str, Any]]) -> None:
    order = [*PLANS, *EXAMPLES]
    runs = [(name, known[name]) for name in order if name in known]
    good = sum(
        abs(worst(run)) <= 0.01 and not any(role["differing"] for role in run["roles"])
        for _, run in runs
    )
    dates = sorted({run["date"] for _, run in runs})
    versions = sorted({f"torch {run['torch']}, Python {run['python']}" for _, run in runs})
    text = [
        f"`python -m bench.dryruns`, {dates[0]} to {dates[-1]}, {'; '.join(versions)}. "
        f"{good} of {len(runs)} plans agree: every rank's peak within 1 %, every collective equal.",
        "",
        "| plan | pins | devices | ranks | peak, MiB | ledger, of the worst rank | collectives | "
        "user s |",
        "|---|---|---|---|---|---|---|---|",
        *(line(name, run) for name, run in runs),
    ]
    page = PAGE.read_text()
    head, _, rest = page.partition(BEGIN)
    _, _, tail = rest.partition(END)
    PAGE.write_text(head + BEGIN + "\n".join(text) + "\n" + END + tail)


if __name__ == "__main__":
    main()
