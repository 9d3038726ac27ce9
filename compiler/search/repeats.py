"""What every instance of the chain computes again: the same for all blocks, or for each pipeline
rank the fastest choice that fits."""

from __future__ import annotations

from dataclasses import dataclass, field

from llmspec.compiler.cost.offload import Offload
from llmspec.compiler.cost.rank import Holder
from llmspec.compiler.cost.recompute import Operators
from llmspec.compiler.cost.residence import Residence
from llmspec.compiler.cost.stage import Stage, together
from llmspec.compiler.plan import EVERYTHING
from llmspec.compiler.schedules import stages_of
from llmspec.compiler.search.candidates import Floor, Shape, Way
from llmspec.compiler.search.chain import Chain
from llmspec.compiler.search.floors import Floors
from llmspec.compiler.search.options import TensorOption
from llmspec.compiler.search.pins import Pins, Recompute
from llmspec.compiler.search.policies import Chosen, fitting
from llmspec.compiler.search.pricing import Pricing
from llmspec.compiler.search.stages import Cut

MOMENTS = 3
"""How often ranks of several stages choose again: what they keep decides when they hold most."""


@dataclass
class Repeats:
    chain: Chain
    pricing: Pricing
    pins: Pins
    budget_bytes: int
    of_all: dict[tuple[int, int, Recompute], Chosen] = field(default_factory=dict)
    choices: dict[tuple[object, ...], Chosen | None] = field(default_factory=dict)
    made: dict[tuple[object, ...], list[Stage]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.floors = Floors(self.chain, self.pricing, self.budget_bytes)

    def alike(self, option: TensorOption, microbatch: int, recompute: Recompute) -> Chosen:
        """Of the whole chain where all blocks do the same; nothing where each has its own
        choice."""
        key = (id(option), microbatch, recompute)
        if key not in self.of_all:
            names = dict.fromkeys(i.unit for i in self.chain.instances if i.prefix)
            by_unit = {n: self._of_each(option, microbatch, recompute, n) for n in names}
            self.of_all[key] = tuple(
                by_unit[i.unit] if i.prefix else () for i in self.chain.instances
            )
        return self.of_all[key]

    def _of_each(
        self, option: TensorOption, microbatch: int, recompute: Recompute, name: str
    ) -> Operators:
        match recompute:
            case Recompute.FULL:
                return EVERYTHING
            case Recompute.LISTED:
                names = self.pins.recomputed_operators()
                return self.chain.policies.listed(option, microbatch, name, names)
            case _:
                return ()

    def whole(self, option: TensorOption, microbatch: int, recompute: Recompute) -> Stage:
        """The chain as one stage, all blocks alike."""
        chosen = self.alike(option, microbatch, recompute)
        return self.chain.stage(option, microbatch, chosen, 0, alone=True)

    def fewest(self, option: TensorOption, microbatch: int, recompute: Recompute) -> Stage:
        """The chain as one stage that keeps no more than any choice of `recompute`."""
        if recompute in (Recompute.SELECTIVE, Recompute.FULL):
            return self.chain.least_kept(option, microbatch)
        return self.whole(option, microbatch, recompute)

    def stages(self, shape: Shape, chosen: Chosen) -> list[Stage]:
        """The stages of a shape whose instances compute again what is chosen for each."""
        option, size, alone = shape.option, shape.microbatch, shape.grid.pipeline == 1
        return [
            self.chain.stage(option, size, chosen[start:stop], start, alone=alone)
            for start, stop in shape.cut
        ]

    def known_stages(self, shape: Shape, chosen: Chosen) -> list[Stage]:
        """As `stages`, one list for each choice and way to cut: others know it by its id."""
        key = (id(shape.option), shape.microbatch, chosen, shape.cut)
        if key not in self.made:
            self.made[key] = self.stages(shape, chosen)
        return self.made[key]

    def alike_stages(self, shape: Shape, recompute: Recompute) -> list[Stage]:
        """Where all blocks do the same."""
        return self.known_stages(shape, self.alike(shape.option, shape.microbatch, recompute))

    def bare(self, shape: Shape) -> list[Stage]:
        """Nothing is computed again."""
        return self.alike_stages(shape, Recompute.NONE)

    def floor(self, way: Way) -> Floor:
        """Of the plans that differ in what they compute again alone. Operators that a spec lists
        may free bytes that no choice of the search does."""
        bare = self.bare(way.shape)
        return self.floors.of(way, bare, free=way.shape.recompute is Recompute.LISTED)

    def missing(self, way: Way) -> float:
        """Bytes by which a plan whose blocks compute everything again is too large at the least."""
        return self.floors.missing(way, self.alike_stages(way.shape, Recompute.FULL))

    def chosen(self, way: Way) -> Chosen | None:
        """None where nothing need be computed again."""
        shape, zero, schedule = way.shape, way.zero, way.schedule
        alike = self.alike(shape.option, shape.microbatch, shape.recompute)
        if shape.recompute is not Recompute.SELECTIVE:
            return alike
        bare = self.bare(shape)
        plain = self.pricing.residence(shape, zero, way.shards)
        holders, chosen = self.pricing.holders(shape, bare, zero, schedule, way.offload), None
        for _ in range(MOMENTS):
            homes = [holder.home(plain) for holder in holders]
            chosen = self._at(way, bare, homes)
            if chosen is None:  # nothing fits
                return self.alike(shape.option, shape.microbatch, Recompute.FULL)
            if holders[0].first is None:
                break
            before, found = holders, self.known_stages(shape, chosen)
            holders = self.pricing.holders(shape, found, zero, schedule, way.offload)
            if all(map(_covers, before, holders)):
                break
        assert chosen is not None, "what fits nowhere is left above"
        return chosen if any(chosen) else None

    def _at(self, way: Way, bare: list[Stage], homes: list[Residence]) -> Chosen | None:
        """What every rank chooses at the moment when it holds most; None when one finds nothing
        that fits."""
        shape, schedule, offload = way.shape, way.schedule, way.offload
        out: list[Operators] = [()] * len(self.chain.instances)
        for rank, home in enumerate(homes):
            mine = stages_of(schedule, rank, len(bare), shape.grid.pipeline)
            spans = tuple(shape.cut[s] for s in mine)
            key = (*(id(bare[s]) for s in mine), home, offload)
            if key not in self.choices:
                whole = together([bare[s] for s in mine])
                self.choices[key] = self._for_rank(shape, spans, whole, home, offload)
            found = self.choices[key]
            if found is None:
                return None
            places = [i for a, b in spans for i in range(a, b)]
            for place, own in zip(places, found, strict=True):
                out[place] = own
        return tuple(out)

    def _for_rank(
        self, shape: Shape, spans: Cut, bare: Stage, home: Residence, offload: Offload
    ) -> Chosen | None:
        """The fastest choice for the instances of a rank's stages that fits; None when none
        does."""
        own = [i for a, b in spans for i in self.chain.instances[a:b]]
        some = Recompute.NONE not in self.pins.recompute()  # something has to run again
        return fitting(
            self.chain.policies,
            shape.option,
            shape.microbatch,
            bare,
            tuple(i.unit if i.prefix else "" for i in own),
            home,
            offload=offload,
            budget_bytes=self.budget_bytes,
            some=some,
        )


def _covers(one: Holder, other: Holder) -> bool:
    """Whether the first was weighed at every turn that may be the fullest of the second."""
    return {turn.held for turn in other.turns} <= {turn.held for turn in one.turns}
