"""What the blocks of each stage compute again: priced, and chosen to fit the memory at the least
time."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import groupby

from llmspec.compiler.cost.floors import beside_bytes, standing_bytes, turning
from llmspec.compiler.cost.fused import Computing, computing
from llmspec.compiler.cost.hardware import Machine
from llmspec.compiler.cost.memory import gradient_bytes
from llmspec.compiler.cost.offload import ACTIVATIONS, Offload, as_they_leave, ledgers
from llmspec.compiler.cost.recompute import Again, Flow, Operators, flow_of
from llmspec.compiler.cost.residence import Residence, cast_bytes
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
from llmspec.compiler.search.mixtures import Choices, Chosen, Kind, Mixtures, Split
from llmspec.compiler.search.options import TensorOption
from llmspec.compiler.search.recompute import corners
from llmspec.compiler.search.rooms import beside_of, limits_in_turns, limits_of
from llmspec.dsl.diagnostics import Diagnostic, did_you_mean, listing
from llmspec.dsl.plans import operator_kind
from llmspec.dsl.program import Span


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
    traded: dict[tuple[int, int, str], list[Again]] = field(default_factory=dict)
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
        self,
        option: TensorOption,
        microbatch: int,
        name: str,
        operators: Operators,
        of: Callable[[Flow, Operators], Again] = Flow.again,
    ) -> Again:
        """Of what one use of a unit computes again. Kernels fall apart where a part of them alone
        is computed again: what that costs counts as computing again."""
        if option.kernels == EAGER:
            return of(self.flow(option, microbatch, name), operators)
        flow, cost = self.fused(option, microbatch, name, operators)
        if isinstance(operators, str):
            return of(flow, operators)
        made = of(flow, tuple(n for n in operators if n in flow.steps))
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
            sets = self._sets(option, microbatch, name)
            self.lists[at] = [self.price(option, microbatch, name, s) for s in sets]
        return self.lists[at]

    def trades(self, option: TensorOption, microbatch: int, name: str) -> list[Again]:
        """The same, as seconds for bytes kept alone: enough for bounds."""
        option = self.like(option, microbatch, name)
        at = (id(option), microbatch, name)
        if at not in self.traded:
            self.traded[at] = self.lists.get(at) or [
                self.price(option, microbatch, name, s, Flow.traded)
                for s in self._sets(option, microbatch, name)
            ]
        return self.traded[at]

    def _sets(self, option: TensorOption, microbatch: int, name: str) -> list[Operators]:
        size = self.sample(microbatch)
        first = self.like(option, size, name)
        key = (id(first), size, name)
        if key not in self.found:
            self.found[key] = self._corners(first, size, name)
        return [*self.found[key], EVERYTHING]

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
        kind: Kind,
    ) -> Mixtures:
        """Of the blocks of one stage: how many of each unit, and the bytes of a block's cast
        weights that autograd keeps."""
        units = tuple(
            Choices(name, count, self.choices(option, microbatch, name), casts[name])
            for name, count in counts.items()
        )
        key = tuple((u.unit, u.count, id(u.found), u.cast_bytes) for u in units), kind
        if key not in self.mixtures:
            self.mixtures[key] = Mixtures(units, kind)
        return self.mixtures[key]


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
    home = as_they_leave(home, offload)
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
    kind = _kind(blocks, home, types, away)
    mixtures = policies.mix(option, microbatch, counts, weights, kind)
    if away:
        runs = tuple(replace(r, recompute=mixtures.least[n]) if n else r for n, r in of_each)
        least = Stage(runs, bare.tied_elements)
        if ledgers(least, home, types, machine, offload)[0].total > budget_bytes:
            return None
    rank = turning(bare, home, types, machine, offload)
    spare = budget_bytes - standing_bytes(bare, home, types, machine, offload, rank)
    if rank is not None:
        first, _ = beside_bytes(bare, home, types, machine, rank=rank)
        limits = limits_in_turns(of_each, mixtures, rank, spare, first)
    else:
        beside = beside_of(of_each, bare, home, types, machine)
        limits = limits_of(of_each, home, casts, spare, beside, away)
    if home.first_is_fullest and home.microbatches > 1:
        # the backward after the first finds all gradients, and one micro-batch less
        sent = bare.output_bytes if home.sends_on else 0
        spare += sent - gradient_bytes(bare, home, types)
        fewer = replace(home, in_flight=home.in_flight - 1)
        kept = limits_of(of_each, fewer, casts, spare, beside, away).kept_bytes
        kept = min(limits.kept_bytes, kept * home.in_flight / fewer.in_flight)
        limits = replace(limits, kept_bytes=kept)
    if away and (home.turns or not _adjoin(of_each)):
        limits = replace(limits, rooms={})
    for splits in mixtures.within(limits, some=some):
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


def _kind(blocks: Sequence[str], home: Residence, types: Types, away: bool) -> Kind:
    names = [name for name in blocks if name]
    in_order = sum(1 for _ in groupby(names)) == len(set(names))
    if home.zero:
        return Kind(away=away, in_order=in_order, coming=types.compute)
    coming = types.gradients if home.first_is_fullest else 0
    return Kind(away=away, in_order=in_order, coming=coming, cast=cast_bytes(home, types)[0])


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
