"""Models that nobody shaped for the compiler, split over data 2 × tensor 2 × pipeline 2."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from llmspec import dsl
from llmspec.compiler import driver
from llmspec.compiler.driver import Session
from llmspec.compiler.errors import Refused
from llmspec.compiler.graph import Unit
from llmspec.compiler.ops.linear import linear
from llmspec.compiler.placement import local_shape, parse_state
from llmspec.compiler.plan import Plan, UnitPlacement
from llmspec.compiler.search.search import Found
from llmspec.compiler.verify.plan import verify_plan

PLAIN = Path(__file__).resolve().parents[2] / "models" / "plain_gpt.py"

LLAMA = """
import transformers


class Llama(transformers.LlamaForCausalLM):
    def __init__(self):
        super().__init__(
            transformers.LlamaConfig(
                vocab_size=131, hidden_size=64, intermediate_size=96, num_hidden_layers=4,
                num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=32,
                use_cache=False,
            )
        )
"""

MODELS = {
    "plain": (
        'python("plain.py", "GPT", n_layer=4, n_embd=64, n_head=4, vocab_size=131, block_size=32)'
    ),
    "transformers": 'python("llama.py", "Llama")',
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "plain.py").write_text(PLAIN.read_text())
    (tmp_path / "llama.py").write_text(LLAMA)
    return tmp_path


def planned(folder: Path, model: str, pins: str) -> tuple[Session, Plan]:
    text = f"""model m = {MODELS[model]}
cluster c {{ node = 8 * gpu("H100-SXM") }}
train t {{
    model = m; cluster = c; dataset = synthetic(); batch = 8 sequences; sequence_length = 32
    steps = 5; precision = fp32
}}
plan {{ {pins} }}
"""
    spec = folder / "spec.llmspec"
    spec.write_text(text)
    session = Session(dsl.load(spec), trust=True)
    found = driver.find_plan(session)
    assert isinstance(found, Found)
    return session, found.plan


def share(unit: Unit, placement: UnitPlacement, ranks: int) -> float:
    """Of the unit's parameters, what one tensor rank holds."""
    whole = local = 0
    for path, weight in unit.parameters.items():
        state = parse_state(placement.parameters[path])
        whole += math.prod(weight.shape)
        local += math.prod(local_shape(weight.shape, state, ranks))
    return local / whole


@pytest.mark.parametrize(("model", "ranks", "heads"), [("plain", 8, 4), ("transformers", 4, 2)])
def test_tensor_ranks_share_whole_heads(folder: Path, model: str, ranks: int, heads: int) -> None:
    """As in models of the language: heads are those of the traced graph."""
    with pytest.raises(Refused) as raised:
        planned(folder, model, f"tensor = {ranks}")
    (found,) = raised.value.diagnostics
    assert found.code == "E0403" and f"{ranks} tensor ranks" in found.message
    assert f"{heads} key/value heads" in found.message
    assert found.helps[0].endswith(f"or `tensor = {heads}`")
    assert found.span is not None and found.span.line == 7


@pytest.mark.parametrize("model", MODELS)
def test_split_three_ways(folder: Path, model: str) -> None:
    session, plan = planned(folder, model, "data = 2; tensor = 2; pipeline = 2; microbatch = 1")
    graph = session.graph(plan.microbatch)
    assert graph.replicated == (), "everything is raised"
    blocks = {i.unit for i in graph.instances[1:-1]}
    for name in blocks:
        unit, placement = graph.units[name], plan.placements[name]
        assert share(unit, placement, 2) <= 0.6
        products = [n for n in unit.calls() if n.target is linear]
        assert products and all(placement.nodes[n.name].startswith("split") for n in products)
    report, small = verify_plan(session, plan)
    assert small.mesh == plan.mesh
    assert report.ok, [(d.what, d.error) for d in report.failures()[:8]]


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize(
    "pins", ["data = 4; zero = 3; tensor = 2; sequence = on; microbatch = 1", "data = 8; zero = 0"]
)
def test_other_meshes(folder: Path, model: str, pins: str) -> None:
    session, plan = planned(folder, model, pins)
    report, _ = verify_plan(session, plan)
    assert report.ok, [(d.what, d.error) for d in report.failures()[:8]]
