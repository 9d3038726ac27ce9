"""The `plan { }` block of a spec as a question: may this key have this value?"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum

from llmspec.compiler.cost.offload import CHOICES as OFFLOADS
from llmspec.compiler.cost.offload import Offload
from llmspec.compiler.errors import Unsupported
from llmspec.compiler.kernels.kinds import EAGER, KERNELS
from llmspec.dsl.program import Constraint, Option, Program, Relation

SEARCHED = (
    "data",
    "shard",
    "zero",
    "tensor",
    "context",
    "context_style",
    "expert",
    "sequence",
    "pipeline",
    "interleave",
    "schedule",
    "stages",
    "microbatch",
    "recompute",
    "offload",
    "kernels",
)


def offload_value(offload: Offload) -> Option:
    """As the language has it: `none`, a word, or several."""
    if not offload:
        return "none"
    return offload[0] if len(offload) == 1 else offload


class Recompute(StrEnum):
    """Whether blocks compute again: nothing, what is chosen for each, all, what the spec lists."""

    NONE = "none"
    SELECTIVE = "selective"
    FULL = "full"
    LISTED = "listed"


def plain(value: Option) -> Option:
    """`on` and `off` as booleans, so that both ways of writing them agree."""
    return {"on": True, "off": False}.get(value, value) if isinstance(value, str) else value


@dataclass(frozen=True, slots=True)
class Pins:
    constraints: tuple[Constraint, ...]

    @staticmethod
    def of(program: Program) -> Pins:
        """Errors: Unsupported for a pin that has no meaning yet."""
        for constraint in program.plan:
            if constraint.key not in SEARCHED:
                raise Unsupported(f"the plan key `{constraint.key}`", constraint.span)
        return Pins(program.plan)

    def about(self, key: str) -> list[Constraint]:
        return [c for c in self.constraints if c.key == key]

    def allows(self, key: str, value: Option) -> bool:
        return all(_allows(c, value) for c in self.about(key))

    def allowed(self, key: str, values: Iterable[int]) -> list[int]:
        return [v for v in values if self.allows(key, v)]

    def kernels(self) -> tuple[str, ...]:
        """What may run the operators: PyTorch, one by one, where no line speaks of it."""
        if not self.about("kernels"):
            return (EAGER,)
        return tuple(k for k in KERNELS if self.allows("kernels", k))

    def offloads(self) -> tuple[Offload, ...]:
        """Of all ways to use host memory those that the lines allow."""
        return tuple(o for o in OFFLOADS if self.allows("offload", offload_value(o)))

    def stage_blocks(self) -> tuple[int, ...] | None:
        """The pinned number of blocks of each stage."""
        for constraint in self.about("stages"):
            listed = constraint.values[0]
            if constraint.relation is Relation.EQ and isinstance(listed, tuple):
                return tuple(int(n) for n in listed)  # type: ignore[arg-type]
            if constraint.relation is Relation.EQ:
                return tuple(int(n) for n in constraint.values)  # type: ignore[arg-type]
        return None

    def recompute(self) -> tuple[Recompute, ...]:
        """What blocks may compute again."""
        kinds = (Recompute.NONE, Recompute.SELECTIVE, Recompute.FULL)
        allowed = tuple(kind for kind in kinds if self.allows("recompute", str(kind)))
        return (*allowed, Recompute.LISTED) if self.listing("recompute") else allowed

    def listing(self, key: str) -> Constraint | None:
        """The line that gives a list of names for the key."""
        lines = (c for c in self.about(key) if any(isinstance(v, tuple) for v in c.values))
        return next(lines, None)

    def recomputed_operators(self) -> tuple[str, ...]:
        constraint = self.listing("recompute")
        lists = () if constraint is None else constraint.values
        return tuple(str(n) for v in lists if isinstance(v, tuple) for n in v)


def _allows(constraint: Constraint, value: Option) -> bool:
    if constraint.relation in (Relation.EQ, Relation.IN):
        return plain(value) in tuple(plain(v) for v in constraint.values)
    return constraint.allows(value)
