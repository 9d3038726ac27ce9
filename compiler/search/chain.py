"""The model's chain as the ranks of a mesh see it: graphs, placements, the costs of units and of
stages. Everything is worked out once and kept, whatever a spec pins."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from itertools import groupby

from llmspec.compiler.cost.fused import with_kernels
from llmspec.compiler.cost.hardware import Machine
from llmspec.compiler.cost.network import inner_groups
from llmspec.compiler.cost.recompute import Again
from llmspec.compiler.cost.recompute import Operators as Recomputed
from llmspec.compiler.cost.stage import Run, Stage
from llmspec.compiler.cost.types import Types
from llmspec.compiler.cost.unit import UnitCost, resolve, unit_cost
from llmspec.compiler.graph import Instance, ModelGraph, Unit
from llmspec.compiler.kernels.kinds import EAGER
from llmspec.compiler.plan import EVERYTHING
from llmspec.compiler.search.meshes import divisors
from llmspec.compiler.search.options import Solved, TensorOption, seen_as, tensor_options
from llmspec.compiler.search.policies import Chosen, Policies
from llmspec.compiler.search.stages import block_starts
from llmspec.compiler.views import WHOLE_VIEW, View, seen

Build = Callable[[int], ModelGraph]
"""The model's graph for micro-batches of so many sequences."""

Operators = tuple[str, ...]
"""The names of all operators of a graph."""


