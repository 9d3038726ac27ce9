"""What a spec means: the frozen, unit-checked value that `dsl` hands to the compiler.

Everything is in base units (bytes, seconds, bytes/s, operations/s, tokens, sequences), every
default is
filled in, every template is instantiated, every name is resolved. Nothing here knows syntax; spans
are
kept only so that later phases can point at the user's file.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from math import gcd

from llmspec.dsl.tuned import TunedKernels

Scalar = bool | int | float | str | None
"""A value that an operator's option can hold (tuples of scalars too)."""

Option = Scalar | tuple["Option", ...]


@dataclass(frozen=True, slots=True)
class Span:
    """A stretch of the user's file. Lines and columns count from 1; `end_column` is exclusive."""

    path: str
    line: int
    column: int
    end_line: int
    end_column: int


# --------------------------------------------------------------------------------------------------
# Models


@dataclass(frozen=True, slots=True)
class Ref:
    """A value by name: a block's input, an assigned name, or a binding of the model's body."""

    name: str


@dataclass(frozen=True, slots=True)
class Number:
    """A plain number inside tensor arithmetic (`0.5 * x`)."""

    value: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Arithmetic:
    """Element-wise `left op right`, op one of + - * /."""

    op: str
    left: Expr
    right: Expr
    span: Span


@dataclass(frozen=True, slots=True, kw_only=True)
class Operator:
    """One use of a built-in operator.

    operator: its name in the language (`attention`).
    name: the instance, unique in its block or model body (`attention`, `rmsnorm_2`); two uses with
        one
        name share their parameters (`let`).
    inputs: in the operator's declared order; inputs that were left out (`over=`) are not there.
    options: every declared option with its value, defaults filled in, flags as bools; sorted by
        name. Some are calls: `expert=swiglu(ffn=512)`.
    """

    operator: str
    name: str
    inputs: tuple[Expr, ...]
    options: tuple[tuple[str, Option | Call], ...]
    span: Span

    def option(self, name: str) -> Option | Call:
        return dict(self.options)[name]

    def call(self, name: str) -> Call | None:
        """An option that is a call, or none."""
        value = self.option(name)
        return value if isinstance(value, Call) else None


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockUse:
    """One use of a block. `name` as for `Operator`; `inputs` in the order of the block's
    parameters.
    """

    block: str
    name: str
    inputs: tuple[Expr, ...]
    span: Span


Expr = Ref | Number | Arithmetic | Operator | BlockUse


@dataclass(frozen=True, slots=True, kw_only=True)
class Assign:
    target: str
    value: Expr
    span: Span


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """A block maps its inputs to the final value of the first one. Each use has its own
    parameters.
    """

    name: str
    inputs: tuple[str, ...]
    body: tuple[Assign, ...]
    span: Span


@dataclass(frozen=True, slots=True, kw_only=True)
class Repeat:
    """`count` rounds of `body`, the output of each use feeding the first input of the next.

    The first use of the first round reads `input`; further inputs of a use (`src=`) are the same in
    every
    round. In `body`, the fed input is written `Ref("")`.
    """

    count: int
    body: tuple[Operator | BlockUse, ...]
    input: Ref
    span: Span


@dataclass(frozen=True, slots=True, kw_only=True)
class Binding:
    """`name` is unique in the model's body; later bindings refer to it by `Ref(name)`."""

    name: str
    value: Operator | BlockUse | Repeat | Arithmetic


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """A model written in the language, its parameters bound.

    inputs: the free names of the body (`tokens`, or `source` and `target`).
    body: bindings in order; the last one is the model's output (logits).
    """

    name: str
    vocab: int
    context: int
    width: int
    inputs: tuple[str, ...]
    blocks: tuple[Block, ...]
    body: tuple[Binding, ...]
    span: Span

    def block(self, name: str) -> Block:
        return next(b for b in self.blocks if b.name == name)


@dataclass(frozen=True, slots=True, kw_only=True)
class PythonModel:
    """`python("file.py", "Class", name=value …)`; `path` is relative to the spec's folder."""

    name: str
    path: str
    attribute: str
    arguments: tuple[tuple[str, Option], ...]
    span: Span


@dataclass(frozen=True, slots=True, kw_only=True)
class HuggingFaceModel:
    """`huggingface("config.json")`."""

    name: str
    path: str
    span: Span


AnyModel = Model | PythonModel | HuggingFaceModel


# --------------------------------------------------------------------------------------------------
# Hardware


