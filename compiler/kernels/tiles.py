"""Whether a group's kernels fit a multiprocessor.

A kernel that reduces rows holds whole rows: its columns are the next power of two, and what is
alive at once must lie in registers. Any other kernel goes over tiles (runtime/fused.py has both
rules).
"""

from __future__ import annotations

from collections.abc import Sequence

from llmspec.compiler.kernels.group import Group
from llmspec.compiler.ops.formula import OVER_COLUMNS, Expr, in_order

REGISTERS = 48 * 1024
"""Numbers of 4 bytes that one program may hold: three quarters of a multiprocessor's 65,536
registers; the rest is addresses."""


def reduces_rows(roots: Sequence[Expr]) -> bool:
    return any(e.op in OVER_COLUMNS for e in in_order(roots))


def alive(roots: Sequence[Expr]) -> int:
    """The most full values at once, each from where it is made to its last use."""
    order = in_order(roots)
    last = {id(a): i for i, e in enumerate(order) for a in e.args}
    last |= {id(r): len(order) for r in roots if r.op != "column_sum"}
    most, now = 0, 0
    for i, e in enumerate(order):
        full = e.rows and e.columns
        now += full
        most = max(most, now)
        gone = {id(a): a for a in e.args if last[id(a)] == i}
        now -= sum(a.rows and a.columns for a in gone.values())
        if id(e) not in last:
            now -= full
    return most


def fits(group: Group) -> bool:
    """Whether both kernels hold what they must."""
    wide = 1 << (group.columns - 1).bit_length()
    both = (group.written, group.distinct_gradients)
    return all(alive(r) * wide <= REGISTERS for r in both if reduces_rows(r))
