"""What the blocks of each stage compute again: priced, and chosen to fit the memory at the least
time."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np

from llmspec.compiler.cost.floors import beside_bytes, standing_bytes
from llmspec.compiler.cost.fused import Computing, computing
from llmspec.compiler.cost.hardware import Machine
from llmspec.compiler.cost.memory import (
    Residence,
    cast_bytes,
    gradient_bytes,
)
from llmspec.compiler.cost.moments import fullest_of
from llmspec.compiler.cost.offload import ACTIVATIONS, PARAMETERS, Offload, away_bytes, ledgers
from llmspec.compiler.cost.recompute import Again, Flow, Operators, flow_of
from llmspec.compiler.cost.stage import Run, Stage
from llmspec.compiler.cost.types import Types
from llmspec.compiler.errors import Refused
from llmspec.compiler.graph import ModelGraph, Unit
from llmspec.compiler.kernels.kinds import EAGER
from llmspec.compiler.ops import collective
from llmspec.compiler.ops.registry import entry_of
from llmspec.compiler.passes.fuse import fuse_unit, members_of
from llmspec.compiler.passes.shard import shard_unit, whole_placement
from llmspec.compiler.plan import EVERYTHING
from llmspec.compiler.search.options import TensorOption
from llmspec.compiler.search.recompute import corners
from llmspec.dsl.diagnostics import Diagnostic, did_you_mean, listing
from llmspec.dsl.plans import operator_kind
from llmspec.dsl.program import Span

Chosen = tuple[Operators, ...]
"""What each instance of a stretch of the chain computes again."""
TRIES = 64
"""Mixtures whose ledger is worked out before a stage counts as one that nothing makes fit."""


def lowered(graph: ModelGraph, option: TensorOption, name: str) -> Unit:
    unit = graph.units[name]
    placed = option.placements[name] if option.ranks > 1 else whole_placement(unit)
    return shard_unit(unit, placed, option.ranks)


@dataclass
class Policies:
    """`graph(microbatch, view)`: what one rank sees of the model. `sample(microbatch)`: the
    micro-batch whose sets of operators serve this one. Everything is worked out once."""

    graph: Callable[..., ModelGraph]
    sample: Callable[[int], int]
    machine: Machine
    types: Types
    uses: dict[tuple[int, int, str], TensorOption] = field(default_factory=dict)
    first: dict[tuple[object, ...], TensorOption] = field(default_factory=dict)
    units: dict[tuple[int, int, str], Unit] = field(default_factory=dict)
    flows: dict[tuple[int, int, str], Flow] = field(default_factory=dict)
    kernel_flows: dict[tuple[object, ...], tuple[Flow, Computing]] = field(default_factory=dict)
    priced: dict[tuple[int, int, str, Operators], Again | None] = field(default_factory=dict)
    found: dict[tuple[int, int, str], tuple[tuple[str, ...], ...]] = field(default_factory=dict)
    lists: dict[tuple[int, int, str], list[Again]] = field(default_factory=dict)
    mixtures: dict[tuple[object, ...], Mixtures] = field(default_factory=dict)

    def like(self, option: TensorOption, microbatch: int, name: str) -> TensorOption:
        """The first option that does the same with a unit: most differ in some units alone."""
        key = (id(option), microbatch, name)
        if key not in self.uses:
            unit = self.graph(microbatch, option.view).units[name]
            self.uses[key] = self.first.setdefault(option.treats(unit), option)
        return self.uses[key]

    def unit(self, option: TensorOption, microbatch: int, name: str) -> Unit:
        """Lowered, its operators apart."""
        option = self.like(option, microbatch, name)
        key = (id(option), microbatch, name)
        if key not in self.units:
            self.units[key] = lowered(self.graph(microbatch, option.view), option, name)
        return self.units[key]

    def flow(self, option: TensorOption, microbatch: int, name: str) -> Flow:
        """Of the unit with its operators apart."""
        option = self.like(option, microbatch, name)
        key = (id(option), microbatch, name)
        if key not in self.flows:
            self.flows[key] = self._flow(option, self.unit(option, microbatch, name))
        return self.flows[key]

    def _flow(self, option: TensorOption, unit: Unit) -> Flow:
        return flow_of(unit, option.where, self.machine, self.types.compute, option.inner)

    def apart(self, option: TensorOption, microbatch: int, name: str) -> tuple[Flow, Computing]:
        unit = self.unit(option, microbatch, name)
        cost = computing(unit, self.machine, self.types.compute)
        return self.flow(option, microbatch, name), cost

    def fused(
        self, option: TensorOption, microbatch: int, name: str, again: Operators = ()
    ) -> tuple[Flow, Computing]:
        """With its kernels, where one use of the unit computes operators again."""
        listed = () if isinstance(again, str) else again
        option = self.like(option, microbatch, name)
        key = (id(option), microbatch, name, listed)
        if key not in self.kernel_flows:
            unit = fuse_unit(
                self.unit(option, microbatch, name),
                [listed] if listed else (),
                measured=self.machine.kernels,
                by=option.kernels,
            )
            cost = computing(unit, self.machine, self.types.compute)
            self.kernel_flows[key] = self._flow(option, unit), cost
        return self.kernel_flows[key]

    def price(
        self, option: TensorOption, microbatch: int, name: str, operators: Operators
    ) -> Again:
        """Of what one use of a unit computes again. Kernels fall apart where a part of them alone
        is computed again: what that costs counts as computing again."""
        if option.kernels == EAGER:
            return self.flow(option, microbatch, name).again(operators)
        flow, cost = self.fused(option, microbatch, name, operators)
        if isinstance(operators, str):
            return flow.again(operators)
        made = flow.again(tuple(n for n in operators if n in flow.steps))
        slower_s = cost.whole_s - self.fused(option, microbatch, name)[1].whole_s
        return replace(
            made,
            operators=operators if made.operators else (),
            forward_s=made.forward_s + slower_s * self.machine.pinned,
        )

    def again(
        self, option: TensorOption, microbatch: int, name: str, operators: Operators
    ) -> Again | None:
        """The price of a choice for one use of a unit; None when nothing runs again."""
        if not operators:
            return None
        option = self.like(option, microbatch, name)
        key = (id(option), microbatch, name, operators)
        if key not in self.priced:
            made = self.price(option, microbatch, name, operators)
            self.priced[key] = made if made.operators else None
        return self.priced[key]

    def choices(self, option: TensorOption, microbatch: int, name: str) -> list[Again]:
        """What is worth computing again in a unit. Sets of operators are found at one sequence, and
        priced at each micro-batch."""
        option = self.like(option, microbatch, name)
        at = (id(option), microbatch, name)
        if at not in self.lists:
            size = self.sample(microbatch)
            first = self.like(option, size, name)
            key = (id(first), size, name)
            if key not in self.found:
                self.found[key] = self._corners(first, size, name)
            sets: list[Operators] = [*self.found[key], EVERYTHING]
            self.lists[at] = [self.price(option, microbatch, name, s) for s in sets]
        return self.lists[at]

    def _corners(self, option: TensorOption, size: int, name: str) -> tuple[tuple[str, ...], ...]:
        if option.kernels == EAGER:
            return corners(self.flow(option, size, name))
        alone, known = self.unit(option, size, name), self.machine.kernels
        unit = fuse_unit(alone, one_result=True, measured=known, by=option.kernels)
        members = members_of(unit)
        found = corners(self._flow(option, unit))
        return tuple(tuple(m for n in names for m in members[n]) for names in found)

    def listed(
        self, option: TensorOption, microbatch: int, name: str, names: Sequence[str]
    ) -> Operators:
        """What a unit computes again when operators are listed: what its backward asks for."""
        unit = self.unit(option, microbatch, name)
        return self.flow(option, microbatch, name).again(listed(unit, names)).operators

    def mix(
        self,
        option: TensorOption,
        microbatch: int,
        counts: Mapping[str, int],
        casts: Mapping[str, int],
        cast: int,
        *,
        away: bool = False,
    ) -> Mixtures:
        """Of the blocks of one stage: how many of each unit, and the bytes of a block's cast
        weights that autograd keeps, `cast` of each element. away: what they keep waits in host
        memory."""
        key = (id(option), microbatch, tuple(counts.items()), tuple(casts.items()), cast, away)
        if key not in self.mixtures:
            found = {name: self.choices(option, microbatch, name) for name in counts}
            units = tuple(
                _Choices(name, count, found[name], casts[name], cast, away)
                for name, count in counts.items()
            )
            self.mixtures[key] = Mixtures(units)
        return self.mixtures[key]


@dataclass(frozen=True, slots=True)
class _Choices:
    """Of one unit's `count` blocks in a stage. cast_bytes: of its weights as its uses cast them,
    cast: of one element of them. away: see `Policies.mix`."""

    unit: str
    count: int
    found: list[Again]
    cast_bytes: int
    cast: int
    away: bool

    def kept(self, again: Again) -> int:
        return again.kept_bytes + (self.cast_bytes if again.keeps_casts else 0)

    def returning(self, again: Again) -> int:
        moving = again.working_bytes + fullest_of(again.moments, 0, self.cast)
        return moving + (0 if again.keeps_casts else self.cast_bytes)

    def leaving(self, again: Again) -> int:
        """Of those kept, what waits in host memory."""
        return again.away_bytes if self.away else 0

    def worthwhile(self) -> list[Again]:
        """Those that no other beats, from the most bytes kept to the fewest."""
        out: list[Again] = []
        order = sorted(self.found, key=lambda a: (self.kept(a), a.whole_s, a.working_bytes))
        for one in order:
            if not out or one.whole_s < out[-1].whole_s:
                out.append(one)
        return out[::-1]


@dataclass(frozen=True, slots=True)
class Split:
    """The first `count` of one unit's blocks compute `first` again, the others `rest`."""

    first: Operators
    count: int
    rest: Operators


