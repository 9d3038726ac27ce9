"""What our search chooses where a run was published, not told of its plan, and how much faster the
model prices that: `python -m bench.searched`.

Prices both with the constants of the run's own software (`bench/validation/profiles.py`). Runs that
are in `bench/results/searched.json` already, and whose published plan still has the price written
there, are not searched again; `--minutes N` stops after so long. `make validate` puts the results
on docs/validation.md.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterable
from dataclasses import asdict
from itertools import zip_longest

from bench.validate import RESULTS as PRICES
from bench.validate import from_json
from bench.validation.chosen import RESULTS, Searched, read_chosen
from bench.validation.price import Priced, adapted
from bench.validation.profiles import profile_of
from bench.validation.rows import Row, read_rows
from bench.validation.specs import spec_text
from llmspec import dsl
from llmspec.compiler import driver
from llmspec.compiler.plan import EVERYTHING, Plan
from llmspec.compiler.search.search import Found


def search(row: Row, published_s: float) -> Searched:
    profile = profile_of(row)
    start = time.perf_counter()
    program = dsl.load(f"{row.id}.llmspec", text=spec_text(row, profile, pinned=False))
    made = driver.find_plan(driver.Session(adapted(program, profile, bounded=True)))
    seconds = round(time.perf_counter() - start, 1)
    found = made.plan if isinstance(made, Found) else None
    return Searched(
        id=row.id,
        published_s=published_s,
        step_s=None if found is None else found.predicted["predicted"]["step_time_s"],
        plan="nothing fits" if found is None else in_words(found),
        considered=made.considered,
        seconds=seconds,
    )


def in_words(plan: Plan) -> str:
    """What a `plan` block would pin, where it differs from the plainest."""
    mesh = plan.mesh
    sizes = {
        "data": mesh.data,
        "tensor": mesh.tensor,
        "context": mesh.context,
        "expert": mesh.expert,
        "pipeline": mesh.pipeline,
    }
    words = [f"{name} {size}" for name, size in sizes.items() if size > 1]
    words.append(f"zero {plan.zero}")
    if plan.zero and mesh.shards not in (1, mesh.data):
        words.append(f"shard {mesh.shards}")
    if mesh.pipeline > 1:
        words.append(plan.schedule)
    words.append(f"micro-batch {plan.microbatch}")
    again = [stretch.again for stretches in plan.recompute.values() for stretch in stretches]
    if EVERYTHING in again:
        words.append("recompute full" if set(again) == {EVERYTHING} else "recompute")
    elif any(again):
        words.append("recompute some")
    if plan.offload:
        words.append(f"offload {' and '.join(plan.offload)}")
    return ", ".join(words)


def to_json(found: Iterable[Searched]) -> str:
    return "[\n" + ",\n".join(json.dumps(asdict(s)) for s in found) + "\n]\n"


def in_turns(rows: Iterable[Row]) -> list[Row]:
    """One of each source after the other, so that a part of the run says something of all."""
    by_family: dict[str, list[Row]] = {}
    for row in rows:
        by_family.setdefault(row.family, []).append(row)
    turns = zip_longest(*by_family.values())
    return [row for turn in turns for row in turn if row is not None]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", default="", help="rows whose id has this text")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="stop after so long")
    options = parser.parse_args(arguments)
    prices, found, start = from_json(PRICES.read_text()), read_chosen(), time.monotonic()
    rows = read_rows()
    for row in in_turns(rows):
        price, known = prices[row.id], found.get(row.id)
        if options.only not in row.id or not stale(price, known):
            continue
        if time.monotonic() - start > 60 * options.minutes:
            break
        assert price.step_s is not None
        one = found[row.id] = search(row, price.step_s)
        RESULTS.write_text(to_json(found[r.id] for r in rows if r.id in found))
        gain = "nothing fits" if one.gain is None else f"{one.gain:+.1%}"
        print(f"{row.id}: {gain}, {one.plan} ({one.seconds} s)", flush=True)
    return 0


def stale(price: Priced, known: Searched | None) -> bool:
    return price.step_s is not None and (known is None or known.published_s != price.step_s)


if __name__ == "__main__":
    sys.exit(main())
