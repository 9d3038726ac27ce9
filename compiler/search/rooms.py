"""What the blocks of a rank may keep, and what else there may be as each goes backward: limits that
mixtures are sieved by before their ledger is worked out."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from itertools import accumulate

import numpy as np

from llmspec.compiler.cost.backward import coming_elements, making, working_bytes
from llmspec.compiler.cost.hardware import Machine
from llmspec.compiler.cost.passing import passing
from llmspec.compiler.cost.residence import Residence, cast_bytes
from llmspec.compiler.cost.stage import Run, Stage
from llmspec.compiler.cost.turns import Rank
from llmspec.compiler.cost.types import Types
from llmspec.compiler.search.mixtures import Limits, Mixtures


@dataclass(frozen=True, slots=True)
class Beside:
    """Bytes beside what is kept: as the backward begins; by unit, in the chain's order, as each of
    its blocks goes backward, and when it is through."""

    first: int
    by_unit: dict[str, np.ndarray]


def beside_of(
    runs: list[tuple[str, Run]], bare: Stage, home: Residence, types: Types, machine: Machine
) -> Beside:
    casts = cast_bytes(home, types)
    around = passing(bare, home, types, "gradients" in machine.fused)
    coming = types.gradients if home.first_is_fullest else 0
    found: dict[str, list[tuple[int, int]]] = {}
    made = 0
    for (name, run), uses in zip(reversed(runs), around, strict=True):
        # of blocks it is their choice's
        working = 0 if name else working_bytes(run, home, types, casts[0], coming)
        grown = coming * coming_elements(run, home)
        own = found.setdefault(name, [])
        for place in range(run.count):
            during, after = uses.get(place) or uses[1]
            own.append((working + during.total + made, after.total + made + grown))
            made += grown
    first, _ = next(iter(found.values()))[0]
    ending = making(bare, home, types, casts[0], around)
    first = first if ending is None else max(first, ending.total)
    return Beside(first, {name: np.array(own[::-1]).T for name, own in found.items()})


def limits_of(
    runs: list[tuple[str, Run]],
    home: Residence,
    casts: tuple[int, int],
    spare: int,
    beside: Beside,
    away: bool,
) -> Limits:
    """What may stay of blocks of all micro-batches in flight, and how much there may be of blocks
    in the last one's backward. Both are needed; the ledger has the last word."""
    alone = [
        0 if name else run.count * (run.kept_bytes(*casts) - (run.away_bytes if away else 0))
        for name, run in runs
    ]
    first = next(i for i, (name, _) in enumerate(runs) if name)
    most = spare - (home.in_flight - 1) * sum(alone) - sum(alone[:first])
    return Limits(
        in_flight=home.in_flight,
        kept_bytes=spare - home.in_flight * sum(alone) - beside.first,
        rooms={name: (most - a, most - b) for name, (a, b) in beside.by_unit.items()},
    )


def limits_in_turns(
    runs: list[tuple[str, Run]], mixtures: Mixtures, rank: Rank, spare: int, first: int
) -> Limits:
    """At the first of the turns: one stage goes backward, of the others all that is in flight
    stays. first: bytes beside what is kept as it begins."""
    turn = rank.home.turns[0]
    held = turn.held
    stages = accumulate(run.begins for _, run in runs)
    rows = [(stage - 1, name, run) for stage, (name, run) in zip(stages, runs, strict=True)]
    of_one = sum(run.count * rank.stays(run) for _, name, run in rows if name)
    blocks = sum(
        held.forwards[stage] * run.count * rank.stays(run) for stage, name, run in rows if name
    )
    # nothing below is a choice of the blocks
    spare -= rank.held_bytes(turn) - blocks
    behind = sum(
        run.count * rank.stays(replace(run, recompute=mixtures.least[name]))
        for stage, name, run in rows
        if name and stage > held.runs
    )
    rooms: dict[str, list[tuple[float, float]]] = {}
    around = iter(rank.around(turn)[::-1])
    for stage, name, run in rows:
        own = rooms.setdefault(name, [])
        if stage != held.runs:
            own += [(math.inf, math.inf)] * run.count
            continue
        uses = next(around)
        for place in reversed(range(run.count)):
            during, after = uses.get(place) or uses[1]
            through = after.total if held.kind == "B" else -math.inf
            own.append((spare - behind - during.total, spare - behind - through))
    return Limits(
        in_flight=blocks / max(of_one, 1),
        kept_bytes=spare - first,
        rooms={name: (a, b) for name, own in rooms.items() if name for a, b in [np.array(own).T]},
    )
