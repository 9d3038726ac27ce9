"""Why each family of plans lost: how much too large or too slow its best member is, and by what."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from llmspec.compiler.schedules import Schedule
from llmspec.compiler.search.candidates import Candidate, Family, Outline, Shape, Turn, Way
from llmspec.compiler.search.meshes import Grid
from llmspec.compiler.search.objective import Objective, Weight
from llmspec.compiler.search.pins import Recompute
from llmspec.compiler.search.space import Space
from llmspec.dsl.program import Prefer

GiB = 2**30

WORDS = {
    "pipeline_bubble": "pipeline bubble",
    "pipeline_transfer": "messages between stages",
    "data": "data communication",
    "tensor": "tensor communication",
    "compute": "compute",
    "optimizer": "optimizer",
    "context": "context communication",
    "expert": "expert communication",
    "offload": "offload",
}

SEEN = ("context", "context_style", "expert", "gpus", "kernels")
"""Families that are spoken of when the search has met them, and that it does not look for."""

PATIENCE = 24
"""Plans of a family that do not fit before it counts as too large."""


def families_of(found: Candidate) -> tuple[Family, ...]:
    way = Way(
        shape=found.shape,
        zero=found.zero,
        shards=found.shards,
        schedule=found.schedule,
        offload=found.offload,
    )
    return (*families_at(way), *found.choices)


def families_at(way: Way) -> tuple[Family, ...]:
    shape, grid = way.shape, way.shape.grid
    return (
        *shape_families(shape),
        *sharing_families(grid, way.zero, way.shards),
        *schedule_families(grid, way.schedule, len(shape.cut) // grid.pipeline),
        *(("offload", word) for word in way.offload or ("none",)),
    )


def shape_families(shape: Shape | Outline) -> tuple[Family, ...]:
    """The families that an outline has decided."""
    names: list[Family] = [
        ("gpus", str(shape.grid.ranks)),
        ("tensor", str(shape.grid.tensor)),
        ("pipeline", str(shape.grid.pipeline)),
        ("context", str(shape.grid.context)),
        ("expert", str(shape.grid.expert)),
        ("microbatch", str(shape.microbatch)),
        ("recompute", str(shape.recompute)),
        ("kernels", shape.option.kernels),
    ]
    if shape.grid.tensor > 1:
        names.append(("sequence", "on" if shape.option.sequence else "off"))
    if shape.option.view.style:
        names.append(("context_style", shape.option.view.style))
    return tuple(names)


def sharing_families(grid: Grid, zero: int, shards: int) -> tuple[Family, ...]:
    """Of the data ranks."""
    level = ("zero", str(zero))
    return (level, ("sharding", "hybrid" if shards < grid.data else "full")) if zero else (level,)


def schedule_families(grid: Grid, schedule: Schedule, interleave: int) -> tuple[Family, ...]:
    if grid.pipeline == 1:
        return ()
    return ("schedule", str(schedule)), ("interleave", str(interleave))


def plain_families(way: Way) -> set[Family]:
    """Of a plan: those that its outline was opened for, and those that are not looked for."""
    return {f for f in families_at(way) if f != ("offload", "none")}


def turn_families(turn: Turn) -> set[Family]:
    """As `plain_families`, of the plans under one schedule."""
    sharing = turn.sharing
    grid = sharing.outline.grid
    return {
        *shape_families(sharing.outline),
        *sharing_families(grid, sharing.zero, sharing.shards),
        *schedule_families(grid, turn.schedule, turn.interleave),
    }


def possible_families(outline: Outline, space: Space) -> set[Family]:
    """Every family that some candidate of the outline that may fit belongs to."""
    names: set[Family] = set()
    for zero, shards in space.ranges.shardings(outline.grid):
        if zero == 0 and outline.least_whole_bytes > space.budget_bytes:
            continue
        names |= families_with(outline, zero, shards, space)
    return names


def families_with(outline: Outline, zero: int, shards: int, space: Space) -> set[Family]:
    """Those of an outline's candidates that shard in one way."""
    grid = outline.grid
    names = {f for f in shape_families(outline) if f[0] not in SEEN} | set(space.choices)
    names.update(sharing_families(grid, zero, shards))
    for interleave, schedules in space.ranges.ways(grid.pipeline):
        for schedule in schedules:
            names.update(schedule_families(grid, schedule, interleave))
    return names


