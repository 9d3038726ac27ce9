"""How long a run is, how long it may take by its deadline, and by what it may cost."""

from __future__ import annotations

from dataclasses import dataclass

from llmspec.dsl.program import Program, Train

HOUR_S = 3600.0


def steps_of(train: Train) -> int | None:
    """Optimizer steps of the run; None when they are not known."""
    if train.steps is None and train.tokens is not None:
        return train.steps_for(train.tokens)
    return train.steps


@dataclass(frozen=True, slots=True)
class Limits:
    """What a budget says about the whole run, as it is predicted: the steps alone."""

    program: Program

    @property
    def any(self) -> bool:
        budget = self.program.budget
        return budget.deadline_s is not None or budget.cost is not None

    def run_s(self, ranks: int) -> float:
        """The longest run that keeps to both."""
        budget, hourly = self.program.budget, self.program.cluster.device.price_per_hour
        most = float("inf") if budget.deadline_s is None else budget.deadline_s
        if budget.cost is not None and hourly:
            most = min(most, budget.cost / (hourly * ranks) * HOUR_S)
        return most

    def step_s(self, ranks: int) -> float:
        """No run with a longer step keeps to them. Steps of a growing batch are left out."""
        train = self.program.train
        steps = steps_of(train)
        if not self.any or steps is None:
            return float("inf")
        final = steps - sum(count for count, _ in train.ramp_stages)
        return self.run_s(ranks) / max(1, final)
