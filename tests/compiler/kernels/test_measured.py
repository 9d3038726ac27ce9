"""What a hardware file says of kernels is what the search prices and the program launches."""

from __future__ import annotations

from functools import cache

import pytest

from llmspec.compiler import driver
from llmspec.compiler.errors import Refused
from llmspec.compiler.kernels.kernel import Kernel
from llmspec.compiler.kernels.measured import structure_of
from llmspec.compiler.search.search import Found
from llmspec.dsl import load

SPEC = """
import llama
{kernels}
model m = llama(layers=2, width=64, heads=4, kv_heads=2, ffn=128, vocab=256, context=32)
cluster here {{ node = 1 * gpu("H200"){named} }}
train bench {{
    model = m; cluster = here; dataset = synthetic; batch = 4 sequences; steps = 3
    precision = bf16
}}
plan {{ kernels = triton; recompute = none; microbatch = 4 }}
"""
FAST = "{ tile: [4, 128], warps: 2, stages: 3, rate: 3 TB/s, by_rule: 2 TB/s }"
SLOW = "{ tile: [4, 128], warps: 2, rate: 3 MB/s, eager: 6 MB/s }"


def planned(kernels: str = "") -> tuple[driver.Session, Found]:
    section = f"kernels lab {{\n{kernels}\n}}" if kernels else ""
    text = SPEC.format(kernels=section, named="; kernels = lab" if kernels else "")
    session = driver.Session(load("spec.llmspec", text=text))
    found = driver.find_plan(session)
    assert isinstance(found, Found)
    return session, found


@cache
def emitted(kernels: str = "") -> str:
    session, found = planned(kernels)
    return driver.emit_plan(session, found.plan)["kernels.py"]


def predicted_s(kernels: str = "") -> float:
    return float(planned(kernels)[1].plan.predicted["predicted"]["step_time_s"])


def test_measured_tiles_are_launched_and_said() -> None:
    text = emitted(f"silu_gate = {{ columns: 128, bytes: 2, forward: {FAST}, backward: {FAST} }}")
    assert text.count("tile = flat(columns, measured={128: (4, 128, 2, 3)})") == 2
    assert "#   forward tile of 128 columns measured: 3,000 GB/s, by rule 2,000" in text
    assert "#   tiles by rule: not measured" in text  # of the other kernels
    assert "`kernels lab`" in text and "`llmspec tune`" not in text
    assert "measured" not in emitted().replace("`llmspec tune` measures others", "")


def test_other_columns_types_and_structures_are_not_meant() -> None:
    bare = emitted().splitlines()[10:]
    for other in ("columns: 256, bytes: 2", "columns: 128, bytes: 4", "columns: 64, bytes: 2"):
        text = emitted(f"silu_gate = {{ {other}, forward: {FAST} }}")
        assert "measured=" not in text
    other = emitted(f'silu_gate = {{ columns: 128, bytes: 2, structure: "0", forward: {FAST} }}')
    says = "#   tiles by rule: not measured"
    assert [line for line in other.splitlines()[10:] if line != says] == bare
    session, found = planned()
    units = driver.lower_plan(session, found.plan).units["layer"]
    groups = [n.target.group for n in units.calls() if isinstance(n.target, Kernel)]
    own = next(structure_of(g) for g in groups if g.name == "silu_gate")
    entry = f'silu_gate = {{ columns: 128, bytes: 2, structure: "{own}", forward: {FAST} }}'
    assert "measured={128: (4, 128, 2, 3)}" in emitted(entry)


def test_the_search_prices_what_was_measured() -> None:
    bare = predicted_s()
    slow = predicted_s(f"silu_gate = {{ columns: 128, bytes: 2, forward: {SLOW} }}")
    # gate, up and hidden of 4 x 32 tokens in bfloat16, two layers, at 3 MB/s and what a step keeps
    moved_s = 2 * 3 * 2 * 4 * 32 * 128 / 3e6 / 0.91
    assert slow - bare == pytest.approx(moved_s, rel=0.01)


def test_what_was_faster_apart_stays_apart() -> None:
    text = emitted(f"silu_gate = {{ columns: 128, bytes: 2, use: eager, forward: {SLOW} }}")
    assert "def silu_gate" in emitted() and "def silu_gate" not in text
    slow = f"silu_gate = {{ columns: 128, bytes: 2, use: eager, forward: {SLOW} }}"
    assert predicted_s(slow) < 1.01 * predicted_s() + 1e-4  # as its operators, not as measured


def test_a_tile_that_cannot_hold_a_row_is_refused() -> None:
    narrow = FAST.replace("[4, 128]", "[4, 32]")
    with pytest.raises(Refused, match="has 32 columns, and the kernel reduces rows of 64"):
        emitted(f"rmsnorm = {{ columns: 64, bytes: 2, forward: {narrow} }}")
