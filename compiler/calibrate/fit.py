"""From measured seconds to the constants of a device: those with which the cost model predicts
them."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from llmspec.compiler.calibrate.cases import Case, Operators
from llmspec.compiler.cost.compute import operator_cost, tile_efficiency
from llmspec.compiler.cost.hardware import Machine
from llmspec.compiler.cost.network import collective_s, group
from llmspec.compiler.cost.step import optimizer_s
from llmspec.compiler.cost.types import Types
from llmspec.compiler.ops.registry import entry_of, shapes_of
from llmspec.compiler.placement import Collective

Results = list[dict[str, Any]]
"""Of each process, what the worker leaves: measurements by their kind."""
LEAST_SHARE, MOST_SHARE = 1e-3, 1e3
"""Of the rate that the cost model predicts by itself: beyond it a measurement says nothing, as of
a backward that only hands its gradient on."""


def mean_of(results: Results, kind: str) -> list[Case]:
    """The measurements of one kind, each the mean of all processes."""
    found = []
    for same in zip(*(one[kind] for one in results), strict=True):
        times = {k for k in same[0] if k == "seconds" or k.endswith("_s")}
        means = {k: statistics.fmean(one[k] for one in same) for k in times}
        found.append({**same[0], **means})
    return found


def rate_of(case: Case) -> float:
    return 2.0 * case["rows"] * case["columns"] * case["depth"] / case["seconds"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Rates:
    """peaks: the best product of each type. matmul_efficiency: of the type that trains, what its
    typical product reaches of that beside what its tiles lose."""

    peaks: dict[str, float]
    matmul_efficiency: float
    memory_bytes_per_s: float
    launch_s: float


def rates(results: Results, trains: str) -> Rates:
    products = mean_of(results, "products")
    peaks: dict[str, float] = defaultdict(float)
    for case in products:
        peaks[case["name"]] = max(peaks[case["name"]], rate_of(case))
    count = results[0]["device"]["multiprocessors"]
    typical = statistics.median(
        rate_of(c) / tile_efficiency(c["rows"], c["columns"], c["depth"], count)
        for c in products
        if c["name"] == trains
    )
    (memory,) = mean_of(results, "memory")
    (launch,) = mean_of(results, "launches")
    return Rates(
        peaks=dict(peaks),
        matmul_efficiency=min(1.0, typical / peaks[trains]),
        memory_bytes_per_s=3 * memory["bytes"] / memory["seconds"],
        launch_s=launch["seconds"],
    )


# --------------------------------------------------------------------------------------------------
# Operators


@dataclass
class _Sums:
    """Seconds of all measurements of one operator in one direction."""

    launched: list[float] = field(default_factory=list)
    bare_s: float = 0.0
    spent_s: float = 0.0
    places: int = 0

    def add(self, tiny: bool, spent_s: float, bare_s: float) -> None:
        if tiny:
            self.launched.append(spent_s)
        else:
            self.places += 1
            self.spent_s += spent_s
            self.bare_s += bare_s

    def factors(self, launch_s: float) -> tuple[float, float]:
        """(launches, share of the predicted rate)."""
        launched_s = statistics.fmean(self.launched)
        worked_s = self.spent_s - launched_s * self.places
        share = self.bare_s / worked_s if worked_s > 0 else MOST_SHARE
        return max(launched_s / launch_s, 1e-3), min(max(share, LEAST_SHARE), MOST_SHARE)


def operator_factors(
    results: Results, measured: Operators, machine: Machine, width: int
) -> dict[str, tuple[float, ...]]:
    """Launches and share, forward and backward, of each operator that was measured.

    machine: without any. width: bytes of an element."""
    silent = replace(machine, launch_s=0.0)
    forward: dict[str, _Sums] = defaultdict(_Sums)
    backward: dict[str, _Sums] = defaultdict(_Sums)
    for case in mean_of(results, "operators"):
        one = measured.measured[case["key"]]
        name = entry_of(one.node).name
        cost = operator_cost(one.node, shapes_of(one.node), silent, width)
        for sums, spent_s, bare_s in (
            (forward[name], case["forward_s"], cost.forward_s),
            (backward[name], case["backward_s"], cost.backward_s),
        ):
            sums.add(one.tiny, spent_s, bare_s)
    return {
        name: (*forward[name].factors(machine.launch_s), *backward[name].factors(machine.launch_s))
        for name in sorted(forward)
        if forward[name].places and forward[name].launched
    }


def attention_efficiency(results: Results, measured: Operators, machine: Machine) -> float:
    """Share of the peak at which the cost model's kernel of attention takes what was measured."""
    both = _Sums()
    silent = replace(machine, launch_s=0.0, attention_flops=machine.peak_flops)
    for case in mean_of(results, "operators"):
        one = measured.measured[case["key"]]
        if entry_of(one.node).tiled is not None:
            cost = operator_cost(one.node, shapes_of(one.node), silent, 1)
            spent_s = case["forward_s"] + case["backward_s"]
            both.add(one.tiny, spent_s, cost.forward_s + cost.backward_s)
    return min(1.0, both.factors(machine.launch_s)[1])