@dataclass
class Tally:
    """The best member of each family as the search goes: the best that fits, and the smallest."""

    objective: Objective
    best: dict[Family, Candidate] = field(default_factory=dict)
    smallest: dict[Family, Candidate] = field(default_factory=dict)
    too_large: Counter[Family] = field(default_factory=Counter)
    """How many members did not fit."""

    def add(self, found: Candidate) -> None:
        best = self.best if found.times is not None else self.smallest
        for family in families_of(found):
            self.too_large[family] += found.times is None
            known = best.get(family)
            if known is None or self._better(found, known):
                best[family] = found

    def lowest(self, families: Iterable[Family], least_bytes: float) -> bool:
        """Whether no plan with a peak of at least `least_bytes` can be any family's smallest, where
        nothing of the family fits."""
        return all(
            f in self.best or (f in self.smallest and self.smallest[f].peak_bytes < least_bytes)
            for f in families
        )

    def met(self, families: set[Family], least: Weight) -> bool:
        """Whether each family has a member that is better."""
        known = (self.best.get(family) for family in families)
        return all(one is not None and self.objective.of(one) < least for one in known)

    def settled(self, families: set[Family], least: Weight) -> bool:
        """Whether no plan with a weight of at least `least` can be any family's best; a family of
        which so many plans did not fit is not looked for further."""
        for family in families:
            best = self.best.get(family)
            if best is None:
                if self.too_large[family] < PATIENCE:
                    return False
            elif self.objective.of(best) >= least:
                return False
        return True

    def _better(self, new: Candidate, old: Candidate) -> bool:
        if new.times is None:
            return new.peak_bytes < old.peak_bytes
        return self.objective.rank(new) < self.objective.rank(old)


@dataclass(frozen=True, slots=True, kw_only=True)
class Lost:
    """One family and its best member beside the winner.

    excess_bytes: over the budget, 0 when it fits. slower: share of the winner's step, None when too
    large.
    term: the part of the time (or of the memory) that made the difference.
    """

    family: Family
    excess_bytes: int
    slower: float | None
    term: str
    text: str


def explain(
    winner: Candidate, tally: Tally, played: Mapping[int, Candidate], space: Space
) -> tuple[Lost, ...]:
    """`played`: by id, candidates whose times come from their action lists."""
    own = set(families_of(winner))
    lost = []
    for family in sorted({*tally.best, *tally.smallest}, key=_natural):
        if family in own:
            continue
        if family in tally.best:
            best = tally.best[family]
            lost.append(_worse(family, winner, played.get(id(best), best), tally.objective))
        else:
            lost.append(_too_large(family, winner, tally.smallest[family], space.budget_bytes))
    return tuple(lost)


def _natural(family: Family) -> tuple[str, int, str]:
    name, value = family
    return name, int(value) if value.isdigit() else 0, value


def _worse(family: Family, winner: Candidate, other: Candidate, objective: Objective) -> Lost:
    """By what is preferred, where they differ in that; else by their time."""
    assert winner.times is not None and other.times is not None, "both fit"
    share = other.step_s / winner.step_s - 1
    term = grown(winner.times.parts(), other.times.parts())
    text = _preferred(winner, other, objective)
    if text is not None:
        text += f", {_share(share)}"
    elif share < 0 and other.offload:
        text = f"{-100 * share:.1f} % faster, too little to depend on host memory"
    elif share < 0.0005:
        listed = family in other.choices and other.choice > winner.choice
        text = f"as fast, and {'named later in the spec' if listed else 'less simple'}"
    else:
        gained = other.times.parts()[term] - winner.times.parts()[term]
        text = f"{100 * share:.1f} % slower: {WORDS[term]} +{seconds(gained)}"
    return Lost(family=family, excess_bytes=0, slower=share, term=term, text=text)


