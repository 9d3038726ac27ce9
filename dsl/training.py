"""A `train` section, its model and its cluster in; a `Train` with every default filled in out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from decimal import Decimal
from math import ceil
from typing import TypeVar

from llmspec.dsl import options, syntax
from llmspec.dsl.batches import amount, read_batch
from llmspec.dsl.choices import read_call, read_options
from llmspec.dsl.diagnostics import Fault, fault, listing
from llmspec.dsl.hardware import equal_only, settings_of
from llmspec.dsl.left_open import check_distinct, combinations, distinct_faults, listed
from llmspec.dsl.parameters import count_parameters
from llmspec.dsl.precisions import check_device, check_parts
from llmspec.dsl.program import (
    AnyModel,
    Call,
    Cluster,
    Every,
    Model,
    Option,
    Ramp,
    Span,
    Train,
    steps_for,
)
from llmspec.dsl.units import Dimension
from llmspec.dsl.values import Word, evaluate, no_meaning, real, show, whole

DEFAULT_BATCH_TOKENS = 2**19
"""Half a million tokens a step, as GPT-3's small models (Brown 2020, table 2.1)."""
TOKENS_PER_PARAMETER = 20
"""`chinchilla`: Hoffmann 2022, table 3."""
DEFAULT_WARMUP = 2000
DEFAULT_CHECKPOINT = 1000
DEFAULT_LOG = 10

T = TypeVar("T")


