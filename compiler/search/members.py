"""The best member of each family of plans beside the best plan of all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import inf

from llmspec.compiler.search.candidates import Candidate, Family, Floored, Way
from llmspec.compiler.search.descent import Descent, Inside, missing, priced
from llmspec.compiler.search.families import families_of, spoken_of
from llmspec.compiler.search.objective import Objective, Weight
from llmspec.compiler.search.space import Space

EFFORT = 48_000
"""That all families share evenly; what one leaves is there for those that come later."""
PRICING = 40
"""The effort of a whole ledger."""
NO_OFFLOAD = ("offload", "none")


@dataclass
class Tally:
    """The best member of each family that a search has priced. exact: families of which no member
    is better; smallest: of those of which none that fits was found, the smallest that was tried."""

    objective: Objective
    best: dict[Family, Candidate] = field(default_factory=dict)
    exact: set[Family] = field(default_factory=set)
    smallest: dict[Family, Candidate] = field(default_factory=dict)

    def add(self, found: Candidate) -> None:
        """One that fits."""
        for family in families_of(found):
            known = self.best.get(family)
            if known is None or self.objective.rank(found) < self.objective.rank(known):
                self.best[family] = found

    def weight(self, family: Family) -> Weight:
        """Of the best member."""
        return self.objective.of(self.best[family])

    def settle(self, descent: Descent) -> None:
        """After a descent in which all members would have been met."""
        self.exact |= {f for f in self.best if descent.nothing_under(self.weight(f))}


@dataclass
class Members:
    """Looks for what a search for the best plan of all had no reason to look at.

    plain: the spaces without host memory; besides: the plans that use it; mesh: of the best plan of
    all; none_fits: no plain plan does.
    """

    tally: Tally
    inside: Inside
    plain: Sequence[Space]
    besides: Sequence[Space]
    mesh: Mapping[str, str]
    none_fits: bool = False
    considered: int = 0
    effort: float = EFFORT

    def look(self) -> None:
        every = (family for space in (*self.plain, *self.besides) for family in spoken_of(space))
        sought = [f for f in dict.fromkeys(every) if f not in self.tally.exact]
        sought += [NO_OFFLOAD] if self.none_fits else []
        for done, family in enumerate(sought):
            self._look_for(family, max(0.0, self.effort) / (len(sought) - done))

    def _look_for(self, family: Family, share: float) -> None:
        """Near the best plan of all first, then anywhere, then where the smallest are; with host
        memory where it fits only so. Where nothing fits, the smallest of what was tried."""
        smallest, none_fits = Smallest(), True
        parts = (self.besides,) if self.none_fits else (self.plain, self.besides)
        for spaces in (self.plain,) if family == NO_OFFLOAD else parts:
            near = self._descent(family, spaces, near=self.mesh)
            self._fastest(family, near, smallest, share / 4)
            anywhere = self._descent(family, spaces)
            self._fastest(family, anywhere, smallest, share / 2)
            if family not in self.tally.best:
                lowest = self._descent(family, spaces, by_bytes=True)
                none_fits &= self._lowest(family, lowest, smallest, share / 4)
            elif anywhere.nothing_under(self.tally.weight(family)):
                self.tally.exact.add(family)
            if family in self.tally.best:
                return
        if (found := smallest.candidate()) is not None:
            self.tally.smallest[family] = found
            self.tally.exact |= {family} if none_fits else set()

    def _descent(
        self,
        family: Family,
        spaces: Sequence[Space],
        *,
        by_bytes: bool = False,
        near: Mapping[str, str] | None = None,
    ) -> Descent:
        descent = Descent(
            self.tally.objective, self.inside, by_bytes=by_bytes, of=family, near=near
        )
        descent.start(spaces)
        return descent

    def _fastest(self, family: Family, descent: Descent, smallest: Smallest, share: float) -> None:
        tally = self.tally

        def ended(least: Weight) -> bool:
            if descent.effort > share:
                return True
            return family in tally.best and tally.weight(family) <= least

        for space, floored in descent.ways(ended):
            self._price(space, floored, descent, smallest)
        self.effort -= descent.effort

    def _lowest(self, family: Family, descent: Descent, smallest: Smallest, share: float) -> bool:
        """Until one fits. Whether none does, by its bytes."""
        tried = none_fits = False

        def ended(least: Weight) -> bool:
            nonlocal none_fits
            none_fits |= descent.nothing_fits()
            if descent.effort > share and none_fits and not tried:
                descent.narrow()  # one that is too large, whichever
                return False
            if descent.effort > share or family in self.tally.best:
                return True
            return tried and none_fits and smallest.beaten_by(least[0])

        for space, floored in descent.ways(ended):
            tried = True
            self._price(space, floored, descent, smallest)
        self.effort -= descent.effort
        return none_fits and family not in self.tally.best

    def _price(self, space: Space, floored: Floored, descent: Descent, smallest: Smallest) -> None:
        self.considered += 1
        lacking = missing(space, floored)
        if lacking > 0:
            smallest.add(space, floored, lacking)
            return
        descent.effort += PRICING
        found = priced(space, floored)
        if found is not None and found.times is None:
            smallest.priced.append(found)
        elif found is not None and space.in_time(found):
            self.tally.add(found)


@dataclass
class Smallest:
    """Of ways that are too large, that which is so by the fewest bytes at the least; one without
    host memory where there is one."""

    lacking: tuple[bool, float] = (True, inf)
    found: tuple[Space, Way] | None = None
    priced: list[Candidate] = field(default_factory=list)
    """What its floor let pass, and its ledger not."""

    def candidate(self) -> Candidate | None:
        if self.found is not None:
            space, way = self.found
            found = space.priced(way)
            if found is not None and found.times is None:
                self.priced.append(found)
        return min(self.priced, key=peak_bytes, default=None)

    def beaten_by(self, least_bytes: float) -> bool:
        if self.found is None:
            return False
        return least_bytes >= self.found[0].budget_bytes + self.lacking[-1]

    def add(self, space: Space, floored: Floored, lacking: float) -> None:
        size = (floored.way.offload != (), lacking)
        if size < self.lacking:
            self.lacking, self.found = size, (space, floored.way)


def peak_bytes(found: Candidate) -> int:
    return found.peak_bytes
