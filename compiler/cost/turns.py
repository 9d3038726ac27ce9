"""The fullest moment of a rank with several stages, or whose backwards have two parts: each stage
goes backward in its turn, while the others hold what they hold."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate

from llmspec.compiler.cost.backward import Early, Moment, peak_of_one
from llmspec.compiler.cost.passing import NOTHING, Around, Beside, passing
from llmspec.compiler.cost.residence import Residence, Turn, cast_bytes, sums_bytes
from llmspec.compiler.cost.stage import Run, Stage
from llmspec.compiler.cost.types import Types
from llmspec.compiler.schedules import ALL, EARLY, NONE


def in_turns(rank: Rank) -> Moment:
    """Of all the turns of its residence."""
    return max(map(rank.moment, rank.home.turns), key=lambda moment: moment.total)


@dataclass(frozen=True)
class Rank:
    """Several stages, as one: `parts` of it go backward in turn."""

    stage: Stage
    home: Residence
    types: Types
    in_place: bool

    @cached_property
    def known(self) -> dict[tuple[int, str, int, int], Moment]:
        """Peaks of parts by themselves: stage, kind, which of its gradients have come, and wait."""
        return {}

    @cached_property
    def begins(self) -> list[int]:
        """The place of each part's first run."""
        return list(accumulate((len(part.runs) for part in self.stage.parts), initial=0))

    @cached_property
    def whole(self) -> Around:
        """Where the backwards before were whole."""
        return self._passing(split=False)

    @cached_property
    def in_parts(self) -> Around:
        """Where they were in two parts."""
        return self._passing(split=True)

    def _passing(self, *, split: bool) -> Around:
        home = replace(self.home, split=self.home.split and split)
        if len(self.stage.parts) > 1 and home.microbatches > 1:
            # a turn is not the last one, with which the whole sums of ZeRO 1 leave
            home = replace(home, in_flight=max(home.in_flight, 2.0))
        return passing(self.stage, home, self.types, self.in_place)

    @cached_property
    def casts(self) -> tuple[int, int]:
        return cast_bytes(self.home, self.types)

    @cached_property
    def kept(self) -> list[int]:
        return [sum(r.count * self.stays(r) for r in part.runs) for part in self.stage.parts]

    def stays(self, run: Run) -> int:
        """What one use keeps on the device."""
        return run.kept_bytes(*self.casts)

    @cached_property
    def sums(self) -> list[int]:
        """Bytes of all gradients of each part, when they have come."""
        home, types = self.home, self.types
        whole = [sums_bytes(p.elements, p.expert_elements, home, types) for p in self.stage.parts]
        # the replicas' sum of each part of a gradient stands beside those that are added up
        waits = home.split and home.sums_each_time and home.data > home.shards
        return [2 * size for size in whole] if waits else whole

    @property
    def early_width(self) -> int:
        """Of each element whose gradient comes in the first part of a backward. ZeRO 2 and 3 sum it
        with those of the second, and until then it is kept in the type of the sum."""
        return self.types.gradients if self.home.zero == 0 else self.types.reduced

    def moment(self, turn: Turn) -> Moment:
        """The fullest of one turn."""
        held, at = turn.held, turn.held.runs
        key = at, held.kind, held.come[at], held.early[at]
        if key not in self.known:
            self.known[key] = self._alone(turn)
        peak = self.known[key]
        earlier = self.held_bytes(turn) - (0 if held.kind == "W" else self.kept[at])
        come, waiting = self.gradients(turn)
        if held.kind == "I" and self.home.sums_each_time:
            come, waiting = come - peak.gradients, waiting + peak.gradients
        return peak._replace(
            activations=earlier + peak.activations,
            gradients=peak.gradients + come,
            beside=peak.beside._replace(summing=peak.beside.summing + waiting),
            in_flight=self.home.in_flight,
            begin=self.begins[at],
            kind=held.kind,
            earlier=earlier,
            run=peak.run + self.begins[at] if peak.run >= 0 else -1,
            messages=turn.message_bytes - self.home.message_bytes,
        )

    def held_bytes(self, turn: Turn) -> int:
        """What is kept of all micro-batches."""
        held = turn.held
        rows = zip(
            held.forwards, held.late, self.kept, self.home.sends, self.stage.parts, strict=True
        )
        return sum(
            ahead * (size + (part.output_bytes if sends else 0)) + late * part.late_bytes
            for ahead, late, size, sends, part in rows
        )

    @property
    def always(self) -> bool:
        """Buckets of data ranks that share none are there all the time."""
        return self.home.standing or (self.home.zero == 0 and self.home.data > 1)

    def gradients(self, turn: Turn) -> tuple[int, int]:
        """Bytes of those that have come before it, and of those that wait to be summed with what
        the second part makes."""
        held, home = turn.held, self.home
        there = waiting = 0
        rows = zip(held.come, held.early, held.done, self.sums, self.stage.parts, strict=True)
        for come, waits, done, whole, part in rows:
            early = self.early_width * part.early_elements
            if home.sums_each_time:
                waiting += early * waits
            if done and home.zero == 1 and not self.always:
                there += self._share(part)  # whole sums have left
            elif come == ALL or self.always:
                there += whole
            elif come == EARLY and not home.sums_each_time:
                there += early
        return there, waiting

    def _share(self, part: Stage) -> int:
        """Of its summed gradients."""
        parts = self.home.parts.largest(part.elements, part.expert_elements)
        return self.types.gradients * parts

    def around(self, turn: Turn) -> Around:
        """Of the stage whose turn it is."""
        at, runs = turn.held.runs, len(self.stage.runs)
        around = self.whole if turn.held.kind == "B" else self.in_parts
        return around[runs - self.begins[at + 1] : runs - self.begins[at]]

    def _alone(self, turn: Turn) -> Moment:
        """Of the stage whose turn it is, and of one micro-batch."""
        held, home, types = turn.held, self.home, self.types
        part, around, come = self.stage.parts[held.runs], self.around(turn), held.come[held.runs]
        if held.kind == "W":
            return self._second_part(part, around, grows=come != ALL and not self.always)
        coming = types.gradients if come == NONE and held.kind == "B" and not self.always else 0
        early = None
        if held.kind == "I":
            there = held.early[held.runs] if home.sums_each_time else come != NONE or self.always
            turned = types.compute if home.sums_each_time else 0
            early = Early(0 if there else self.early_width, turned)
        return self.peak_of_part(part, coming, around, early)

    def peak_of_part(self, part: Stage, coming: int, around: Around, early: Early | None) -> Moment:
        """Of one micro-batch's backward, or the first part of one."""
        return peak_of_one(part, self.types, self.casts, coming, around, self.home, early)

    def _second_part(self, part: Stage, around: Around, *, grows: bool) -> Moment:
        """Gradients of matrices alone; what a unit kept for them is there until its last has come.
        grows: none has come before."""
        worst = Moment(run=len(part.runs) - 1)
        kept = made = 0  # less than before, more than before
        for index, uses in zip(reversed(range(len(part.runs))), around, strict=True):
            run = part.runs[index]
            late, grown = run.cost.late.size_bytes, self._late_bytes(run) if grows else 0
            working = self._working(run)
            for place, (_, after) in uses.items():
                beside = self._summed(run, after)
                here = Moment(
                    activations=kept - place * late,
                    gradients=made + place * grown,
                    working=0 if beside.summing else working,
                    beside=beside,
                    run=index,
                    done=place,
                    running=True,
                )
                worst = max(worst, here, key=lambda moment: moment.total)
            kept -= run.count * late
            made += run.count * grown
            through = Moment(kept, made, run=index, done=run.count)
            worst = max(worst, through, key=lambda moment: moment.total)
        return worst

    def _late_bytes(self, run: Run) -> int:
        """Of the gradients of one use that come in the second part."""
        return sums_bytes(run.cost.late_elements, 0, self.home, self.types)

    def _working(self, run: Run) -> int:
        """Of a use that makes its matrices' gradients, where they are not summed."""
        cost, types = run.cost, self.types
        if self.home.zero:
            return types.compute * cost.late_elements
        cast = self.casts[0]
        return (cast + types.gradients if cast else types.compute) * cost.largest_elements

    def _summed(self, run: Run, after: Beside) -> Beside:
        """A unit's gradients as they are summed; those of the first part are there in its type."""
        if not after.summing:
            return NOTHING
        turned = self.types.compute * run.cost.late.early_elements
        return Beside(summing=after.summing - turned)