class Quiet(Exception):
    """A key that cannot be read because of a fault reported elsewhere."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Context:
    """What the keys of a train block are read against. model: None when it has faults."""

    nodes: dict[str, syntax.Node]
    section: syntax.Section
    model: AnyModel | None
    cluster: Cluster | None

    def spans(self) -> dict[str, Span]:
        return {key: node.span for key, node in self.nodes.items()}


class Reader:
    """Reads key by key, so that each key's fault is reported."""

    def __init__(self, context: Context) -> None:
        self.context = context
        self.nodes = context.nodes
        self.faults: list[Fault] = []
        self.incomplete = False

    def read(self) -> Train | None:
        c = self.context
        dataset = self.attempt(self.dataset)
        sequence = self.attempt(self.sequence_length)
        batch = (
            self.attempt(lambda: self.batch(sequence))
            if sequence
            else self.attempt(self.batch_unit)
        )
        steps = self.attempt(lambda: self.steps(sequence, *batch)) if sequence and batch else None
        optimizer = self.attempt(self.optimizer)
        phases = self.attempt(lambda: self.phases(optimizer, steps[0] if steps else None))
        precision = self.attempt(lambda: self.precision(optimizer))
        objective = self.attempt(self.objective)
        validate = self.attempt(lambda: self.event("validate", None))
        checkpoint = self.attempt(lambda: self.event("checkpoint", DEFAULT_CHECKPOINT))
        log = self.attempt(lambda: self.event("log", DEFAULT_LOG))
        seed = self.attempt(self.seed)
        loss = self.attempt(self.loss)
        if (
            self.faults
            or self.incomplete
            or not (sequence and batch and steps and dataset and optimizer and phases)
        ):
            return None
        assert precision and objective and log and seed is not None, "read without faults"
        return Train(
            name=c.section.name or "train",
            dataset=dataset,
            sequence_length=sequence,
            batch_sequences=batch[0],
            ramp=batch[1],
            steps=steps[0],
            tokens=steps[1],
            optimizer=optimizer,
            learning_rate=phases,
            precision=precision,
            objective=objective,
            validate=validate,
            checkpoint=checkpoint,
            log=log,
            seed=seed,
            loss=loss,
            span=c.section.head,
            key_spans=c.spans(),
        )

    def attempt(self, read: Callable[[], T]) -> T | None:
        try:
            return read()
        except Quiet:
            self.incomplete = True
        except Fault as error:
            self.faults.append(error)
        return None

    # Sizes

    def sequence_length(self) -> int:
        model = self.context.model
        node = self.nodes.get("sequence_length")
        context = model.context if isinstance(model, Model) else None
        if node is None:
            if context is not None:
                return context
            if model is None:
                raise Quiet
            raise fault(
                "E0503",
                "`sequence_length` is needed for a model that is not written in the language",
                self.context.section.head,
                "not given",
            )
        length = amount(evaluate(node), node.span, "`sequence_length`", (Dimension.TOKENS,))
        if context is not None and length > context:
            raise fault(
                "E0505",
                f"a sequence of {length} is longer than the model's context of {context}",
                node.span,
                secondary=(),
                helps=(f"at most `sequence_length = {context}`",),
            )
        return length

    def batch_unit(self) -> tuple[int, Ramp | None]:
        node = self.nodes.get("batch")
        if node is not None:
            read_batch(node, None)
        raise Quiet

    def batch(self, sequence: int) -> tuple[int, Ramp | None]:
        node = self.nodes.get("batch")
        world = self.context.cluster.world_size if self.context.cluster else 1
        if node is None:
            return ceil(max(1, DEFAULT_BATCH_TOKENS // sequence) / world) * world, None
        return read_batch(node, sequence)

    # How long

    def steps(self, sequence: int, batch: int, ramp: Ramp | None) -> tuple[int | None, int | None]:
        """(steps, tokens asked for)."""
        if "steps" in self.nodes and "tokens" in self.nodes:
            raise fault(
                "E0507",
                "`steps` and `tokens` both say how long to train",
                self.nodes["tokens"].span,
                "the second one",
                secondary=((self.nodes["steps"].span, "the first one"),),
            )
        stages = ramp.stages(batch, sequence) if ramp else ()
        steps, tokens = self.asked_length()
        if tokens is not None:
            steps = steps_for(tokens, sequence, batch, stages)
        rising = sum(count for count, _ in stages)
        if steps is not None and rising >= steps:
            raise fault(
                "E0511",
                f"the ramp takes {rising} steps, the run has {steps}",
                self.nodes["batch"].span,
                "the batch would never have its size",
            )
        return steps, tokens

    def asked_length(self) -> tuple[int | None, int | None]:
        """(steps, tokens): one of them, or neither."""
        if "tokens" in self.nodes:
            node = self.nodes["tokens"]
            return None, amount(evaluate(node), node.span, "`tokens`", (Dimension.TOKENS,))
        node = self.nodes.get(
            "steps", syntax.Name(text="chinchilla", span=self.context.section.head)
        )
        value = evaluate(node)
        if value != Word("chinchilla"):
            if isinstance(value, Word):
                raise fault(
                    "E0504",
                    f"`steps` cannot be {show(value)}",
                    node.span,
                    "expected a number or `chinchilla`",
                )
            return whole(value, node.span, "`steps`", least=1), None
        model = self.context.model
        if not isinstance(model, Model):
            return None, None
        return None, TOKENS_PER_PARAMETER * count_parameters(model, active=True)

    # Choices

    def choice(self, key: str, rows: tuple[options.CallRow, ...], default: str) -> Call:
        node = self.nodes.get(key, syntax.Name(text=default, span=self.context.section.head))
        return read_call(node, rows, key)

    def dataset(self) -> Call:
        if "dataset" not in self.nodes:
            raise fault(
                "E0503",
                "a train block needs `dataset`",
                self.context.section.head,
                "not given",
                helps=('write `dataset = text("*.txt")`, `tokens("*.bin")` or `synthetic`',),
            )
        return read_call(self.nodes["dataset"], options.DATASETS, "dataset")

    def optimizer(self) -> Call:
        return self.choice("optimizer", options.OPTIMIZERS, "adamw")

    def objective(self) -> Call:
        call = self.choice("objective", options.OBJECTIVES, "next_token")
        model = self.context.model
        if isinstance(model, Model) and model.inputs != ("tokens",):
            inputs = listing(model.inputs).replace(" or ", " and ")
            raise no_meaning(f"training a model that reads {inputs}", self.nodes["model"].span)
        return call

    def precision(self, optimizer: Call | None) -> Call:
        cluster = self.context.cluster
        default = "bf16" if cluster and "bf16" in cluster.device.peak_flops else "fp32"
        call = self.choice("precision", options.PRECISIONS, default)
        if cluster:
            check_device(call, cluster)
        check_parts(call, optimizer)
        return call

    def phases(self, optimizer: Call | None, steps: int | None) -> tuple[Call, ...]:
        """The learning rate's phases. `steps`: of the run, None when not known yet."""
        node = self.nodes.get("learning_rate")
        parts = node.parts if isinstance(node, syntax.Then) else (node,) if node else ()
        phases = tuple(read_call(p, options.PHASES, "learning_rate") for p in parts)
        check_phases(phases, steps)
        if optimizer is None:
            raise Quiet
        peak = optimizer.option("lr")
        assert isinstance(peak, float), "lr is a number"
        if node is None:
            return self.default_phases(peak, steps)
        return tuple(with_default(phase, "to", tenth(peak)) for phase in phases)

    def default_phases(self, peak: float, steps: int | None) -> tuple[Call, ...]:
        head = self.context.section.head
        warmup = min(DEFAULT_WARMUP, steps // 10) if steps is not None else DEFAULT_WARMUP
        cosine = Call(name="cosine", options=(("to", tenth(peak)), ("steps", None)), span=head)
        if not warmup:
            return (cosine,)
        return (Call(name="warmup", options=(("steps", warmup),), span=head), cosine)

    # Events

    def event(self, key: str, default: int | None) -> Every | None:
        rows = options.EVENTS[key]
        node = self.nodes.get(key)
        if node is None:
            if default is None:
                return None
            return Every(steps=default, options=tuple((r.name, plain_default(r)) for r in rows))
        if isinstance(node, syntax.Name) and node.text == "none" and key != "log":
            return None
        if not isinstance(node, syntax.Call) or node.function.text != "every":
            raise fault("E0504", f"`{key}` says how often", node.span, "expected `every(steps)`")
        if not node.arguments or node.arguments[0].name is not None:
            raise fault("E0205", "`every` needs its number of steps", node.span, "comes first")
        first = node.arguments[0]
        steps = whole(evaluate(first.value), first.span, "`every`", least=1)
        given = read_options(rows, node.arguments[1:], "every", node.span)
        return Every(steps=steps, options=tuple((r.name, event_option(r, given)) for r in rows))

    def loss(self) -> float | None:
        node = self.nodes.get("loss")
        if node is None:
            return None
        return real(options.Kind.POSITIVE, evaluate(node), node.span, "`loss`")

    def seed(self) -> int:
        node = self.nodes.get("seed")
        return 1 if node is None else whole(evaluate(node), node.span, "`seed`", least=0)


def read_trains(context: Context, choices: Choices) -> tuple[tuple[Train, ...], list[Fault]]:
    """The run in each way that its block allows, one where nothing is left to the search; none
    where one has faults."""
    found, faults = [], []
    for nodes in combinations(context.nodes, choices):
        reader = Reader(replace(context, nodes=nodes))
        found.append(reader.read())
        faults += reader.faults
    trains = tuple(train for train in found if train is not None)
    if len(trains) < len(found):
        return (), distinct_faults(faults)
    try:
        check_distinct(trains)
    except Fault as error:
        faults.append(error)
    return trains, faults


def plain_default(row: options.OptionRow) -> Option:
    assert not callable(row.default), "events have constant defaults"
    return row.default


def event_option(row: options.OptionRow, given: dict[str, syntax.Argument]) -> Option | Call:
    if row.name not in given:
        return plain_default(row)
    argument = given[row.name]
    if row.kind == options.Kind.CALL:
        return read_call(argument.value, options.DATASETS, row.name)
    return whole(evaluate(argument.value), argument.span, f"`{row.name}`", least=1)


def tenth(value: float) -> float:
    """In decimal: a tenth of 3e-4 is 3e-05."""
    return float(Decimal(repr(value)) / 10)


def with_default(call: Call, name: str, value: Option) -> Call:
    changed = tuple((k, value if k == name and v is None else v) for k, v in call.options)
    return replace(call, options=changed)


def check_phases(phases: tuple[Call, ...], steps: int | None) -> None:
    """Only the last phase may take what is left, and the phases fit into the run."""
    total = 0
    for index, phase in enumerate(phases):
        length = phase.option("steps")
        if length is None and index < len(phases) - 1:
            raise fault(
                "E0509",
                f"`{phase.name}` takes all steps that are left, yet another phase follows",
                phase.span,
                helps=(f"give it a length: `{phase.name}(…, steps=1000)`",),
            )
        total += length if isinstance(length, int) else 0
    if steps is not None and total > steps:
        raise fault(
            "E0509",
            f"the learning rate's phases take {total} steps, the run has {steps}",
            phases[-1].span,
        )


TRAIN_KEYS = options.TRAIN_KEYS


Choices = dict[str, tuple[syntax.Node, ...]]


def train_keys(section: syntax.Section) -> tuple[dict[str, syntax.Node], Choices, list[Fault]]:
    """The block's values by key, those of keys that are left to the search, and the faults of
    single lines."""
    faults: list[Fault] = []
    nodes: dict[str, syntax.Node] = {}
    choices: Choices = {}
    for statement in section.body:
        try:
            if isinstance(statement, syntax.Setting):
                refuse_later(statement)
            keys = settings_of([statement], TRAIN_KEYS, "train block")
            for key, setting in keys.items():
                if key in nodes:
                    raise fault(
                        "E0217",
                        f"`{key}` is given twice",
                        setting.key.span,
                        "here again",
                        secondary=((nodes[key].span, "first here"),),
                    )
                if setting.relation == "in":
                    choices[key] = listed(setting)
                    nodes[key] = choices[key][0]
                else:
                    nodes[key] = equal_only(setting)
        except Fault as error:
            faults.append(error)
    return nodes, choices, faults


def refuse_later(statement: syntax.Setting) -> None:
    key = statement.key.text
    if key in options.TRAIN_KEYS_LATER:
        raise no_meaning(f"`{key}`", statement.span)
