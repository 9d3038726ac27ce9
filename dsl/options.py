"""The closed tables of the language: operators, choices and keys, with their options and defaults.

A row says whether it has meaning yet. What has none parses, and is refused by name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum

from llmspec.dsl.program import Option

Measures = Mapping[str, Option]
"""What a default may read: the options before it, and the model's measures (None: not set)."""


class Kind(StrEnum):
    """What an option's value must be; the text finishes the sentence "… must be"."""

    COUNT = "a whole number of at least 1"
    NATURAL = "a whole number of at least 0"
    NUMBER = "a number"
    POSITIVE = "a number above 0"
    PROBABILITY = "a number from 0 up to, not including, 1"
    FLAG = "`true` or `false`"
    WORD = "one of the words"
    TEXT = "a string"
    TEXTS = "a string, or a list of strings"
    PAIR = "two numbers from 0 up to 1, as (0.9, 0.95)"
    WORD_OR_TEXT = "one of the words, or a string"
    WORD_OR_NUMBER = "one of the words, or a number above 0"
    CALL = "a call"
    TIE = "the name of an embedding"


@dataclass(frozen=True, slots=True, kw_only=True)
class OptionRow:
    """default: a value, or a function of `Measures`; `default_text` is how the reference shows it.

    none: `none` is allowed too. now: the values that have meaning yet (empty: all of them).
    derived: worked out, never written by the user. calls: of a call, those there are.
    """

    name: str
    kind: Kind
    default: Option | Callable[[Measures], Option] = None
    default_text: str = ""
    required: bool = False
    none: bool = False
    words: tuple[str, ...] = ()
    now: tuple[Option, ...] = ()
    derived: bool = False
    calls: tuple[CallRow, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class OperatorRow:
    """inputs: required ones, then `optional_inputs`, given by name. positional: the option that a
    bare number fills. reads_ids: takes token ids, not features.
    """

    name: str
    inputs: tuple[str, ...] = ("x",)
    optional_inputs: tuple[str, ...] = ()
    options: tuple[OptionRow, ...] = ()
    positional: str | None = None
    reads_ids: bool = False
    meaning: bool = True

    def row(self, name: str) -> OptionRow | None:
        return next((o for o in self.options if o.name == name), None)


@dataclass(frozen=True, slots=True, kw_only=True)
class CallRow:
    """A named choice. arguments: kind of the free positional ones, None when there are none.
    positional: options that positional values fill in order.
    """

    name: str
    arguments: Kind | None = None
    arguments_required: bool = False
    positional: tuple[str, ...] = ()
    options: tuple[OptionRow, ...] = ()
    meaning: bool = True

    def row(self, name: str) -> OptionRow | None:
        return next((o for o in self.options if o.name == name), None)


def flag(name: str, default: bool = False) -> OptionRow:
    return OptionRow(name=name, kind=Kind.FLAG, default=default)


def measure(name: str) -> OptionRow:
    def default(measures: Measures) -> Option:
        return measures[name]

    return OptionRow(
        name=name, kind=Kind.COUNT, default=default, default_text=f"the model's `{name}`"
    )


def number(name: str, default: Option, kind: Kind = Kind.POSITIVE, none: bool = False) -> OptionRow:
    return OptionRow(name=name, kind=kind, default=default, none=none)


def head_size(measures: Measures) -> Option:
    width, heads = measures["width"], measures["heads"]
    assert isinstance(width, int) and isinstance(heads, int), "heads and width come first"
    return width // heads if width % heads == 0 else None


def four_widths(measures: Measures) -> Option:
    width = measures["width"]
    assert isinstance(width, int), "an operator's input has a width"
    return 4 * width


# --------------------------------------------------------------------------------------------------
# Operators

ACTIVATIONS = ("gelu", "gelu_tanh", "relu", "silu", "tanh", "sigmoid")
WIDTH = OptionRow(name="width", kind=Kind.COUNT, derived=True)
"""The size of the last dim of the operator's input."""
FFN = OptionRow(name="ffn", kind=Kind.COUNT, required=True)
EPS = number("eps", 1e-5)

ATTENTION = (
    WIDTH,
    OptionRow(name="heads", kind=Kind.COUNT, required=True),
    OptionRow(
        name="kv_heads", kind=Kind.COUNT, default=lambda m: m["heads"], default_text="`heads`"
    ),
    OptionRow(name="head_size", kind=Kind.COUNT, default=head_size, default_text="width / heads"),
    OptionRow(name="rope", kind=Kind.POSITIVE, none=True),
    flag("causal"),
    flag("bias"),
    OptionRow(name="window", kind=Kind.COUNT, none=True),
    flag("explicit"),
    number("dropout", 0.0, Kind.PROBABILITY),
    OptionRow(name="qk_norm", kind=Kind.POSITIVE, none=True),
)
LATENT_ATTENTION = (
    WIDTH,
    OptionRow(name="heads", kind=Kind.COUNT, required=True),
    OptionRow(name="q_rank", kind=Kind.COUNT, none=True),
    OptionRow(name="kv_rank", kind=Kind.COUNT, required=True),
    OptionRow(name="nope", kind=Kind.COUNT, required=True),
    OptionRow(name="rope_size", kind=Kind.COUNT, required=True),
    OptionRow(name="value", kind=Kind.COUNT, required=True),
    number("rope", 10_000.0),
    flag("causal"),
    number("eps", 1e-6),
    flag("explicit"),
)

FEED_FORWARDS = (
    CallRow(name="swiglu", positional=("ffn",), options=(FFN,)),
    CallRow(name="geglu", positional=("ffn",), options=(FFN,)),
    CallRow(
        name="mlp",
        positional=("ffn",),
        options=(
            FFN,
            OptionRow(name="activation", kind=Kind.WORD, words=ACTIVATIONS, default="gelu"),
            flag("bias"),
        ),
    ),
)
"""What an expert can be."""
BALANCES = (
    CallRow(
        name="aux",
        positional=("coefficient",),
        options=(OptionRow(name="coefficient", kind=Kind.NUMBER, required=True),),
    ),
    CallRow(
        name="bias",
        positional=("rate",),
        options=(number("rate", 1e-3), number("aux", 0.0, Kind.NUMBER)),
    ),
)
MIXTURE = (
    WIDTH,
    OptionRow(name="experts", kind=Kind.COUNT, required=True),
    OptionRow(name="top_k", kind=Kind.COUNT, required=True),
    OptionRow(name="expert", kind=Kind.CALL, required=True, calls=FEED_FORWARDS),
    OptionRow(name="shared", kind=Kind.CALL, none=True, calls=FEED_FORWARDS),
    OptionRow(name="gate", kind=Kind.WORD, words=("softmax", "sigmoid"), default="softmax"),
    flag("normalise", default=True),
    number("scale", 1.0),
    OptionRow(name="groups", kind=Kind.COUNT, default=1),
    OptionRow(
        name="top_groups",
        kind=Kind.COUNT,
        default=lambda m: m["groups"],
        default_text="`groups`",
    ),
    OptionRow(name="capacity", kind=Kind.POSITIVE, none=True),
    OptionRow(name="balance", kind=Kind.CALL, none=True, calls=BALANCES),
    number("z_loss", 0.0, Kind.NUMBER),
)

OPERATORS = {
    row.name: row
    for row in (
        OperatorRow(
            name="embed",
            reads_ids=True,
            options=(
                OptionRow(
                    name="positions",
                    kind=Kind.WORD,
                    words=("learned", "sinusoidal"),
                    none=True,
                    now=(None, "learned"),
                ),
                measure("vocab"),
                measure("width"),
                measure("context"),
            ),
        ),
        OperatorRow(
            name="unembed",
            options=(
                WIDTH,
                measure("vocab"),
                OptionRow(name="tied", kind=Kind.TIE, none=True),
                flag("bias"),
            ),
        ),
        OperatorRow(
            name="linear",
            positional="out",
            options=(
                WIDTH,
                OptionRow(
                    name="out",
                    kind=Kind.COUNT,
                    default=lambda m: m["model_width"],
                    default_text="the model's `width`",
                ),
                flag("bias"),
            ),
        ),
        OperatorRow(name="attention", optional_inputs=("over",), options=ATTENTION),
        OperatorRow(name="latent_attention", options=LATENT_ATTENTION),
        OperatorRow(
            name="mlp",
            positional="ffn",
            options=(
                WIDTH,
                OptionRow(
                    name="ffn", kind=Kind.COUNT, default=four_widths, default_text="4 * width"
                ),
                OptionRow(name="activation", kind=Kind.WORD, words=ACTIVATIONS, default="gelu"),
                flag("bias"),
            ),
        ),
        OperatorRow(name="swiglu", positional="ffn", options=(WIDTH, FFN)),
        OperatorRow(name="geglu", positional="ffn", options=(WIDTH, FFN)),
        OperatorRow(name="moe", options=MIXTURE),
        OperatorRow(name="layernorm", options=(WIDTH, EPS, flag("bias", default=True))),
        OperatorRow(name="rmsnorm", options=(WIDTH, EPS)),
        OperatorRow(
            name="dropout",
            positional="p",
            options=(WIDTH, number("p", 0.1, Kind.PROBABILITY)),
        ),
        *(OperatorRow(name=name, options=(WIDTH,)) for name in ACTIVATIONS),
        *(
            OperatorRow(name=name, meaning=False)
            for name in ("patches", "pool", "concat", "conv", "softmax")
        ),
    )
}
MEASURES = ("vocab", "context", "width")
INPUTS = ("tokens", "source", "target")
"""The free names of a model's body: token ids."""


# --------------------------------------------------------------------------------------------------
# Choices of a train block

NO = {"meaning": False}

TOKENIZER = OptionRow(name="tokenizer", kind=Kind.WORD_OR_TEXT, words=("bytes",), default="bytes")
DTYPE = OptionRow(name="dtype", kind=Kind.WORD, words=("uint16", "uint32"), none=True)
EXCLUDE = OptionRow(name="exclude", kind=Kind.TEXTS, none=True)
DATASETS = (
    CallRow(
        name="text", arguments=Kind.TEXT, arguments_required=True, options=(TOKENIZER, EXCLUDE)
    ),
    CallRow(name="tokens", arguments=Kind.TEXT, arguments_required=True, options=(DTYPE, EXCLUDE)),
    CallRow(name="synthetic"),
    CallRow(name="python", meaning=False),
)

CLIP = number("clip", 1.0, none=True)
OPTIMIZERS = (
    CallRow(
        name="adamw",
        options=(
            number("lr", 3e-4),
            OptionRow(name="betas", kind=Kind.PAIR, default=(0.9, 0.95)),
            number("eps", 1e-8),
            number("weight_decay", 0.1, Kind.NUMBER),
            CLIP,
        ),
    ),
    CallRow(
        name="sgd",
        options=(
            number("lr", 0.1),
            number("momentum", 0.0, Kind.PROBABILITY),
            number("weight_decay", 0.0, Kind.NUMBER),
            CLIP,
        ),
    ),
    *(
        CallRow(name=name, meaning=False)
        for name in (
            *("adam", "adamw8bit", "adamw4bit", "adafactor", "lion", "muon", "galore", "shampoo"),
            *("soap", "python"),
        )
    ),
)

STEPS = OptionRow(name="steps", kind=Kind.COUNT, none=True, default_text="what is left")
TO = OptionRow(name="to", kind=Kind.NUMBER, default_text="a tenth of the peak")
PHASES = (
    CallRow(
        name="warmup",
        positional=("steps",),
        options=(OptionRow(name="steps", kind=Kind.COUNT, required=True),),
    ),
    CallRow(name="constant", positional=("steps",), options=(STEPS,)),
    CallRow(name="cosine", options=(TO, STEPS)),
    CallRow(name="linear", options=(TO, STEPS)),
    *(CallRow(name=name, meaning=False) for name in ("inverse_sqrt", "exponential", "python")),
)


def part(name: str, default: str, *others: str, none: bool = False) -> OptionRow:
    words = (default, *others)
    return OptionRow(name=name, kind=Kind.WORD, words=words, default=default, none=none)


PRECISIONS = (
    CallRow(name="fp32", options=(part("tf32", "off", "on"),)),
    CallRow(
        name="bf16",
        options=(
            part("master", "fp32", none=True),
            part("moments", "fp32", "bf16"),
            part("reduce", "fp32", "bf16"),
            part("rounding", "nearest", "stochastic"),
        ),
    ),
    CallRow(
        name="fp16",
        options=(
            OptionRow(
                name="scale", kind=Kind.WORD_OR_NUMBER, words=("dynamic",), default="dynamic"
            ),
            OptionRow(
                name="grow_every", kind=Kind.COUNT, none=True, default_text="2000 if dynamic"
            ),
            part("master", "fp32", none=True),
            part("moments", "fp32", "bf16"),
            part("reduce", "fp32", "fp16"),
        ),
    ),
    *(CallRow(name=name, meaning=False) for name in ("fp8", "mxfp8", "nvfp4")),
)
OBJECTIVES = (
    CallRow(name="next_token"),
    *(
        CallRow(name=name, meaning=False)
        for name in ("masked_tokens", "span_corruption", "classification", "python")
    ),
)
EVENTS = {
    "validate": (
        OptionRow(name="dataset", kind=Kind.CALL, required=True),
        OptionRow(name="batches", kind=Kind.COUNT, default=20),
    ),
    "checkpoint": (OptionRow(name="keep", kind=Kind.COUNT, default=3),),
    "log": (),
}
TRAIN_KEYS = (
    *("model", "cluster", "dataset", "batch", "sequence_length", "steps", "tokens", "optimizer"),
    *("learning_rate", "precision", "objective", "validate", "checkpoint", "log", "seed", "plan"),
    "loss",
)
TRAIN_KEYS_LATER = ("adapt", "base")


# --------------------------------------------------------------------------------------------------
# Keys of a plan block


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanRow:
    """least: of a whole number (None: the key takes words). words: those it takes. closed: without
    a line it has one value, and `auto` is what opens it.
    """

    name: str
    least: int | None = 1
    most: int | None = None
    words: tuple[str, ...] = ()
    closed: bool = False


STAGES_ON_A_RANK: dict[str, tuple[int, int | None]] = {
    "gpipe": (1, 1),
    "1f1b": (1, 1),
    "interleaved": (2, None),
    "zero_bubble": (1, None),
    "zbv": (2, 2),
    "dualpipev": (2, 2),
}
"""Schedule to the fewest and the most stages that it takes on each pipeline rank."""


PLAN = {
    row.name: row
    for row in (
        PlanRow(name="data"),
        PlanRow(name="shard"),
        PlanRow(name="zero", least=0, most=3),
        PlanRow(name="tensor"),
        PlanRow(name="sequence", least=None, words=("on", "off")),
        PlanRow(name="context"),
        PlanRow(name="context_style", least=None, words=("ring", "ulysses", "gather")),
        PlanRow(name="expert"),
        PlanRow(name="pipeline"),
        PlanRow(name="interleave"),
        PlanRow(
            name="schedule",
            least=None,
            words=tuple(STAGES_ON_A_RANK),
        ),
        PlanRow(name="stages", least=None),
        PlanRow(name="microbatch"),
        PlanRow(
            name="recompute",
            least=None,
            words=("none", "selective", "full"),
        ),
        PlanRow(
            name="offload",
            least=None,
            words=("none", "optimizer", "activations", "parameters"),
        ),
        PlanRow(
            name="kernels",
            least=None,
            words=("triton", "inductor", "eager"),
            closed=True,
        ),
    )
}
