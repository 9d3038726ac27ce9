"""The ledger of each distinct rank as a sum: which bytes, of which unit, at which moment.

The totals are those of `cost/memory.py`, which the search used; here they are told apart. What
could not be told apart would stand as "other", and a test holds that nothing does.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from llmspec.compiler.cost.backward import Moment
from llmspec.compiler.cost.memory import Ledger, gathered_bytes
from llmspec.compiler.cost.offload import ACTIVATIONS, PARAMETERS, ledgers, peak_of
from llmspec.compiler.cost.rank import Holder
from llmspec.compiler.cost.residence import Residence, cast_bytes
from llmspec.compiler.cost.stage import Run
from llmspec.compiler.cost.types import Types
from llmspec.compiler.errors import InternalError
from llmspec.compiler.forecast import Priced
from llmspec.compiler.ledger.operators import kept_object
from llmspec.compiler.ledger.shares import from_the_end, shared_out
from llmspec.compiler.schedules import stages_of

OTHER = "other"


@dataclass(frozen=True, slots=True)
class Item:
    """Bytes of one kind. part: of the ledger. unit: whose, "" where of none; uses: of it."""

    part: str
    what: str
    unit: str
    uses: int
    size_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Use:
    """`count` uses of a unit that follow each other on a rank."""

    unit: str
    run: Run

    @property
    def count(self) -> int:
        return self.run.count


@dataclass(frozen=True, slots=True, kw_only=True)
class Account:
    """One rank's peak. ranks: pipeline ranks that have the same. moment: which use's backward the
    peak stands in, the later ones having gone; in_flight: micro-batches that are held meanwhile."""

    ranks: tuple[int, ...]
    ledger: Ledger
    items: tuple[Item, ...]
    moment: str
    in_flight: float


def accounts(known: Priced) -> list[Account]:
    """Of every distinct pipeline rank, in their order."""
    found: list[Account] = []
    for rank, holder in enumerate(known.holders()):
        one = _account(known, rank, holder)
        for index, other in enumerate(found):
            if replace(other, ranks=one.ranks) == one:
                found[index] = replace(other, ranks=(*other.ranks, rank))
                break
        else:
            found.append(one)
    return found


def _account(known: Priced, rank: int, holder: Holder) -> Account:
    space, home = known.space, known.home(holder)
    offload = known.plan.offload
    total, _ = ledgers(holder.stage, home, space.types, space.machine, offload)
    uses = uses_of(known, rank, holder)
    peak = peak_of(holder.stage, home, space.types, space.machine, offload)
    items = [
        *_stored(uses, home, space.types, total, holder.stage.tied_elements),
        *_activations(known, uses, home, holder, peak),
        *_buffers(known, uses, home, holder, total, peak),
        Item("fixed", "context, collective libraries, allocator", "", 0, total.fixed),
    ]
    items = [item for item in items if item.size_bytes]
    if sum(item.size_bytes for item in items) != total.total:
        raise InternalError(f"the parts of rank {rank}'s ledger do not add up to its peak")
    return Account(
        ranks=(rank,),
        ledger=total,
        items=tuple(items),
        moment=_words(uses, peak),
        in_flight=peak.in_flight,
    )


def uses_of(known: Priced, rank: int, holder: Holder) -> list[Use]:
    """A rank's runs, with the names of their units."""
    shape = known.shape
    names: list[str] = []
    instances = known.space.graph(1).instances
    for stage in stages_of(known.schedule, rank, len(shape.cut), shape.grid.pipeline):
        first, stop = shape.cut[stage]
        names += [i.unit for i in instances[first:stop]]
    return [Use(unit=name, run=run) for name, run in holder.stage.named_runs(names)]


# --------------------------------------------------------------------------------------------------
# What is stored


def _stored(
    uses: Sequence[Use], home: Residence, types: Types, total: Ledger, tied: int
) -> Iterator[Item]:
    """Weights, their gradients and the optimizer's state, by the elements of each unit. `tied`:
    elements of another stage's weights."""
    sizes = [u.count * u.run.cost.elements for u in uses] + [tied]
    # gradients that come as the only backward goes are those of its last units
    experts = [u.count * u.run.cost.expert_elements for u in uses] + [0]
    whole = types.gradients * home.parts.largest(sum(sizes), sum(experts))
    coming = home.first_is_fullest and total.gradients < whole
    for part, what in (
        ("parameters", "weights as stored"),
        ("gradients", "gradients so far" if coming else "gradients"),
        ("optimizer", "state of the optimizer"),
    ):
        size = getattr(total, part)
        if part == "gradients" and coming:
            parts = [home.parts.largest(*both) for both in zip(sizes, experts, strict=True)]
            shares = from_the_end(size, [types.gradients * n for n in parts])
        else:
            shares = shared_out(size, sizes)
        yield Item(part, f"{what}, copies of another stage's", "", 0, shares.pop())
        for use, share in zip(uses, shares, strict=True):
            yield Item(part, what, use.unit, use.count, share)


# --------------------------------------------------------------------------------------------------
# What autograd keeps


def _activations(
    known: Priced, uses: Sequence[Use], home: Residence, holder: Holder, peak: Moment
) -> list[Item]:
    casts = cast_bytes(home, known.space.types)
    away = ACTIVATIONS in known.plan.offload
    boundary = holder.stage.output_bytes if home.sends_on else 0
    if away and home.receives:
        boundary += holder.stage.left_input_bytes
    return [
        *_earlier(uses, peak, casts, boundary, away=away),
        *(_alive(uses, peak, casts, away=away) if peak.kind != "W" else ()),
        *(_waiting(uses, peak) if peak.kind == "I" else ()),
    ]


