"""What a budget and `prefer` ask of a plan."""

from __future__ import annotations

import pytest

from llmspec.dsl import explicit
from llmspec.dsl.program import Cluster, Prefer
from tests.dsl.specs import MODEL, TRAIN, meaning, program


def spec(cluster: str = "nodes <= 4; price = 2 per gpu hour", *lines: str) -> str:
    pod = f'cluster pod {{ node = 8 * gpu("H100"); {cluster} }}\n'
    return MODEL + pod + TRAIN + "\n".join(lines) + "\n"


@pytest.mark.parametrize("words", [p.value for p in Prefer])
def test_every_preference_is_read(words):
    assert program(spec("nodes <= 4; price = 2 per gpu hour", f"prefer {words}")).prefer == words


def test_throughput_is_preferred_where_nothing_is_said():
    assert program(spec()).prefer is Prefer.THROUGHPUT


@pytest.mark.parametrize(
    ("price", "hourly"),
    [
        ("2.5 per gpu hour", 2.5),
        ("2.5 per device hour", 2.5),
        ("20 per node hour", 2.5),
        ("0 per gpu hour", 0),
    ],
)
def test_a_clusters_price_is_of_one_device(price, hourly):
    assert program(spec(f"price = {price}")).cluster.device.price_per_hour == hourly


def test_nodes_may_be_left_to_the_search():
    left: Cluster = program(spec("nodes <= 4")).cluster
    assert left.nodes_are_bound and left.worlds() == (8, 16, 24, 32)
    assert left.of(2).worlds() == (16,) and not left.of(2).nodes_are_bound
    assert program(spec("nodes = 4")).cluster.worlds() == (32,)


def test_a_mesh_may_need_fewer_nodes_than_there_may_be():
    pins = program(spec("nodes <= 4", "plan { tensor = 2; pipeline = 2; data = 4 }")).plan
    assert len(pins) == 3


def test_deadline_and_cost_are_of_the_run():
    budget = program(
        spec("price = 1 per gpu hour", "budget { deadline = 2 hours; cost = 500 }")
    ).budget
    assert (budget.deadline_s, budget.cost) == (7200, 500)


def test_goals_are_spelled_out():
    first = program(
        spec(
            "nodes <= 4; price = 20 per node hour",
            "budget { deadline = 1.5 days; cost = 1_000 }",
            "prefer fewest gpus",
        )
    )
    written = explicit(first)
    again = program(written)
    assert meaning(again) == meaning(first)
    assert explicit(again) == written
