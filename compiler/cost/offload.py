"""What moves to host memory, what then stays on the device, and what the link to the host costs.

Three things can live there: "optimizer" (its state and a copy of the weights, updated by the CPU),
"parameters" (all that ZeRO 3 stores, gathered from there), "activations" (what autograd keeps of
repeated blocks, from their forward to their backward).
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace

from llmspec.compiler.cost.backward import (
    Backwards,
    Early,
    Moment,
    coming_elements,
    first_moment,
    making,
    working_bytes,
)
from llmspec.compiler.cost.data import GATHER, DataGroups, exposed_s, sent_s, units_of
from llmspec.compiler.cost.hardware import Machine
from llmspec.compiler.cost.memory import Ledger, fullest, gathered_bytes, ledger, peak_of_rank
from llmspec.compiler.cost.passing import Around
from llmspec.compiler.cost.residence import Residence, Turn
from llmspec.compiler.cost.stage import Parts, Run, Stage
from llmspec.compiler.cost.turns import Rank, in_turns
from llmspec.compiler.cost.types import Types

OPTIMIZER, ACTIVATIONS, PARAMETERS = "optimizer", "activations", "parameters"

Offload = tuple[str, ...]
"""What lives in host memory, sorted; () is nothing."""

CHOICES: tuple[Offload, ...] = (
    (),
    (OPTIMIZER,),
    (ACTIVATIONS,),
    (ACTIVATIONS, OPTIMIZER),
    (PARAMETERS,),
    (ACTIVATIONS, PARAMETERS),
)
"""Parameters take the optimizer's state along."""

BUCKETS, MAX_BUCKET_BYTES, AHEAD = 6, 64 * 2**20, 3
"""How runtime/host_optimizer.py cuts gradients, and how many buckets of them are in host memory."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HostLedger:
    """Bytes of host memory of one rank."""

    parameters: int = 0
    gradients: int = 0
    optimizer: int = 0
    activations: int = 0

    @property
    def total(self) -> int:
        return self.parameters + self.gradients + self.optimizer + self.activations

    def parts(self) -> dict[str, int]:
        return asdict(self)


NO_HOST = HostLedger()


# --------------------------------------------------------------------------------------------------
# Bytes


def ledgers(
    stage: Stage, home: Residence, types: Types, machine: Machine, offload: Offload
) -> tuple[Ledger, HostLedger]:
    """Of device and host."""
    home = as_they_leave(home, offload)
    whole = ledger(stage, home, types, machine)
    if not offload:
        return whole, NO_HOST
    there = host_ledger(stage, home, types, offload)
    return device_ledger(whole, stage, home, types, machine, offload), there


def as_they_leave(home: Residence, offload: Offload) -> Residence:
    """Gradients of parameters in host memory go there as they come: none add up on the device."""
    return replace(home, standing=True) if PARAMETERS in offload else home


def peak_of(
    stage: Stage, home: Residence, types: Types, machine: Machine, offload: Offload
) -> Moment:
    """The moment whose activations and buffers are the ledger's."""
    home, in_place = as_they_leave(home, offload), "gradients" in machine.fused
    if ACTIVATIONS in offload and home.turns:
        return in_turns(AwayRank(stage, home, types, in_place))
    if ACTIVATIONS in offload:
        return fullest(stage, home, types, _backwards(stage, home, types, in_place))
    return peak_of_rank(stage, home, types, in_place)


