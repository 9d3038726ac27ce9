"""Which plan is the better one: an order on plans that bounds of them respect."""

from __future__ import annotations

from dataclasses import dataclass

from llmspec.compiler.search.candidates import Candidate
from llmspec.dsl.program import Prefer

Weight = tuple[float, ...]
"""What is preferred first; the smaller the better. The last number is compared to four digits."""

WORTH_OFFLOADING = 1.05
"""How many times slower a plan without offload may be than one with it, and still be chosen."""


def digits(value: float) -> float:
    """To four: what differs by less is not worth a less simple plan."""
    return float(f"{value:.3e}")


@dataclass(frozen=True, slots=True)
class Objective:
    """An order on plans by their step, their peak and their devices.

    No number of a weight falls when one of the three grows. So the weight of bounds bounds the
    weights of plans, number by number, and in the order of tuples: whatever is preferred, the
    search leaves out what it does by this alone.

    exact: nothing is rounded, and host memory is as good as any other.
    """

    prefer: Prefer
    exact: bool = False

    def weight(self, step_s: float, peak_bytes: float, ranks: int) -> Weight:
        match self.prefer:
            case Prefer.THROUGHPUT:
                return (step_s,)
            case Prefer.FEWEST_GPUS:
                return ranks, step_s
            case Prefer.MEMORY:
                return self._rounded(peak_bytes), step_s
            case Prefer.COST:  # all plans take as many steps, on devices of one price
                return self._rounded(step_s * ranks), step_s

    def _rounded(self, value: float) -> float:
        return value if self.exact else digits(value)

    @property
    def worth_offloading(self) -> float:
        """What host memory has to bring, of the step."""
        return 1.0 if self.exact else WORTH_OFFLOADING

    def of(self, found: Candidate) -> Weight:
        """Infinite for what does not fit."""
        step_s = found.step_s * (self.worth_offloading if found.offload else 1.0)
        return self.weight(step_s, found.peak_bytes, found.ranks)

    def rank(self, found: Candidate) -> tuple[object, ...]:
        """The order of plans: the weight, then simplicity."""
        *first, last = self.of(found)
        return (*first, self._rounded(last), *found.simplicity)

    @property
    def smaller_is_better(self) -> bool:
        """Whether a plan that fits can be bettered by one that is smaller and slower."""
        return self.prefer is Prefer.MEMORY