@dataclass
class Chain:
    build: Build
    machine: Machine
    types: Types
    graphs: dict[tuple[int, View], ModelGraph] = field(default_factory=dict)
    operators: dict[int, Operators] = field(default_factory=dict)
    options: dict[tuple[object, ...], list[TensorOption]] = field(default_factory=dict)
    run_by: dict[tuple[int, str], TensorOption] = field(default_factory=dict)
    solved: Solved = field(default_factory=dict)
    unit_costs: dict[tuple[int, int], dict[str, UnitCost]] = field(default_factory=dict)
    like: dict[tuple[int, int, str], UnitCost] = field(default_factory=dict)
    stages: dict[tuple[object, ...], Stage] = field(default_factory=dict)
    least: dict[tuple[int, int], Stage] = field(default_factory=dict)

    def graph(self, microbatch: int, view: View = WHOLE_VIEW) -> ModelGraph:
        """What one rank sees of the model, for micro-batches of so many sequences."""
        key = (microbatch, view)
        if key not in self.graphs:
            self.graphs[key] = self._seen(microbatch, view)
        return self.graphs[key]

    def _seen(self, microbatch: int, view: View) -> ModelGraph:
        """Units that expert ranks see as others do are the same objects for all of them."""
        if view == WHOLE_VIEW:
            return self.build(microbatch)
        if view.expert == 1:
            return seen(self.graph(microbatch), view)
        split = View(expert=view.expert)
        return seen(self.graph(microbatch, replace(view, expert=1)), split)

    @cached_property
    def instances(self) -> tuple[Instance, ...]:
        return self.graph(1).instances

    @cached_property
    def names(self) -> tuple[str, ...]:
        """The unit of each instance."""
        return tuple(i.unit for i in self.instances)

    @cached_property
    def blocks(self) -> int:
        return len(block_starts(self.graph(1)))

    @cached_property
    def least_flops(self) -> float:
        """Of the matrix products of one token, forward and backward, over all ranks together."""
        # the registry fills as the dialect is imported
        from llmspec.compiler.ops.registry import entry_of, shapes_of

        graph, by_unit = self.graph(1), {}
        for name, unit in graph.units.items():
            products = [(n, e) for n in unit.calls() if (e := entry_of(n)).contraction]
            by_unit[name] = sum(
                min(kind(n, shapes_of(n)) for kind in (e.flops, e.model_flops) if kind)
                for n, e in products
            )
        return 3 * sum(by_unit[i.unit] for i in graph.instances) / (graph.sequences * graph.tokens)

    @cached_property
    def policies(self) -> Policies:
        return Policies(self.graph, self.sample, self.machine, self.types)

    def sample(self, microbatch: int) -> int:
        """The micro-batch at which placements and what to compute again are found: one sequence
        serves all whose graphs have the same operators. A traced model may have others there."""
        return 1 if self._operators(microbatch) == self._operators(1) else microbatch

    def _operators(self, microbatch: int) -> Operators:
        if microbatch not in self.operators:
            units = self.graph(microbatch).units.values()
            self.operators[microbatch] = tuple(n.name for unit in units for n in unit.calls())
        return self.operators[microbatch]

    # -- placements

    def tensor_options(
        self, ranks: int, microbatch: int, view: View, sequences: Sequence[bool]
    ) -> list[TensorOption]:
        """`sequences`: whether values between blocks may be split along their tokens."""
        size = self.sample(microbatch)
        key = (ranks, view, self._operators(size), tuple(sequences))
        if key not in self.options:
            self.options[key] = self._placed(ranks, size, view, sequences)
        return self.options[key]

    def with_kernels(self, option: TensorOption, kernels: str) -> TensorOption:
        """The same placements, the operators run by something else."""
        if option.kernels == kernels:
            return option
        key = (id(option), kernels)
        if key not in self.run_by:
            self.run_by[key] = replace(option, kernels=kernels)
        return self.run_by[key]

    def _placed(
        self, ranks: int, size: int, view: View, sequences: Sequence[bool]
    ) -> list[TensorOption]:
        if ranks == 1 and False not in sequences:
            return []
        graph, like = self.graph(size, view), self._placed_like(ranks, view)
        if like != view:
            known = self.tensor_options(ranks, size, like, sequences)
            found = [o for k in known if (o := seen_as(k, graph, view, self.machine))]
            if found:
                return found
        return tensor_options(
            graph, ranks, list(sequences), self.machine, self.types, view, self.solved
        )

    def _placed_like(self, ranks: int, view: View) -> View:
        """The view whose placements serve this one: without context ranks, and of the numbers of
        expert ranks that use the same wires the smallest."""
        if view.expert == 1:
            return replace(view, context=1, style=None)

        def crosses(context: int, expert: int) -> bool:
            return inner_groups(ranks, context, expert, self.machine)["expert"].crosses_nodes

        wires = crosses(view.context, view.expert)
        counts = [n for n in divisors(view.expert) if n > 1 and crosses(1, n) == wires]
        return replace(view, context=1, style=None, expert=counts[0] if counts else view.expert)

    # -- costs

    def costs(self, option: TensorOption, microbatch: int) -> dict[str, UnitCost]:
        """By unit, of one micro-batch with nothing computed again."""
        key = (id(option), microbatch)
        if key not in self.unit_costs:
            self.unit_costs[key] = {
                name: self._cost(option, microbatch, unit)
                for name, unit in self.graph(microbatch, option.view).units.items()
            }
        return self.unit_costs[key]

    def _cost(self, option: TensorOption, microbatch: int, unit: Unit) -> UnitCost:
        first = self.policies.like(option, microbatch, unit.name)
        key = (id(first), microbatch, unit.name)
        if key not in self.like:
            self.like[key] = self._priced(first, microbatch, unit)
        return self.like[key]

    def _priced(self, option: TensorOption, microbatch: int, unit: Unit) -> UnitCost:
        layout = resolve(unit, option.placements[unit.name], option.ranks)
        width, machine = self.types.compute, self.machine
        cost = unit_cost(unit, layout, option.where, machine, width, option.inner)
        if option.kernels == EAGER:
            return cost
        at = (option, microbatch, unit.name)
        return with_kernels(cost, self.policies.apart(*at), self.policies.fused(*at))

    def stage(
        self, option: TensorOption, microbatch: int, chosen: Chosen, start: int, *, alone: bool
    ) -> Stage:
        """Instances from `start` on, one for each choice of what to compute again. `alone`: the
        whole chain is one stage, so that what is tied is there once."""
        stop = start + len(chosen)
        ends = (start == 0, stop == len(self.instances))
        key = (id(option), microbatch, chosen, self.names[start:stop], ends, alone)
        if key not in self.stages:
            again = partial(self.policies.again, option, microbatch)
            self.stages[key] = self._stage(option, microbatch, chosen, start, alone, again)
        return self.stages[key]

    def least_kept(self, option: TensorOption, microbatch: int) -> Stage:
        """The whole chain as one stage whose blocks keep their inputs alone. What they compute
        again for that has no price here: bounds of bytes need no lowered graphs."""
        key = (id(option), microbatch)
        if key not in self.least:
            costs = self.costs(option, microbatch)
            kept = {n: c.input_bytes for n, c in costs.items()}
            inputs = {
                name: Again(operators=EVERYTHING, kept_bytes=n, away_bytes=n, keeps_casts=False)
                for name, n in kept.items()
            }
            chosen = tuple(EVERYTHING if i.prefix else () for i in self.instances)
            self.least[key] = self._stage(
                option, microbatch, chosen, 0, True, lambda name, own: inputs[name] if own else None
            )
        return self.least[key]

    def _stage(
        self,
        option: TensorOption,
        microbatch: int,
        chosen: Chosen,
        start: int,
        alone: bool,
        price: Callable[[str, Recomputed], Again | None],
    ) -> Stage:
        """`price`: of what one use of a unit computes again."""
        costs = self.costs(option, microbatch)
        tied = any(c.tied_elements for c in costs.values())
        last = len(self.instances) - 1

        def kind(index: int) -> tuple[str, Recomputed, bool, bool]:
            instance = self.instances[index]
            own = bool(instance.prefix) or not alone or not tied
            return instance.unit, chosen[index - start], own, 0 < index < last

        runs: list[Run] = []
        for (name, operators, own, block), same in groupby(
            range(start, start + len(chosen)), key=kind
        ):
            again = price(name, operators)
            runs.append(Run(costs[name], len(list(same)), again, own, block, begins=not runs))
        copies = 0 if alone else sum(r.cost.tied_elements * r.count for r in runs)
        return Stage(tuple(runs), copies)