def host_ledger(stage: Stage, home: Residence, types: Types, offload: Offload) -> HostLedger:
    elements = home.parts.largest(stage.elements, stage.expert_elements)
    weights, moments = types.weights * elements, types.moments * elements
    kept = round(home.forwards * stage.away_host_bytes) if ACTIVATIONS in offload else 0
    if PARAMETERS in offload:
        gradients = types.gradients * elements
        return HostLedger(
            parameters=weights, gradients=gradients, optimizer=moments, activations=kept
        )
    if OPTIMIZER in offload:
        bucket = min(types.gradients * elements // BUCKETS, MAX_BUCKET_BYTES)
        return HostLedger(
            parameters=weights, gradients=AHEAD * bucket, optimizer=moments, activations=kept
        )
    return HostLedger(activations=kept)


def device_ledger(
    whole: Ledger, stage: Stage, home: Residence, types: Types, machine: Machine, offload: Offload
) -> Ledger:
    """`whole`, less what lives in host memory."""
    left = whole
    if OPTIMIZER in offload or PARAMETERS in offload:
        left = replace(left, optimizer=0)
    if PARAMETERS in offload:
        arriving = crossing_bytes(stage, home, types, machine, offload)
        left = replace(left, parameters=0, gradients=0, buffers=left.buffers + arriving)
    if ACTIVATIONS in offload:
        peak = peak_of(stage, home, types, machine, offload)
        gathered = gathered_bytes(stage, home, types) + home.message_bytes
        buffers = gathered + peak.buffers + left.buffers - whole.buffers
        sums = peak.gradients + peak.beside.gradients
        gradients = 0 if PARAMETERS in offload else sums
        left = replace(left, activations=peak.activations, gradients=gradients, buffers=buffers)
    return left


def crossing_bytes(
    stage: Stage, home: Residence, types: Types, machine: Machine, offload: Offload
) -> int:
    """On the device, of a unit's stored part on its way to be gathered and a reduced one on its way
    out. On CPUs they are where they were."""
    if PARAMETERS not in offload or not machine.pinned:
        return 0
    largest, _ = stage.largest_units(home.gathers_experts)
    return (types.weights + types.gradients) * -(-largest // home.shards)


def _backwards(stage: Stage, home: Residence, types: Types, in_place: bool) -> Backwards:
    """On the device is what stays of every micro-batch in flight, and of one of them the blocks
    that are here."""
    rank = AwayRank(stage, home, types, in_place)
    around = rank.in_parts
    boundary = stage.output_bytes if home.sends_on else 0
    boundary += stage.left_input_bytes if home.receives else 0
    stays = sum(rank.kept)

    def backward(in_flight: float, coming: int) -> Moment:
        worst = rank.peak_of_part(stage, coming, around, None)
        earlier = round(max(in_flight - 1, 0.0) * stays + in_flight * boundary)
        whole = earlier + worst.activations
        return worst._replace(activations=whole, in_flight=in_flight, earlier=earlier)

    return backward


class AwayRank(Rank):
    """Where activations wait in host memory. Between the parts of a split backward they are on the
    device."""

    def stays(self, run: Run) -> int:
        return run.kept_bytes(*self.casts) - run.away_bytes

    def held_bytes(self, turn: Turn) -> int:
        first = 0 if self.home.receives else 1
        rows = [*zip(turn.held.forwards, self.stage.parts, strict=True)][first:]
        return super().held_bytes(turn) + sum(n * part.left_input_bytes for n, part in rows)

    def peak_of_part(self, part: Stage, coming: int, around: Around, early: Early | None) -> Moment:
        """As a block goes backward the one before it comes back; going forward it leaves meanwhile,
        which is as much."""
        home, types, casts = self.home, self.types, self.casts
        runs = [_use(run, home, casts, early) for run in part.runs]
        below, made = sum(u.count * u.stays for u in runs), 0
        # the last block has not left yet as the forward ends
        here = below + (runs[-2].away if len(runs) > 1 else 0)
        worst, most = first_moment(part, here, making(part, home, types, casts[0], around))
        for i, use, uses in zip(reversed(range(len(runs))), reversed(runs), around, strict=True):
            grown = use.early if early else coming * use.coming
            first = early is not None
            working = working_bytes(part.runs[i], home, types, casts[0], coming, first_part=first)
            # from one use to the one before it sums change evenly, but at both ends of a run
            for place in sorted({*uses, max(use.count - 2, 0)}):
                during, summed = uses.get(place) or uses[1]
                after = summed._replace(summing=during.summing) if early else summed
                back = use.away if place < use.count - 1 else runs[i - 1].away if i else 0
                here, come = below - place * use.freed + back, made + place * grown
                held = here + use.away + use.again
                size = held + come + working + sum(during)
                if size > most:
                    most = size
                    worst = Moment(held, come, working, during, i, place, running=True)
                size = here - use.freed + come + grown + use.turned + sum(after)
                if size > most:
                    most, come = size, come + grown
                    worst = Moment(here - use.freed, come, use.turned, after, i, place + 1)
            below -= use.count * use.freed
            made += use.count * grown
        return worst


@dataclass(frozen=True, slots=True)
class _Use:
    """Each of `count` uses of a unit: bytes that stay on the device, that leave it, that
    recomputing makes, of what stays those that go with its backward; elements of its weights whose
    gradients stay. early, turned: bytes of those of a first part; see backward.Early."""

    count: int
    stays: int
    away: int
    again: int
    freed: int
    coming: int
    early: int
    turned: int


def _use(run: Run, home: Residence, casts: tuple[int, int], early: Early | None) -> _Use:
    late, away = run.cost.late, run.away_bytes
    stays = run.kept_bytes(*casts) - away
    return _Use(
        count=run.count,
        stays=stays,
        away=away,
        again=run.returning_bytes(*casts),
        freed=stays - (late.size_bytes if early else 0),
        coming=coming_elements(run, home),
        early=early.stays * late.early_elements if early else 0,
        turned=early.turned * late.early_elements if early else 0,
    )


# --------------------------------------------------------------------------------------------------
# Seconds


def update_s(
    elements: int, types: Types, machine: Machine, offload: Offload
) -> tuple[float, float] | None:
    """(seconds of the update on the CPU, seconds that the link adds to it); None when the device
    does it. Of the three things that buckets go through, the slowest hides the others."""
    if OPTIMIZER not in offload and PARAMETERS not in offload:
        return None
    moved = elements * (types.gradients + 2 * types.weights + 2 * types.moments + types.scratch)
    update = moved / machine.host_update_bytes_per_s
    if PARAMETERS in offload:
        return update, 0.0
    # the device reads gradients for their norm before they leave
    measured = elements * types.gradients / machine.memory_bytes_per_s
    out = types.gradients * elements / machine.host_link_bytes_per_s
    back = types.weights * elements / machine.host_link_bytes_per_s
    slowest, rest = max(out, update, back), out + update + back - max(out, update, back)
    buckets = max(BUCKETS, types.gradients * elements / MAX_BUCKET_BYTES)
    exposed = rest / buckets if machine.copies_overlap else rest
    return measured + update, slowest + exposed - update


def host_cost(
    stage: Stage,
    groups: DataGroups,
    parts: Parts,
    types: Types,
    machine: Machine,
    offload: Offload,
) -> tuple[float, float]:
    """Exposed seconds of the link to the host, in each micro-batch's forward and backward."""
    forward = backward = 0.0
    share = 1.0 if machine.copies_overlap else 0.0
    if ACTIVATIONS in offload:
        for run in stage.runs:
            each = run.away_bytes / machine.host_link_bytes_per_s
            computing = run.cost.whole_forward_s
            behind = run.cost.whole_backward_s + run.again_s
            forward += run.count * exposed_s(each, computing, share)
            backward += run.count * exposed_s(each, behind, share)
    if PARAMETERS in offload:
        more = _gathered_from_host(stage, groups, parts, types, machine, share)
        forward, backward = forward + more[0], backward + more[1]
    return forward, backward


def _gathered_from_host(
    stage: Stage, groups: DataGroups, parts: Parts, types: Types, machine: Machine, share: float
) -> tuple[float, float]:
    """A unit's part crosses before each gather, its reduced gradient after each backward; they
    hide behind the computing that the collectives leave. The first and the last are in the open."""
    forward = backward = 0.0
    opening = closing = 0.0
    for unit in units_of(stage):
        held = parts.largest(unit.elements, unit.experts)
        into = types.weights * held / machine.host_link_bytes_per_s
        out = types.gradients * held / machine.host_link_bytes_per_s
        gather = machine.overlap * sent_s(GATHER, types.compute, unit, groups)
        free_f = max(0.0, unit.forward_s - gather)
        free_b = max(0.0, unit.backward_s - 2 * gather)
        forward += unit.count * exposed_s(into, free_f, share)
        # one direction each: the link carries both at once
        backward += unit.count * exposed_s(max(into, out), free_b, share)
        opening, closing = max(opening, into), max(closing, out)
    return forward + opening, backward + closing