@dataclass(frozen=True, slots=True)
class _Table:
    """Mixtures: seconds and kept bytes of one micro-batch, those of them that stay on the device,
    and the most bytes there at once as the blocks go backward (of a single unit's blocks; else what
    stays). rows: of each unit, the places of its choices for the first and the other blocks, and
    how many the first are."""

    seconds: np.ndarray
    kept: np.ndarray
    stays: np.ndarray
    most: np.ndarray
    rows: np.ndarray

    def take(self, order: np.ndarray) -> _Table:
        numbers = (self.seconds, self.kept, self.stays, self.most, self.rows)
        return _Table(*(column[order] for column in numbers))

    def times(self, other: _Table) -> _Table:
        seconds = (self.seconds[:, None] + other.seconds[None, :]).ravel()
        kept = (self.kept[:, None] + other.kept[None, :]).ravel()
        stays = (self.stays[:, None] + other.stays[None, :]).ravel()
        left = np.repeat(self.rows, len(other.rows), axis=0)
        right = np.tile(other.rows, (len(self.rows), 1, 1))
        return _Table(seconds, kept, stays, stays, np.concatenate([left, right], axis=1))

    def not_beaten(self) -> _Table:
        """The fewest bytes at each time."""
        order = np.lexsort((self.kept, self.seconds))
        kept = self.kept[order]
        least = np.minimum.accumulate(kept)
        return self.take(order[np.concatenate([[True], kept[1:] < least[:-1]])])


