"""What no plan of given stages and a given sharing undercuts, whatever its blocks compute again:
the ledger without what blocks keep says how much they may keep, and that how long they compute
again at the least."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise

import numpy as np

from llmspec.compiler.cost.closed import ROUNDING
from llmspec.compiler.cost.floors import beside_bytes, standing_bytes, turning
from llmspec.compiler.cost.offload import ACTIVATIONS, Offload, host_ledger
from llmspec.compiler.cost.rank import Holder
from llmspec.compiler.cost.residence import Residence, Turn, cast_bytes
from llmspec.compiler.cost.stage import Run, Stage
from llmspec.compiler.schedules import stages_of
from llmspec.compiler.search.candidates import Floor, Shape, Way
from llmspec.compiler.search.chain import Chain
from llmspec.compiler.search.pricing import Pricing


@dataclass(frozen=True, slots=True)
class Trade:
    """The least seconds of computing again for the bytes that a stage's blocks keep of one
    micro-batch: a convex line from the fewest bytes to all. No mixture of whole blocks is below
    it. fewest_away: bytes of host memory that each mixture takes."""

    kept: np.ndarray
    seconds: np.ndarray
    fewest_away: int = 0

    @property
    def fewest(self) -> float:
        return float(self.kept[0])

    @property
    def most(self) -> float:
        return float(self.kept[-1])

    def least_s(self, kept: np.ndarray) -> np.ndarray:
        return np.interp(kept, self.kept, self.seconds)


def trade_of(
    blocks: Sequence[tuple[int, Sequence[tuple[float, float]]]], fewest_away: int = 0
) -> Trade:
    """`blocks`: of each unit how many there are, and what each may (keep, take)."""
    kept, pieces = 0.0, []
    for count, points in blocks:
        line = lower_line(points)
        kept += count * line[-1][0]
        for (a, slow), (b, fast) in pairwise(line):
            pieces.append(((slow - fast) / (b - a), count * (b - a), count * (slow - fast)))
    pieces.sort()  # what frees a byte in the least time comes first
    freed = np.cumsum([0.0, *(size for _, size, _ in pieces)])
    spent = np.cumsum([0.0, *(seconds for _, _, seconds in pieces)])
    return Trade((kept - freed)[::-1], spent[::-1], fewest_away)


def lower_line(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The corners of the convex line below all points (bytes, seconds), from the fewest bytes on,
    to the fewest seconds."""
    line: list[tuple[float, float]] = []
    for x, y in sorted(points):
        if line and y >= line[-1][1]:
            continue
        while len(line) > 1 and _above(line[-2], line[-1], (x, y)):
            line.pop()
        line.append((x, y))
    return line


def _above(a: tuple[float, float], b: tuple[float, float], c: tuple[float, float]) -> bool:
    return (b[1] - a[1]) * (c[0] - a[0]) >= (c[1] - a[1]) * (b[0] - a[0])


def _stays(run: Run, casts: tuple[int, int], offload: Offload) -> int:
    """Of what autograd keeps of one use, what no choice of host memory takes off the device."""
    return run.kept_bytes(*casts) - (run.away_bytes if ACTIVATIONS in offload else 0)


@dataclass(frozen=True, slots=True)
class _Alike:
    """Ranks that run equal stages and differ in what is in flight. besides: bytes of what they hold
    whatever blocks keep. holder: the first of them, but for messages. own: the ids of its stages;
    shares: what part of the micro-batches in flight each has; turn: the first of its turns."""

    ranks: np.ndarray
    in_flight: np.ndarray
    forwards: np.ndarray
    besides: np.ndarray
    holder: Holder
    own: tuple[int, ...]
    names: tuple[str, ...]
    shares: tuple[float, ...]
    turn: Turn | None

    def runs(self) -> Iterator[tuple[str, Run, float]]:
        """Each with the unit of its instances, and its stage's share."""
        stage = -1
        for name, run in self.holder.stage.named_runs(self.names):
            stage += run.begins
            yield name, run, self.shares[stage] if self.shares else 1.0

    def home(self, plain: Residence) -> Residence:
        return self.holder.home(plain, turns=() if self.turn is None else (self.turn,))


@dataclass(frozen=True, slots=True)
class _Flying:
    """What a rank holds at the first of its turns, or most of all. See _Alike."""

    rank: int
    holder: Holder
    in_flight: float
    besides: int
    shares: tuple[float, ...] = ()
    turn: Turn | None = None

    def alike(self, microbatches: int) -> tuple[object, ...]:
        """Ranks that have this in common differ in what is in flight alone."""
        holder = self.holder
        if self.turn is not None:
            held = self.turn.held
            gradients = held.come, held.early, held.done
            return self.shares, holder.receives, held.runs, held.kind, *gradients
        every = holder.in_flight >= microbatches
        edges = holder.sends_on, holder.receives, holder.in_flight > 1
        return (*edges, every, holder.awaited)


