"""Mixtures of what blocks compute again, against every one of them written down."""

from __future__ import annotations

import itertools
import random

import numpy as np
import pytest

from llmspec.compiler.cost.moments import At
from llmspec.compiler.cost.recompute import Again
from llmspec.compiler.search.mixtures import Choices, Kind, Limits, Mixtures, _Unit


def some_choices(name: str, rng: random.Random) -> Choices:
    found = [
        Again(
            operators=(name, str(k)),
            forward_s=rng.random(),
            kept_bytes=(kept := rng.randrange(1000)),
            away_bytes=rng.randrange(kept + 1),
            moments=tuple(At(*(rng.randrange(50) for _ in range(4))) for _ in range(2)),
            working_bytes=rng.randrange(400),
        )
        for k in range(rng.randrange(2, 7))
    ]
    nothing = Again(kept_bytes=1000)
    return Choices(name, rng.randrange(1, 6), [*found, nothing], rng.randrange(50))


def some_limits(units: list[_Unit], rng: random.Random) -> Limits:
    flying = rng.choice([1, 1.0, 2, 3.5, 8])
    most = sum(unit.count * unit.kept.max() for unit in units)
    rooms = {}
    for unit in units:
        room = rng.random() * (flying + 0.5) * most
        each = [np.array([rng.random() for _ in range(unit.count)]) for _ in range(2)]
        rooms[unit.name] = (room + 300 * each[0], room + 300 * (each[1] - 1))
    return Limits(in_flight=flying, kept_bytes=rng.random() * flying * most, rooms=rooms)


def seconds_of_all(units: list[_Unit], limits: Limits) -> list[float]:
    """Of every mixture within the limits, walked block by block; the last block goes first."""
    tables = [u.table() if len(units) == 1 else u.table().not_beaten() for u in units]
    out = []
    for rows in itertools.product(*(range(len(t.kept)) for t in tables)):
        kept = sum(t.kept[i] for t, i in zip(tables, rows, strict=True))
        alive, fits = (limits.in_flight - 1) * kept, limits.in_flight * kept <= limits.kept_bytes
        for unit, table, i in zip(units, tables, rows, strict=True):
            less, first, more = table.rows[i][0]
            running, through = limits.rooms[unit.name]
            comes = 0.0
            for block in range(unit.count):
                choice = less if block < first else more
                fits = fits and alive + comes <= through[block] + 1e-9
                alive += unit.kept[choice]
                fits = fits and alive + comes + unit.back[choice] <= running[block] + 1e-9
                comes = unit.away[choice]
        if fits:
            out.append(sum(t.seconds[i] for t, i in zip(tables, rows, strict=True)))
    return sorted(out)


@pytest.mark.parametrize("away", [False, True])
@pytest.mark.parametrize("kinds", [1, 2])
def test_mixtures_within_limits(kinds, away):
    seen = 0
    for seed in range(60):
        rng = random.Random(seed)
        choices = tuple(some_choices(name, rng) for name in "ab"[:kinds])
        kind = Kind(away=away, coming=seed % 3, cast=seed % 2)
        mixtures = Mixtures(choices, kind)
        units = [
            _Unit(own, found, kind) for own, found in zip(choices, mixtures.found, strict=True)
        ]
        limits = some_limits(units, rng)
        expected = seconds_of_all(units, limits)
        assert [s for s, _ in mixtures.ways.within(limits)] == pytest.approx(expected)
        seen += len(expected)
    assert seen > 100


def test_less_is_known_of_more_kinds_and_of_other_orders():
    """But nothing that fits is left out, and the fastest come first."""
    for seed in range(30):
        rng = random.Random(seed)
        choices = tuple(some_choices(name, rng) for name in "abc"[: 2 + seed % 2])
        kind = Kind(in_order=seed % 3 > 0)
        mixtures = Mixtures(choices, kind)
        units = [
            _Unit(own, found, kind) for own, found in zip(choices, mixtures.found, strict=True)
        ]
        limits = some_limits(units, rng)
        found = [float(s) for s, _ in mixtures.ways.within(limits)]
        assert found == sorted(found)
        if len(units) == 2:
            expected = {round(s, 9) for s in seconds_of_all(units, limits)}
            assert expected <= {round(s, 9) for s in found}
