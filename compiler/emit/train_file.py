"""What the parts of train.py share: the plan, what follows from it, the text so far."""

from __future__ import annotations

from dataclasses import dataclass, field

from llmspec.compiler.errors import InternalError
from llmspec.compiler.lower import Lowered
from llmspec.compiler.ops import routing
from llmspec.compiler.precision import precision_of
from llmspec.compiler.text import Text
from llmspec.dsl.program import DeviceKind, Option, Program


def literal(value: Option) -> str:
    """A value of the spec as Python source; only plain data gets through."""
    if isinstance(value, tuple):
        inner = ", ".join(literal(v) for v in value)
        return f"({inner},)" if len(value) == 1 else f"({inner})"
    if value is None or isinstance(value, bool | int | float | str):
        return repr(value)
    raise InternalError(f"{value!r} cannot be written into a program")


@dataclass
class TrainFile:
    """train.py while it is printed, and what is read off the plan to print it.

    imports: lines, filled while printing.
    """

    program: Program
    lowered: Lowered
    model_flops_per_token: float
    text: Text = field(default_factory=Text)
    imports: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.plan = self.lowered.plan
        self.train = self.program.train
        self.precision = precision_of(self.train)
        self.staged = len(self.plan.stages) > 1
        self.ramp = self.train.ramp_stages
        calls = {n.target for unit in self.lowered.whole.units.values() for n in unit.calls()}
        self.experts = routing.expert_counts in calls
        inner = (routing.balance_loss, routing.z_loss)
        self.inner_losses = tuple(loss.__name__ for loss in inner if loss in calls)
        # FSDP2 needs to be told of every type that is not the stored one
        shorter = self.precision.mixed or self.precision.reduced != self.precision.stored
        self.typed = shorter and self.plan.zero > 0

    @property
    def stored_on_host(self) -> bool:
        return "parameters" in self.plan.offload

    def home(self) -> str:
        return ", on_host=True" if self.stored_on_host else ""

    def unscaled(self) -> str:
        """An argument of `clip_`, which divides by the loss scale as it clips."""
        return ", loss_scale=self.scale.value" if self.precision.loss_scale else ""

    def predicted(self) -> tuple[float, int, str] | None:
        """Seconds of a step, bytes of the fullest process, and whose; None of a plan that nobody
        priced. A process on a GPU counts what it allocates there, on a CPU all that it has.
        """
        known = self.plan.predicted.get("predicted")
        if not known:
            return None
        size = known["peak_memory_bytes"]
        if self.program.cluster.device.kind is DeviceKind.CPU:
            return known["step_time_s"], size, "of the fullest process"
        size -= known["memory_bytes"]["fixed"]
        return known["step_time_s"], size, "of tensors, on the fullest GPU"

    def peak(self) -> float | None:
        """Peak operations per second of one device, in the type that products run in."""
        peaks = self.program.cluster.device.peak_flops
        return peaks.get(self.precision.matrix) or peaks.get("fp32")