def _flying(rank: int, holder: Holder) -> _Flying:
    turn = holder.first
    if turn is None:
        return _Flying(rank, holder, holder.in_flight, holder.message_bytes)
    most = max(turn.held.forwards)
    besides = turn.message_bytes + holder.besides
    shares = tuple(n / most for n in turn.held.forwards)
    return _Flying(rank, holder, float(most), besides, shares, turn)


@dataclass
class Floors:
    """`budget_bytes`: what decides how much has to be computed again."""

    chain: Chain
    pricing: Pricing
    budget_bytes: int
    alike: dict[tuple[object, ...], list[_Alike]] = field(default_factory=dict)
    trades: dict[tuple[object, ...], Trade] = field(default_factory=dict)
    spare: dict[tuple[object, ...], tuple[float, float, Trade]] = field(default_factory=dict)
    standing: dict[tuple[object, ...], int] = field(default_factory=dict)
    known: dict[tuple[object, ...], Floor] = field(default_factory=dict)
    of_alike: dict[tuple[int, tuple[int, int], bool], Trade] = field(default_factory=dict)

    def of(self, way: Way, bare: list[Stage], *, free: bool) -> Floor:
        """`bare`: the stages with nothing computed again, in a list that its maker keeps. free:
        whether they may compute again what no choice of the search does."""
        shape = way.shape
        sharing = (shape.grid, shape.microbatches, way.zero, way.shards, way.schedule, way.offload)
        key = (id(bare), *sharing, free)
        if key not in self.known:
            self.known[key] = self._floor(way, bare, free=free)
        return self.known[key]

    def missing(self, way: Way, stages: list[Stage]) -> float:
        """Bytes by which the fullest rank of these stages is too large at the least."""
        if ACTIVATIONS in way.offload:
            return -np.inf
        plain = self.pricing.residence(way.shape, way.zero, way.shards)
        casts = cast_bytes(plain, self.pricing.types)
        worst = -np.inf
        for alike in self._alike(way, stages):
            allowed, _ = self._allowed(way, alike, plain)
            runs = [(share * run.count, run) for name, run, share in alike.runs() if name]
            kept = sum(count * run.kept_bytes(*casts) for count, run in runs)
            worst = max(worst, float(((kept - allowed) * alike.in_flight).max()))
        return worst

    def _floor(self, way: Way, bare: list[Stage], *, free: bool) -> Floor:
        shape, zero, shards, offload = way.shape, way.zero, way.shards, way.offload
        again = np.zeros(shape.grid.pipeline)
        missing = bare_missing = -np.inf
        host = bare_host = 0.0
        if not free:
            plain = self.pricing.residence(shape, zero, shards)
            for alike in self._alike(way, bare):
                allowed, trade = self._allowed(way, alike, plain)
                again[alike.ranks] = trade.least_s(allowed)
                lacks = (trade.fewest - allowed) * alike.in_flight
                missing = max(missing, float(lacks.max()))
                lacks += (trade.most - trade.fewest) * alike.in_flight
                bare_missing = max(bare_missing, float(lacks.max()))
                if offload:
                    home = replace(plain, forwards=float(alike.forwards.max()))
                    there = host_ledger(alike.holder.stage, home, self.pricing.types, offload)
                    away = int(home.forwards * trade.fewest_away)
                    bare_host = max(bare_host, there.total)
                    host = max(host, there.total - there.activations + away)
        # activations in host memory cost at least nothing
        staying = tuple(word for word in offload if word != ACTIVATIONS)
        seconds = self.pricing.least_s(
            shape, bare, zero, shards, way.schedule, staying, again.tolist()
        )
        return Floor(ROUNDING * seconds, missing, bare_missing, host, bare_host)

    def _allowed(self, way: Way, alike: _Alike, plain: Residence) -> tuple[np.ndarray, Trade]:
        """What blocks may keep of one micro-batch, by rank."""
        key = (id(alike), plain, way.offload)
        if key not in self.spare:
            self.spare[key] = self._spare(way, alike, plain)
        spare, others, trade = self.spare[key]
        # a byte more, for the ledger rounds
        return (spare + 1 - alike.besides) / alike.in_flight - others, trade

    def _spare(self, way: Way, alike: _Alike, plain: Residence) -> tuple[float, float, Trade]:
        """(bytes that are left for all micro-batches in flight, what each keeps besides blocks)."""
        casts, offload = cast_bytes(plain, self.pricing.types), way.offload
        stage, standing = alike.holder.stage, self._standing(alike, plain, offload)
        others = 0.0
        for name, run, share in alike.runs():
            others += 0 if name else share * run.count * _stays(run, casts, offload)
        if alike.holder.sends_on:  # of each micro-batch; `standing` has those of the first rank
            others += stage.output_bytes
            standing -= round(alike.holder.in_flight * stage.output_bytes)
        trade = self._trade(way.shape, alike, casts, ACTIVATIONS in offload)
        return self.budget_bytes - standing, others, trade

    def _standing(self, alike: _Alike, plain: Residence, offload: Offload) -> int:
        """What is there whatever blocks keep. Of stages in turns it is the same for all ranks whose
        turn is like this one."""
        own: tuple[object, ...] = (id(alike),)
        if alike.turn is not None:
            held = alike.turn.held
            gradients = held.come, held.early, held.done
            own = (*alike.own, held.runs, held.kind, *gradients, alike.holder.receives)
        key = (*own, plain, offload)
        if key not in self.standing:
            types, machine, stage = self.pricing.types, self.pricing.machine, alike.holder.stage
            home = alike.home(plain)
            rank = turning(stage, home, types, machine, offload)
            standing = standing_bytes(stage, home, types, machine, offload, rank)
            first, _ = beside_bytes(stage, home, types, machine, rank=rank)
            self.standing[key] = standing + first
        return self.standing[key]

    def _trade(self, shape: Shape, alike: _Alike, of_cast: tuple[int, int], away: bool) -> Trade:
        """of_cast: bytes of a cast weight; away: what blocks keep waits in host memory, where it
        can."""
        known = (id(alike), of_cast, away)
        if known not in self.of_alike:
            runs = alike.holder.stage.named_runs(alike.names)
            casts = {name: run.cast_kept_bytes(*of_cast) for name, run in runs if name}
            self.of_alike[known] = self._trade_with(shape, alike, casts, away)
        return self.of_alike[known]

    def _trade_with(
        self, shape: Shape, alike: _Alike, casts: Mapping[str, int], away: bool
    ) -> Trade:
        option, size = shape.option, shape.microbatch
        counts: Counter[tuple[str, float]] = Counter()
        for name, run, share in alike.runs():
            counts[name, share] += run.count if name else 0
        counts = +counts
        key = (id(option), size, away, *counts.items(), *casts.items())
        if key not in self.trades:
            costs = self.chain.costs(option, size)
            blocks, there = [], 0
            for (name, share), count in counts.items():
                cost, cast = costs[name], casts[name]
                leaves = cost.away_bytes if away else 0
                points = [(share * (cost.saved_bytes + cast - leaves), 0.0)]
                fewest = cost.away_host_bytes
                for again in self.chain.policies.trades(option, size, name):
                    kept = again.kept_bytes + (cast if again.keeps_casts else 0)
                    kept -= again.away_bytes if away else 0
                    points.append((share * kept, again.whole_s))
                    fewest = min(fewest, again.away_host_bytes)
                blocks.append((count, points))
                there += count * fewest if away else 0
            self.trades[key] = trade_of(blocks, there)
        return self.trades[key]

    def _alike(self, way: Way, bare: list[Stage]) -> list[_Alike]:
        shape, zero, schedule = way.shape, way.zero, way.schedule
        key = self.pricing.held_key(shape, bare, zero, schedule, way.offload)
        if key not in self.alike:
            groups: dict[tuple[object, ...], list[_Flying]] = {}
            ranks = shape.grid.pipeline
            mine = [stages_of(schedule, rank, len(bare), ranks) for rank in range(ranks)]
            own = [tuple(id(bare[s]) for s in stages) for stages in mine]
            holders = self.pricing.holders(shape, bare, zero, schedule, way.offload)
            for rank, holder in enumerate(holders):
                one = _flying(rank, holder)
                groups.setdefault((own[rank], *one.alike(shape.microbatches)), []).append(one)
            self.alike[key] = [
                _together(same, own[same[0].rank], self._names(shape, mine[same[0].rank]))
                for same in groups.values()
            ]
        return self.alike[key]

    def _names(self, shape: Shape, stages: Sequence[int]) -> tuple[str, ...]:
        """The unit of each instance of some stages, "" for what stands alone."""
        own = (i for s in stages for i in self.chain.instances[slice(*shape.cut[s])])
        return tuple(i.unit if i.prefix else "" for i in own)


def _together(same: Sequence[_Flying], own: tuple[int, ...], names: tuple[str, ...]) -> _Alike:
    first = same[0]
    return _Alike(
        np.array([one.rank for one in same]),
        np.array([one.in_flight for one in same], dtype=float),
        np.array([one.holder.forwards for one in same], dtype=float),
        np.array([one.besides for one in same], dtype=float),
        replace(first.holder, message_bytes=0),
        own,
        names,
        first.shares,
        first.turn,
    )