def update_factors(results: Results, types: Types, machine: Machine) -> tuple[float, float]:
    small, large = mean_of(results, "updates")
    silent = replace(machine, launch_s=0.0)
    bare_s = optimizer_s(large["elements"], types, silent)
    worked_s = max(large["seconds"] - small["seconds"], 1e-9)
    share = min(max(bare_s / worked_s, LEAST_SHARE), MOST_SHARE)
    return launches_of(small["seconds"], machine), share


# --------------------------------------------------------------------------------------------------
# Collectives


@dataclass(frozen=True, slots=True, kw_only=True)
class Link:
    bytes_per_s: float
    latency_s: float
    collectives: dict[str, tuple[float, ...]]


def line(points: Iterable[tuple[float, float]]) -> tuple[float, float]:
    """(seconds of no bytes, seconds a byte): the line that misses the points by the least squares
    of the shares that it misses them by. Neither is less than nothing."""
    known = list(points)
    weights = [1 / max(t, 1e-9) ** 2 for _, t in known]
    total = sum(weights)
    x = sum(w * s for w, (s, _) in zip(weights, known, strict=True)) / total
    y = sum(w * t for w, (_, t) in zip(weights, known, strict=True)) / total
    spread = sum(w * (s - x) ** 2 for w, (s, _) in zip(weights, known, strict=True))
    both = sum(w * (s - x) * (t - y) for w, (s, t) in zip(weights, known, strict=True))
    slope = both / spread
    if slope <= 0:  # noise: then the largest message is the best that is known
        slope = max(known)[1] / max(known)[0]
    return max(y - slope * x, 1e-7), slope


def link(results: Results, world: int, unit: Machine) -> Link:
    """The all-reduce says what the link is; each kind, how far it differs.

    unit: a machine whose link moves a byte a second and waits a second."""
    points: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for case in mean_of(results, "collectives"):
        # a message goes there and back
        seconds = case["seconds"] / (2 if case["kind"] == "send" else 1)
        points[case["kind"]].append((case["bytes"], seconds))
    found = {}
    for kind, known in points.items():
        where = group(2 if kind == "send" else world, 1, unit)
        still_s = collective_s(Collective(kind), 1e-12, where)
        a_byte_s = collective_s(Collective(kind), 1.0, where) - still_s
        waited_s, byte_s = line(known)
        found[kind] = waited_s / still_s, a_byte_s / byte_s
    latency_s, rate = found["all_reduce"]
    paces: dict[str, tuple[float, ...]] = {
        kind: (waited / latency_s, own / rate) for kind, (waited, own) in found.items()
    }
    return Link(bytes_per_s=rate, latency_s=latency_s, collectives=paces)


def weight_factors(results: Results, machine: Machine) -> tuple[float, ...]:
    (one,) = mean_of(results, "weights")
    return launches_of(one["forward_s"], machine), 1.0, launches_of(one["backward_s"], machine), 1.0


def unit_factors(results: Results, machine: Machine, world: int) -> tuple[float, ...]:
    """What a unit of ZeRO's takes beside its collectives, which the machine knows. The smaller
    unit says the launches, the larger one the rate of its copies; float32 throughout."""
    small, large = mean_of(results, "units")
    where = group(world, 1, machine)
    found: list[float] = []
    for direction, kinds in (
        ("forward_s", (Collective.ALL_GATHER,)),
        ("backward_s", (Collective.ALL_GATHER, Collective.REDUCE_SCATTER)),
    ):
        rest = []
        for case in (small, large):
            sent = sum(collective_s(kind, 4 * case["width"] ** 2, where) for kind in kinds)
            rest.append(max(case[direction] - sent, 1e-9))
        worked_s = max(rest[1] - rest[0], 1e-9)
        bare_s = 8 * large["width"] ** 2 / machine.memory_bytes_per_s
        share = min(max(bare_s / worked_s, LEAST_SHARE), MOST_SHARE)
        found += [launches_of(rest[0], machine), share]
    return tuple(found)


def launches_of(seconds: float, machine: Machine) -> float:
    return max(seconds / machine.launch_s, 1e-3)


# --------------------------------------------------------------------------------------------------
# A whole program


def sustained(predicted: Mapping[str, float], measured_s: float) -> float:
    """What a step keeps of rates measured alone, from a program's step on one device.

    predicted: its parts in seconds, at rates that lose nothing."""
    rest = sum(s for name, s in predicted.items() if name != "compute")
    return min(1.0, predicted["compute"] / max(measured_s - rest, 1e-9))
