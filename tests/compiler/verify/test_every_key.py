"""All keys of the plan block together: every gradient against one device, in float64."""

from __future__ import annotations

import random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llmspec.compiler.errors import Refused
from llmspec.compiler.verify.plan import verify_plan
from llmspec.dsl import SpecError
from tests.compiler.verify.every_key import (
    KEYS,
    Row,
    completed,
    covering_rows,
    met,
    pins,
    random_row,
    refused,
    text_of,
    triples,
)
from tests.compiler.verify.models import planned

QUICK, LONG = 4, 200
COVERING = covering_rows()


def check(row: Row) -> None:
    session, plan = planned(text_of(row))
    report, small = verify_plan(session, plan, largest=4)
    assert small.mesh == plan.mesh, "the mesh under test is the plan's"
    assert report.ok, (pins(row), [(d.what, d.error) for d in report.failures()[:6]])


def test_every_three_levels_that_may_meet_do() -> None:
    together = set().union(*(met(row) for row in COVERING))
    for pairs in triples():
        assert (pairs in together) == (completed(pairs) is not None)


REFUSED = [p for p in triples() if refused(dict(p))]


@pytest.mark.long
@pytest.mark.parametrize("pairs", REFUSED, ids=lambda p: ", ".join(" ".join(x) for x in p))
def test_what_cannot_meet_is_refused(pairs: tuple[tuple[str, str], ...]) -> None:
    with pytest.raises((SpecError, Refused)) as raised:
        planned(text_of(dict(pairs)))
    assert all(d.code.startswith("E04") for d in raised.value.diagnostics)


@pytest.mark.parametrize("seed", range(QUICK))
def test_seeded(seed: int) -> None:
    check(random_row(random.Random(seed)))


@pytest.mark.long
@settings(max_examples=LONG, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.integers(min_value=1000, max_value=10**9))
def test_drawn(seed: int) -> None:
    check(random_row(random.Random(seed)))


@pytest.mark.long
@pytest.mark.parametrize("row", COVERING, ids=lambda row: ", ".join(row[key] for key in KEYS))
def test_covering(row: Row) -> None:
    check(row)