def _preferred(winner: Candidate, other: Candidate, objective: Objective) -> str | None:
    """How much worse the other is in what comes before time; None where it is not."""
    first, least = objective.of(other)[0], objective.of(winner)[0]
    if len(objective.of(winner)) == 1 or first <= least:
        return None
    match objective.prefer:
        case Prefer.FEWEST_GPUS:
            return f"{other.ranks} GPUs, {other.ranks - winner.ranks} more"
        case Prefer.COST:
            dearer = other.step_s * other.ranks / winner.step_s / winner.ranks - 1
            return f"{100 * dearer:.1f} % dearer on {other.ranks} GPUs"
        case _:
            before, after = winner.ledger.parts(), other.ledger.parts()
            part = grown(before, after)
            more = (other.peak_bytes - winner.peak_bytes) / GiB
            of_it = (after[part] - before[part]) / GiB
            return f"{more:.2f} GiB more: {part} +{of_it:.2f} GiB"


def _share(slower: float) -> str:
    return f"{100 * abs(slower):.1f} % {'slower' if slower >= 0 else 'faster'}"


def grown(before: Mapping[str, float], after: Mapping[str, float]) -> str:
    """The part that grew most."""
    return max(after, key=lambda part: after[part] - before[part])


def _too_large(family: Family, winner: Candidate, other: Candidate, budget_bytes: int) -> Lost:
    excess = other.peak_bytes - budget_bytes
    after = other.ledger.parts()
    term = grown(winner.ledger.parts(), after)
    text = f"too large by {excess / GiB:.1f} GiB: {term} {after[term] / GiB:.1f} GiB"
    return Lost(family=family, excess_bytes=excess, slower=None, term=term, text=text)


def seconds(value: float) -> str:
    if abs(value) >= 1:
        return f"{value:.2f} s"
    if abs(value) >= 1e-3:
        return f"{value * 1e3:.2f} ms"
    return f"{value * 1e6:.0f} us"


def duration(total_s: float) -> str:
    for size, name in ((86400, "days"), (3600, "hours"), (60, "minutes")):
        if total_s >= 2 * size:
            return f"{total_s / size:.1f} {name}"
    return f"{total_s:.1f} s"


def describe(found: Candidate) -> str:
    """A plan in one line of the language's words."""
    mesh, shape = found.mesh, found.shape
    words = [f"{key} {value}" for key, value in found.choices] + [f"data {mesh.data}"]
    if found.zero:
        words.append(f"zero {found.zero}")
        if mesh.shards < mesh.data:
            words.append(f"shard {found.parts}")
    if mesh.expert > 1:
        words.append(f"expert {mesh.expert}")
    if mesh.context > 1:
        words.append(f"context {mesh.context} ({shape.option.view.style})")
    if mesh.tensor > 1:
        words.append(f"tensor {mesh.tensor}")
        words.append("sequence on" if shape.option.sequence else "sequence off")
    if mesh.pipeline > 1:
        each = f", {found.interleave} stages a rank" if found.interleave > 1 else ""
        words.append(f"pipeline {mesh.pipeline} ({found.schedule}{each})")
    words.append(f"microbatch {shape.microbatch} x {shape.microbatches}")
    if shape.recompute is not Recompute.NONE:
        words.append(f"recompute {shape.recompute}")
    if found.offload:
        words.append(f"offload {' and '.join(found.offload)}")
    return ", ".join(words)


def distinct(found: Iterable[Candidate]) -> list[Candidate]:
    """One candidate a description, the first of them."""
    by_text: dict[str, Candidate] = {}
    for candidate in found:
        by_text.setdefault(describe(candidate), candidate)
    return list(by_text.values())