def _mixtures_of(own: _Choices, found: list[Again]) -> _Table:
    seconds = np.array([a.whole_s for a in found])
    kept = np.array([own.kept(a) for a in found], dtype=float)
    away = np.array([own.leaving(a) for a in found], dtype=float)
    stay, back = kept - away, away + np.array([own.returning(a) for a in found])
    count = np.arange(own.count)
    more, less, first = np.meshgrid(np.arange(len(found)), np.arange(len(found)), count)
    # the same for all is one choice, with none of it first
    open_ = ((less > more) & (first > 0)) | ((less == more) & (first == 0))
    more, less, first = more[open_], less[open_], first[open_]
    rest = own.count - first
    early = first * stay[less]
    # as a block goes backward, the one before it comes back
    coming = np.where(rest > 1, away[more], np.where(first > 0, away[less], 0))
    most = early + rest * stay[more] + back[more] + coming
    sooner = early + back[less] + np.where(first > 1, away[less], 0)
    return _Table(
        first * seconds[less] + rest * seconds[more],
        first * kept[less] + rest * kept[more],
        early + rest * stay[more],
        np.where(first > 0, np.maximum(most, sooner), most),
        np.stack([less, first, more], axis=1)[:, None, :],
    )


def _least(found: Sequence[Again], cast: int) -> Again:
    """What no choice has fewer bytes than, wherever these are: it bounds every mixture's ledger."""
    away = min(a.away_bytes for a in found)
    return Again(
        kept_bytes=away + min(a.kept_bytes - a.away_bytes for a in found),
        away_bytes=away,
        keeps_casts=all(a.keeps_casts for a in found),
        working_bytes=min(a.working_bytes + fullest_of(a.moments, 0, cast) for a in found),
    )


