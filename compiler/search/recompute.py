"""What to compute again within one unit: the exact trade of seconds for bytes, by linear programs.

Between 0 and 1: which operators run again, which values are kept. A value that some operator keeps
for its backward, or that an operator reads which runs again, is kept unless what makes it runs
again; each operator runs again at most once, whoever asks. The program is that of a least cut (a
value is cut off where somebody needs it and nothing makes it again), so that its answers are whole:
of one that is not, what exceeds a half is an answer as good. Bytes have a price: every answer at
some price is a corner of the trade, and two neighbouring corners give the price between them, until
no corner is left. Mixtures of corners over a stage's blocks are its line."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array

from llmspec.compiler.cost.recompute import Again, Flow

DEAREST = 1e4
"""Times what the unit's average byte costs: beyond that nobody asks for another byte."""
MICROSECOND = 1e-6
TIE = 1e-6
"""Microseconds added per operator and its place: of equal answers the one that runs the fewest."""


class Program:
    """The program of one unit, solved at several prices."""

    def __init__(self, flow: Flow):
        self.flow = flow
        self.steps = flow.candidates()
        self.column = {s.name: i for i, s in enumerate(self.steps)}
        self.values = [v for v in flow.values() if v in self._may_be_kept()]
        self.value_column = {v: len(self.steps) + i for i, v in enumerate(self.values)}
        rows, bounds = self._rows()
        data = [x for row in rows for x in row.values()]
        columns = [j for row in rows for j in row]
        lines = [i for i, row in enumerate(rows) for _ in row]
        shape = (len(rows), len(self.steps) + len(self.values))
        matrix = csr_array((data, (lines, columns)), shape=shape)
        self.constraints = LinearConstraint(matrix, np.array(bounds), np.inf)
        self.seconds = np.array([s.whole_s for s in self.steps] + [0.0] * len(self.values))
        sizes = [float(flow.size_bytes(v)) for v in self.values]
        self.bytes = np.array([-float(s.extra_bytes) for s in self.steps] + sizes)
        ties = [TIE * (1 + i / len(self.steps)) for i in range(len(self.steps))]
        self.ties = np.array(ties + [0.0] * len(self.values))

    def _may_be_kept(self) -> set[str]:
        read = {v for s in self.steps for v in s.reads}
        return self.flow.kept_values() | read

    def _rows(self) -> tuple[list[dict[int, float]], list[float]]:
        """Each says that a sum of variables is at least its bound."""
        rows: list[dict[int, float]] = []
        bounds: list[float] = []
        saved = self.flow.kept_values()
        for value in self.values:
            made = {self.value_column[value]: 1.0}
            if value in self.column:
                made[self.column[value]] = 1.0
            if value in saved:
                rows.append(made)
                bounds.append(1.0)
            for step in self.steps:
                if value in step.reads:
                    rows.append(made | {self.column[step.name]: -1.0})
                    bounds.append(0.0)
        return rows, bounds

    def solve(self, price: float) -> tuple[str, ...]:
        """The operators to run again at `price` seconds for a byte kept."""
        cost = (self.seconds + price * self.bytes) / MICROSECOND + self.ties
        answer = milp(
            cost,
            bounds=Bounds(0, 1),
            constraints=self.constraints,
        )
        assert answer.status == 0, "to keep everything is always possible"
        chosen = {s.name for s in self.steps if answer.x[self.column[s.name]] > 0.5}
        runs = self.flow.needed(chosen)
        return tuple(name for name in self.flow.steps if name in runs)


def corners(flow: Flow) -> tuple[tuple[str, ...], ...]:
    """The sets of operators that are best at some price, from nothing to the fewest bytes."""
    if not flow.candidates():
        return ((),)
    program = Program(flow)
    priced: dict[tuple[str, ...], Again] = {(): flow.traded(())}
    fewest = program.solve(DEAREST * sum(program.seconds) / max(priced[()].kept_bytes, 1))
    priced.setdefault(fewest, flow.traded(fewest))
    nothing: tuple[str, ...] = ()
    todo = [(nothing, fewest)] if fewest else []
    while todo:
        left, right = todo.pop()
        a, b = priced[left], priced[right]
        freed = a.kept_bytes - b.kept_bytes
        if freed <= 0 or b.whole_s <= a.whole_s:
            continue
        price = (b.whole_s - a.whole_s) / freed
        found = program.solve(price)
        made = priced.setdefault(found, flow.traded(found))
        line = a.whole_s + price * a.kept_bytes
        if found not in (left, right) and made.whole_s + price * made.kept_bytes < line * (
            1 - 1e-9
        ):
            todo += [(left, found), (found, right)]
        elif found not in (left, right):
            del priced[found]
    return best(priced.values())


def best(found: Iterable[Again]) -> tuple[tuple[str, ...], ...]:
    """Those that no other beats in both seconds and bytes, from the most bytes to the fewest."""
    out: list[Again] = []
    for one in sorted(found, key=lambda a: (a.kept_bytes, a.whole_s, a.operators)):
        if not out or one.whole_s < out[-1].whole_s:
            out.append(one)
    return tuple(o.operators for o in reversed(out) if isinstance(o.operators, tuple))