class DeviceKind(StrEnum):
    GPU = "gpu"
    CPU = "cpu"


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """One GPU, or one CPU process.

    memory_bytes: nominal; usable_bytes: what a program can really allocate.
    peak_flops: dense operations/s by type (`bf16`, `fp8`, `tf32`, `fp32`, …); a type it lacks is
        absent.
    link_bytes_per_s: one direction, per device, inside a node; None: no link but the host's.
    host_link_bytes_per_s: one direction to host memory.
    price_per_hour: in `currency`-less units, None when unknown.
    constants: documented fixed costs and latencies by name (`launch_s`, `link_latency_s`,
        `network_latency_s`, `fixed_bytes`, `matmul_efficiency`, `memory_efficiency` …).
    operators: by the compiler's name of an operator (and `update`, the optimizer's), what
        `llmspec calibrate` measured: launches and share of the predicted rate, forward, and the
        same backward.
    collectives: by kind, rounds of the link's latency and share of its rate.
    """

    name: str
    kind: DeviceKind
    memory_bytes: int
    usable_bytes: int
    memory_bytes_per_s: float
    peak_flops: Mapping[str, float]
    link_bytes_per_s: float | None
    host_link_bytes_per_s: float | None
    price_per_hour: float | None
    constants: Mapping[str, float]
    operators: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    collectives: Mapping[str, tuple[float, ...]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Cluster:
    """nodes × devices_per_node. With `nodes <= N` the count is left to the search, and `nodes` is
    the most there may be.

    network_bytes_per_s: between nodes, one direction, per device.
    host_memory_bytes: of one node, what its processes may use beside their devices' memory.
    kernels: what `llmspec tune` measured of kernels on its devices.
    """

    name: str
    device: Device
    devices_per_node: int
    nodes: int
    nodes_are_bound: bool = False
    """True when the spec wrote `nodes <= N`."""
    nodes_span: Span | None = None
    network_bytes_per_s: float
    host_memory_bytes: int
    kernels: TunedKernels | None = None
    span: Span

    @property
    def world_size(self) -> int:
        return self.devices_per_node * self.nodes

    def worlds(self) -> tuple[int, ...]:
        """Every number of devices that a plan may use, ascending."""
        fewest = 1 if self.nodes_are_bound else self.nodes
        return tuple(n * self.devices_per_node for n in range(fewest, self.nodes + 1))

    def of(self, nodes: int) -> Cluster:
        """So many of its nodes."""
        return replace(self, nodes=nodes, nodes_are_bound=False)


# --------------------------------------------------------------------------------------------------
# Training


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """A named choice with options, defaults filled in: `adamw(lr=3e-4)`, `text("*.py")`, `bf16(…)`.

    arguments: positional ones. Which names and options exist is the table in `dsl/options.py`.
    """

    name: str
    arguments: tuple[Option, ...] = ()
    options: tuple[tuple[str, Option | Call], ...] = ()
    span: Span

    def option(self, name: str) -> Option | Call:
        return dict(self.options)[name]


@dataclass(frozen=True, slots=True, kw_only=True)
class Every:
    """`every(500, …)`: steps between two events, and the event's options."""

    steps: int
    options: tuple[tuple[str, Option | Call], ...] = ()

    def option(self, name: str) -> Option | Call:
        return dict(self.options)[name]


@dataclass(frozen=True, slots=True, kw_only=True)
class Ramp:
    """A batch that grows to its size: it doubles, or rises by `increment_sequences`.

    over_tokens, over_steps: one of them; every size but the last takes an equal share.
    """

    start_sequences: int
    increment_sequences: int | None
    over_tokens: int | None
    over_steps: int | None

    def sizes(self, final: int, most: int | None = None) -> list[int]:
        """Those below the final one; at most `most` of them."""
        found = [self.start_sequences]
        while most is None or len(found) <= most:
            rise = found[-1] if self.increment_sequences is None else self.increment_sequences
            if found[-1] + rise >= final:
                break
            found.append(found[-1] + rise)
        return found

    def stages(self, final: int, sequence_length: int) -> tuple[tuple[int, int], ...]:
        """(steps, sequences of each) below the final size, in whole steps."""
        sizes = self.sizes(final)
        if self.over_steps is not None:
            each, more = divmod(self.over_steps, len(sizes))
            return tuple((each + (i < more), size) for i, size in enumerate(sizes))
        assert self.over_tokens is not None, "a ramp has a length"
        share = self.over_tokens / len(sizes)
        return tuple((max(1, round(share / (size * sequence_length))), size) for size in sizes)


@dataclass(frozen=True, slots=True, kw_only=True)
class Train:
    """One `train` block.

    dataset: Call `text` (arguments: glob patterns; options tokenizer), `tokens` (patterns) or
        `synthetic`.
    batch_sequences: per optimizer step over the whole cluster; batch_tokens = that ×
        sequence_length. ramp: how the run grows up to it.
    loss: that is expected of the run, in nats a token; a help in judging the batch, no more.
    steps: optimizer steps (already worked out from `tokens =` or `chinchilla` when the model is
        known;
        None only for models whose parameter count needs tracing, then `tokens` holds the target).
    learning_rate: phases in order, each a Call: warmup(steps), constant(), cosine(to, steps?),
        linear(to, steps?).
    """

    name: str
    dataset: Call
    sequence_length: int
    batch_sequences: int
    steps: int | None
    tokens: int | None
    optimizer: Call
    learning_rate: tuple[Call, ...]
    precision: Call
    objective: Call
    validate: Every | None
    checkpoint: Every | None
    log: Every
    seed: int
    ramp: Ramp | None = None
    loss: float | None = None
    span: Span
    key_spans: Mapping[str, Span] = field(default_factory=dict)
    """Where each written key stands, for later diagnostics."""

    @property
    def batch_tokens(self) -> int:
        return self.batch_sequences * self.sequence_length

    @property
    def ramp_stages(self) -> tuple[tuple[int, int], ...]:
        """(steps, sequences of each) before the batch has its size."""
        if self.ramp is None:
            return ()
        return self.ramp.stages(self.batch_sequences, self.sequence_length)

    @property
    def common_sequences(self) -> int:
        """The largest number that divides every size of the batch."""
        return gcd(self.batch_sequences, *(size for _, size in self.ramp_stages))

    def stages(self, steps: int) -> list[tuple[int, int]]:
        """(steps, sequences of each) of a run of so many."""
        found = []
        for count, size in (*self.ramp_stages, (steps, self.batch_sequences)):
            if steps > 0:
                found.append((min(count, steps), size))
                steps -= count
        return found

    def tokens_of(self, steps: int) -> int:
        """Tokens of a run of so many steps."""
        return sum(n * size for n, size in self.stages(steps)) * self.sequence_length

    def steps_for(self, tokens: int) -> int:
        """Whole steps that see at least so many tokens."""
        return steps_for(tokens, self.sequence_length, self.batch_sequences, self.ramp_stages)


def steps_for(
    tokens: int, sequence_length: int, final: int, ramp: tuple[tuple[int, int], ...]
) -> int:
    """Whole steps that see at least so many tokens. ramp: (steps, sequences) before `final`."""
    done = 0
    for count, size in ramp:
        per_step = size * sequence_length
        if tokens <= count * per_step:
            return done + -(-tokens // per_step)
        done, tokens = done + count, tokens - count * per_step
    return done + -(-tokens // (final * sequence_length))


class Prefer(StrEnum):
    THROUGHPUT = "throughput"
    FEWEST_GPUS = "fewest gpus"
    MEMORY = "memory"
    COST = "cost"


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """memory_bytes: per device; the default is what the device can really hand out.

    host_memory_bytes: per node; None: all that the cluster has. deadline_s, cost: of the whole
        run, predicted, at the most; cost in the unit of the device's price.
    """

    memory_bytes: int
    host_memory_bytes: int | None = None
    deadline_s: float | None = None
    cost: float | None = None
    span: Span | None = None
    key_spans: Mapping[str, Span] = field(default_factory=dict)
    """Where each written key stands, for later diagnostics."""


class Relation(StrEnum):
    EQ = "="
    LE = "<="
    GE = ">="
    IN = "in"


@dataclass(frozen=True, slots=True, kw_only=True)
class Constraint:
    """One line of a `plan` block; `auto` is one only where a key is not open without it.

    For EQ, LE, GE `values` holds one value.

    key: one of the plan keys of the language reference (`tensor`, `zero`, `recompute`, `stages` …).
    """

    key: str
    relation: Relation
    values: tuple[Option, ...]
    span: Span

    def allows(self, value: Option) -> bool:
        match self.relation:
            case Relation.EQ | Relation.IN:
                return value in self.values
            case Relation.LE:
                return value <= self.values[0]  # type: ignore[operator]
            case Relation.GE:
                return value >= self.values[0]  # type: ignore[operator]


@dataclass(frozen=True, slots=True, kw_only=True)
class Program:
    """A whole checked spec: one model, one cluster, one training run.

    path: the spec, as the user named it. folder: where relative paths start.
    source_hash: sha256 over the canonical text of the spec and of all it imports, 12 hex digits.
    trains: where `precision` or `optimizer` is left to the search, the training run in each of the
        ways that it may take, in the order written; `train` is the first. Else empty.
    """

    path: str
    folder: str
    source_hash: str
    model: AnyModel
    cluster: Cluster
    train: Train
    budget: Budget
    plan: tuple[Constraint, ...]
    prefer: Prefer
    trains: tuple[Train, ...] = ()
