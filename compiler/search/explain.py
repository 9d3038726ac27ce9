"""Why each family of plans lost: how much too large or too slow its best member is, and by what."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from llmspec.compiler.search.candidates import Candidate, Family
from llmspec.compiler.search.families import families_of
from llmspec.compiler.search.members import Tally
from llmspec.compiler.search.objective import Objective
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Lost:
    """One family and its best known member beside the winner.

    excess_bytes: over the budget, 0 when it fits. slower: share of the winner's step, None when too
    large. exact: no member is better, or none fits.
    term: the part of the time (or of the memory) that made the difference.
    """

    family: Family
    excess_bytes: int
    slower: float | None
    exact: bool
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
            other = played.get(id(best), best)
            exact = family in tally.exact
            lost.append(_worse(family, winner, other, tally.objective, exact=exact))
        else:
            smallest, exact = tally.smallest[family], family in tally.exact
            lost.append(_too_large(family, winner, smallest, space.budget_bytes, exact=exact))
    return tuple(lost)


def _natural(family: Family) -> tuple[str, int, str]:
    name, value = family
    return name, int(value) if value.isdigit() else 0, value


def _worse(
    family: Family, winner: Candidate, other: Candidate, objective: Objective, *, exact: bool
) -> Lost:
    """By what is preferred, where they differ in that; else by their time."""
    assert winner.times is not None and other.times is not None, "both fit"
    share = other.step_s / winner.step_s - 1
    term = grown(winner.times.parts(), other.times.parts())
    text = _preferred(winner, other, objective)
    most = "" if exact else "at most "
    if text is not None:
        text = f"{most}{text}, {_share(share)}"
    elif share < 0 and other.offload:
        text = f"{-100 * share:.1f} % faster, too little to depend on host memory"
    elif share < 0.0005:
        listed = family in other.choices and other.choice > winner.choice
        text = f"as fast, and {'named later in the spec' if listed else 'less simple'}"
    else:
        gained = other.times.parts()[term] - winner.times.parts()[term]
        text = f"{most}{100 * share:.1f} % slower: {WORDS[term]} +{seconds(gained)}"
    return Lost(family=family, excess_bytes=0, slower=share, exact=exact, term=term, text=text)


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


def _too_large(
    family: Family, winner: Candidate, other: Candidate, budget_bytes: int, *, exact: bool
) -> Lost:
    excess = other.peak_bytes - budget_bytes
    after = other.ledger.parts()
    term = grown(winner.ledger.parts(), after)
    none = "" if exact else "none found that fits, the smallest "
    text = f"{none}too large by {excess / GiB:.1f} GiB: {term} {after[term] / GiB:.1f} GiB"
    return Lost(family=family, excess_bytes=excess, slower=None, exact=exact, term=term, text=text)


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