class Mixtures:
    """Every way to have at most two choices for each unit's blocks of one stage, the one that keeps
    less in the earlier blocks: what they compute again is back when the later ones are gone.

    returning: the fewest bytes that go with one block's backward, by unit."""

    def __init__(self, units: tuple[_Choices, ...]):
        self.units = tuple(u.unit for u in units)
        self.found = [own.worthwhile() for own in units]
        self.least = {
            u.unit: _least(found, u.cast) for u, found in zip(units, self.found, strict=True)
        }
        self.returning = {u.unit: min(map(u.returning, u.found)) for u in units}
        first, *others = (_mixtures_of(u, f) for u, f in zip(units, self.found, strict=True))
        table = first
        for other in others:
            table = table.not_beaten().times(other.not_beaten())
        self.table = table.take(np.lexsort((table.most, table.kept, table.seconds)))

    def within(
        self, in_flight: float, kept_bytes: float, most_bytes: float, *, some: bool
    ) -> Iterator[tuple[Split, ...]]:
        """Those that may fit, the fastest first: of `in_flight` micro-batches stay at most
        kept_bytes, and in the last one's backward there are at most most_bytes. `some`: something
        must run again."""
        table = self.table
        fits = in_flight * table.stays <= kept_bytes
        fits &= (in_flight - 1) * table.stays + table.most <= most_bytes
        for place in np.flatnonzero(fits)[: TRIES + 1]:
            if not (some and table.seconds[place] == 0.0):
                yield self._splits(table.rows[place])

    def _splits(self, row: np.ndarray) -> tuple[Split, ...]:
        return tuple(
            Split(found[less].operators, int(first), found[more].operators)
            for found, (less, first, more) in zip(self.found, row, strict=True)
        )

    def spread(self, splits: Sequence[Split], names: Sequence[str]) -> Chosen:
        """The choice of each of a stage's instances, `names` their units; "" for what stands
        alone."""
        by_unit = dict(zip(self.units, splits, strict=True))
        seen = dict.fromkeys(self.units, 0)
        out: list[Operators] = []
        for name in names:
            if name not in by_unit:
                out.append(())
                continue
            split = by_unit[name]
            out.append(split.first if seen[name] < split.count else split.rest)
            seen[name] += 1
        return tuple(out)


def fitting(
    policies: Policies,
    option: TensorOption,
    microbatch: int,
    bare: Stage,
    blocks: tuple[str, ...],
    home: Residence,
    *,
    offload: Offload,
    budget_bytes: int,
    some: bool,
) -> Chosen | None:
    """The fastest choice for a stage's instances under the budget; None when none fits.

    bare: the stage with nothing computed again. blocks: the unit of each instance, "" for what
    stands alone.
    """
    types, machine = policies.types, policies.machine
    nothing: Chosen = ((),) * len(blocks)
    if not some and ledgers(bare, home, types, machine, offload)[0].total <= budget_bytes:
        return nothing
    counts = Counter(name for name in blocks if name)
    if not counts:
        return None
    casts = cast_bytes(home, types)
    of_each = bare.named_runs(blocks)  # "" for what stands alone
    weights = {name: run.cast_kept_bytes(*casts) for name, run in of_each if name}
    away = ACTIVATIONS in offload
    mixtures = policies.mix(option, microbatch, counts, weights, casts[0], away=away)
    if away:
        runs = tuple(replace(r, recompute=mixtures.least[n]) if n else r for n, r in of_each)
        least = Stage(runs, bare.tied_elements)
        if ledgers(least, home, types, machine, offload)[0].total > budget_bytes:
            return None
    spare = budget_bytes - standing_bytes(bare, home, types, machine, offload)
    block = mixtures.returning.get(of_each[-1][0])
    beside = beside_bytes(bare, home, types, machine, block)
    kept_bytes, most_bytes = _limits(of_each, home, casts, spare, beside, away)
    if home.first_is_fullest and home.microbatches > 1 and PARAMETERS not in offload:
        # the backward after the first finds all gradients, and one micro-batch less
        sent = bare.output_bytes if home.sends_on else 0
        spare += sent - gradient_bytes(bare, home, types)
        fewer = replace(home, in_flight=home.in_flight - 1)
        kept, _ = _limits(of_each, fewer, casts, spare, beside, away)
        kept_bytes = min(kept_bytes, kept * home.in_flight / fewer.in_flight)
    if away and not _adjoin(of_each):
        most_bytes = math.inf
    for splits in mixtures.within(home.in_flight, kept_bytes, most_bytes, some=some):
        pick = dict(zip(mixtures.units, splits, strict=True))
        made = _mixed(of_each, pick, partial(policies.again, option, microbatch))
        stage = Stage(made, bare.tied_elements)
        if ledgers(stage, home, types, machine, offload)[0].total <= budget_bytes:
            return mixtures.spread(splits, blocks)
    return None