def _words(uses: Sequence[Use], peak: Moment) -> str:
    if peak.run < 0:
        return "at the end of a backward"
    unit = uses[peak.run].unit
    part = {"I": "first part of the ", "W": "second part of the "}.get(peak.kind, "")
    return f"{'in' if peak.running else 'after'} the {part}backward of `{unit}`"


def _alive(uses: Sequence[Use], peak: Moment, casts: tuple[int, int], *, away: bool) -> list[Item]:
    """Of the micro-batch that goes backward."""
    items: list[Item] = []
    index = peak.run
    if index < 0:
        return items
    for place, use in enumerate(uses[peak.begin : index + 1], peak.begin):
        left = use.count - (peak.done if place == index else 0)
        bare, cast = _kept(use, casts, away=away)
        items.append(Item("activations", "kept, this micro-batch", use.unit, left, left * bare))
        items.append(Item("activations", "weights as cast, likewise", use.unit, left, left * cast))
    use = uses[index]
    here = [use] if peak.running else []
    for one in here:
        again = one.run.returning_bytes(*casts)
        items.append(Item("activations", "computed again", one.unit, 1, again))
    if away:
        # what computes is here, and what comes back for the one before it
        before = peak.done + peak.running < use.count
        here += [use] if before else [uses[index - 1]] if index > peak.begin else []
        for one in here:
            back = Item("activations", "back from the host", one.unit, 1, one.run.away_bytes)
            items.append(back)
    return items


def _waiting(uses: Sequence[Use], peak: Moment) -> Iterator[Item]:
    """Of the micro-batch that goes backward, what is kept for the second part."""
    what = "kept for the second part, this micro-batch"
    for place, use in enumerate(uses[max(peak.run, 0) :], max(peak.run, 0)):
        if place > peak.run and use.run.begins:
            return
        done = peak.done if place == peak.run else use.count
        yield Item("activations", what, use.unit, done, done * use.run.cost.late.size_bytes)


def _earlier(
    uses: Sequence[Use], peak: Moment, casts: tuple[int, int], boundary: int, *, away: bool
) -> list[Item]:
    """Of the other micro-batches in flight, and what crosses to other stages."""
    whole = peak.earlier
    sizes = [u.count * size for u in uses for size in _kept(u, casts, away=away)]
    crossing = min(whole, round(peak.in_flight * boundary))
    items = [Item("activations", "kept for other stages", "", 0, crossing)]
    shares = shared_out(whole - crossing, sizes)
    for use, bare, cast in zip(uses, shares[::2], shares[1::2], strict=True):
        items.append(Item("activations", "kept, others in flight", use.unit, use.count, bare))
        items.append(Item("activations", "weights as cast, likewise", use.unit, use.count, cast))
    return items


def _kept(use: Use, casts: tuple[int, int], *, away: bool) -> tuple[int, int]:
    """Of one use on the device: by operators, and weights as they cast them."""
    bare = use.run.kept_bytes(0, 0)
    return bare - (use.run.away_bytes if away else 0), use.run.kept_bytes(*casts) - bare


# --------------------------------------------------------------------------------------------------
# Buffers


def _buffers(
    known: Priced,
    uses: Sequence[Use],
    home: Residence,
    holder: Holder,
    total: Ledger,
    peak: Moment,
) -> Iterator[Item]:
    stage, types = holder.stage, known.space.types
    held = gathered_bytes(stage, home, types)
    if home.zero == 0:
        what = "largest weight as it is cast" if types.mixed else "largest weight's gradient"
        yield Item("buffers", what, "", 0, held)
    else:
        yield Item("buffers", "parameters as gathered", "", 0, held + peak.beside.gathered)
        yield Item("buffers", "reduction of gradients", "", 0, peak.beside.summing)
    messages = home.message_bytes + peak.messages
    yield Item("buffers", "values of other stages, not used yet", "", 0, messages)
    if peak.running or peak.working:
        what = "working set of its largest operator"
        if home.sums_each_time:
            what = "working set and gradients so far, less what has gone"
        yield Item("buffers", what, uses[peak.run].unit, 1, peak.working)
    left = total.buffers - held - home.message_bytes - peak.buffers
    passing = PARAMETERS in known.plan.offload and left > 0
    yield Item("buffers", "on the way from and to the host" if passing else OTHER, "", 0, left)


# --------------------------------------------------------------------------------------------------


def memory_object(known: Priced) -> dict[str, Any]:
    """The object `memory` of `plan --memory --json`; docs/json.md."""
    return {
        "ranks": [_object(known, one) for one in accounts(known)],
        "units": kept_object(known),
    }


def _object(known: Priced, one: Account) -> dict[str, Any]:
    across = known.plan.mesh.world_size // known.plan.mesh.pipeline
    return {
        "pipeline_ranks": list(one.ranks),
        "devices": len(one.ranks) * across,
        "peak_memory_bytes": one.ledger.total,
        "memory_bytes": one.ledger.parts(),
        "moment": one.moment,
        "in_flight": one.in_flight,
        "items": [
            {
                "part": item.part,
                "what": item.what,
                "unit": item.unit or None,
                "uses": item.uses,
                "bytes": item.size_bytes,
            }
            for item in one.items
        ],
    }
