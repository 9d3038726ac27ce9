"""The points of the space of plans, from outline to priced candidate."""

from __future__ import annotations

from dataclasses import dataclass
from math import inf

from llmspec.compiler.cost.memory import Ledger
from llmspec.compiler.cost.offload import NO_HOST, HostLedger, Offload
from llmspec.compiler.cost.recompute import Operators
from llmspec.compiler.cost.step import Times
from llmspec.compiler.kernels.kinds import KERNELS
from llmspec.compiler.plan import MeshSizes
from llmspec.compiler.schedules import Schedule
from llmspec.compiler.search.meshes import Grid
from llmspec.compiler.search.options import TensorOption
from llmspec.compiler.search.pins import Recompute
from llmspec.compiler.search.stages import Cut
from llmspec.compiler.views import View

Family = tuple[str, str]
"""("tensor", "8"), ("zero", "3"), ("precision", "bf16") …"""

SIMPLER = (
    Schedule.ONE_F_ONE_B,
    Schedule.GPIPE,
    Schedule.INTERLEAVED,
    Schedule.ZERO_BUBBLE,
    Schedule.ZBV,
    Schedule.DUALPIPEV,
)
"""All schedules, the simplest first."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sketch:
    """A mesh and a micro-batch before operators are placed. Bounds as in Outline; 0: not known."""

    grid: Grid
    view: View
    microbatch: int
    microbatches: int
    least_s: float = 0.0
    least_bytes: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Outline:
    """A candidate before its stages are cut.

    least_s: no plan of this outline has a shorter step; least_bytes: nor a lower peak;
        least_whole_bytes: nor a lower one without ZeRO. busy_s, late_s: of one micro-batch on the
        whole chain, and what of it a split backward leaves for later. sharp: `least_s` counts what
        has to be computed again, which takes integer programs to know.
    """

    option: TensorOption
    grid: Grid
    microbatch: int
    microbatches: int
    recompute: Recompute
    least_s: float
    least_bytes: float
    least_whole_bytes: float
    busy_s: float = 0.0
    late_s: float = 0.0
    sharp: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Sharing:
    """An outline whose data ranks share in one way. Bounds as in Outline. busy_s: with what sharing
    adds to a micro-batch; end_s: what a step takes besides."""

    outline: Outline
    zero: int
    shards: int
    least_s: float
    least_bytes: float
    busy_s: float
    end_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """A sharing under one schedule, with so many stages on a rank, before these are cut."""

    sharing: Sharing
    interleave: int
    schedule: Schedule
    offload: Offload
    least_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """What a candidate's stages depend on: all but how the data ranks share."""

    option: TensorOption
    grid: Grid
    microbatch: int
    microbatches: int
    recompute: Recompute
    cut: Cut


@dataclass(frozen=True, slots=True, kw_only=True)
class Way:
    """A plan before it is known what its blocks compute again."""

    shape: Shape
    zero: int
    shards: int
    schedule: Schedule
    offload: Offload = ()

    @property
    def key(self) -> tuple[object, ...]:
        """Options are known by their ids: whoever makes them keeps them."""
        shape = self.shape
        made = (id(shape.option), shape.grid, shape.microbatch, shape.recompute, shape.cut)
        return *made, self.zero, self.shards, self.schedule, self.offload


@dataclass(frozen=True, slots=True)
class Floor:
    """What no plan of a way undercuts. least_s: of a step. missing_bytes: by how much the fullest
    rank is too large at the least, not positive where it may fit; bare_missing_bytes: with nothing
    computed again. host_bytes: of host memory, of the rank that has most there; bare_host_bytes as
    before."""

    least_s: float
    missing_bytes: float = -inf
    bare_missing_bytes: float = -inf
    host_bytes: float = 0.0
    bare_host_bytes: float = 0.0


@dataclass(frozen=True, slots=True)
class Floored:
    """A way with what no plan of it undercuts."""

    way: Way
    floor: Floor


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """One plan with its price. `times` is None when it does not fit.

    choices: what it makes of the keys of the train block that are left open; choice: which of the
        ways to do that, in the order written.
    """

    shape: Shape
    zero: int
    shards: int
    schedule: Schedule
    ledger: Ledger
    times: Times | None = None
    offload: Offload = ()
    host: HostLedger = NO_HOST
    recompute: tuple[Operators, ...] = ()
    """What each instance of the chain computes again."""
    choices: tuple[Family, ...] = ()
    choice: int = 0

    @property
    def mesh(self) -> MeshSizes:
        return self.shape.grid.mesh(self.shards)

    @property
    def interleave(self) -> int:
        """Stages on each pipeline rank."""
        return len(self.shape.cut) // self.shape.grid.pipeline

    @property
    def parts(self) -> int:
        """Into how many parts ZeRO cuts what it shards."""
        return self.shards * self.shape.grid.context if self.zero else 1

    @property
    def peak_bytes(self) -> int:
        return self.ledger.total

    @property
    def step_s(self) -> float:
        return float("inf") if self.times is None else self.times.total

    @property
    def ranks(self) -> int:
        return self.shape.grid.ranks

    @property
    def simplicity(self) -> tuple[object, ...]:
        """What decides between plans of equal time: the fewer kinds of parallelism the better."""
        shape = self.shape
        return (
            self.choice,
            len(self.offload),
            shape.grid.pipeline,
            shape.grid.tensor,
            shape.grid.context,
            shape.grid.expert,
            self.zero,
            self.zero > 0 and self.shards < shape.grid.data,
            -self.shards,
            list(Recompute).index(shape.recompute),
            shape.microbatches,
            self.interleave,
            SIMPLER.index(self.schedule),
            shape.option.sequence,
            shape.option.view.style or "",
            shape.option.leaning != "time",
            KERNELS.index(shape.option.kernels),
            shape.cut,
        )