def _adjoin(runs: list[tuple[str, Run]]) -> bool:
    """Whether a block comes back from host memory while the one behind it goes backward: nothing
    stands between blocks, nor a block at the chain's ends, where it never leaves."""
    places = [place for place, (name, _) in enumerate(runs) if name]
    together = len(places) == places[-1] - places[0] + 1
    return together and all(run.block for name, run in runs if name)


def _mixed(
    runs: list[tuple[str, Run]],
    pick: Mapping[str, Split],
    again: Callable[[str, Operators], Again | None],
) -> tuple[Run, ...]:
    """The runs of a stage whose blocks compute again what is picked for their units."""
    left = {name: split.count for name, split in pick.items()}
    out = []
    for name, run in runs:
        if not name:
            out.append(run)
            continue
        first = min(left[name], run.count)
        left[name] -= first
        split = pick[name]
        begins = run.begins
        for count, operators in ((first, split.first), (run.count - first, split.rest)):
            if count:
                chosen = again(name, operators)
                out.append(Run(run.cost, count, chosen, run.repeated, run.block, begins=begins))
                begins = False
    return tuple(out)


def _limits(
    runs: list[tuple[str, Run]],
    home: Residence,
    casts: tuple[int, int],
    spare: int,
    beside: tuple[int, int],
    away: bool,
) -> tuple[float, float]:
    """What may stay of blocks of all micro-batches in flight, and how much there may be of blocks
    in the last one's backward. Both are needed; the ledger has the last word."""
    alone = [
        0 if name else run.count * (run.kept_bytes(*casts) - (away_bytes(run) if away else 0))
        for name, run in runs
    ]
    first = next(i for i, (name, _) in enumerate(runs) if name)
    before = sum(alone[:first])
    kept = spare - home.in_flight * sum(alone) - beside[0]
    return kept, spare - (home.in_flight - 1) * sum(alone) - before - beside[1]


# --------------------------------------------------------------------------------------------------
# Operators that a spec lists


def listed(unit: Unit, names: Sequence[str]) -> tuple[str, ...]:
    """The nodes of a lowered unit inside the operators that are listed: by what the language or the
    dialect calls them, or by their own names (a plan's)."""
    found = []
    for node in unit.calls():
        words = {node.name} | {
            w for part in node.meta["scope"] for w in (part, operator_kind(part))
        }
        if not collective.is_collective(node):
            words.add(entry_of(node).name)
        if words & set(names):
            found.append(node.name)
    return tuple(found)


def check_listed(graph: ModelGraph, names: Sequence[str], span: Span) -> None:
    """Errors: Refused for a name that no block has."""
    blocks = dict.fromkeys(i.unit for i in graph.instances if i.prefix)
    words = {name: _operators(graph.units[name]) for name in blocks}
    calls = [node for name in blocks for node in graph.units[name].calls()]
    nodes = {n for node in calls for n in (node.name, entry_of(node).name)}
    parts = {part for node in calls for part in node.meta["scope"]}
    said = sorted({word for own in words.values() for word in own})
    known = {*said, *parts, *nodes}
    for name in names:
        if name not in known:
            raise Refused(
                Diagnostic(
                    code="E0402",
                    message=f"no block has an operator `{name}` to recompute",
                    span=span,
                    notes=tuple(f"`{b}` has {listing(own, 'and')}" for b, own in words.items()),
                    helps=did_you_mean(name, said) or did_you_mean(name, sorted(known)),
                )
            )


def _operators(unit: Unit) -> list[str]:
    """What the language calls them, or where it has no part in it, the dialect."""
    calls = list(unit.calls())
    named = dict.fromkeys(operator_kind(part) for node in calls for part in node.meta["scope"])
    return list(named or dict.fromkeys(entry_of(node).name for node in calls))
