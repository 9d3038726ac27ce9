"""The value of `batch` in: sequences of a step, and how a run grows up to them, out."""

from __future__ import annotations

from llmspec.dsl import syntax
from llmspec.dsl.diagnostics import Fault, did_you_mean, fault, listing
from llmspec.dsl.program import Ramp, Span
from llmspec.dsl.units import EXAMPLES, Dimension, Measure
from llmspec.dsl.values import evaluate, plain, show, whole

RAMP_OPTIONS = ("from", "to", "over", "steps", "increment")
MOST_SIZES = 32
"""Of a ramp: a pipeline's program holds a list of actions for each."""


def amount(value: object, span: Span, what: str, dimensions: tuple[Dimension, ...]) -> int:
    """A whole number, plain or in one of the dimensions."""
    if isinstance(value, Measure):
        if value.dimension not in dimensions or value.per is not None:
            examples = " or ".join(f"`{EXAMPLES[d]}`" for d in dimensions)
            raise fault(
                "E0302",
                f"{what} has the wrong unit",
                span,
                f"this is {show(value)}",
                helps=(f"it is written like {examples}",),
            )
        value = value.value
    return whole(value, span, what, least=1)  # type: ignore[arg-type]


def size_of(node: syntax.Node, sequence: int | None, what: str, *, key: str) -> int:
    """Sequences. `sequence`: tokens of one; None checks the unit alone. `key`: before the value
    in a suggestion."""
    value = evaluate(node)
    if plain(value):
        raise fault(
            "E0302",
            f"{what} does not say of what",
            node.span,
            helps=(f"write `{show(value)} sequences`, or `4Mi tokens`",),
        )
    count = amount(value, node.span, what, (Dimension.TOKENS, Dimension.SEQUENCES))
    assert isinstance(value, Measure), "amount took it"
    if value.dimension == Dimension.SEQUENCES or sequence is None:
        return count
    if count % sequence:
        below = count // sequence * sequence
        near = [n for n in (below, below + sequence) if n]
        raise fault(
            "E0506",
            f"a batch of {count} tokens is not a whole number of sequences of {sequence}",
            node.span,
            f"{count} / {sequence} = {count / sequence:.2f}…",
            helps=("use " + listing(f"{key} = {n} tokens" for n in near),),
        )
    return count // sequence


def read_batch(node: syntax.Node, sequence: int | None) -> tuple[int, Ramp | None]:
    """(sequences of a step, what leads up to it). Errors: Fault."""
    if not isinstance(node, syntax.Call):
        return size_of(node, sequence, "`batch`", key="batch"), None
    if node.function.text != "ramp":
        raise fault(
            "E0504",
            f"`batch` cannot be `{node.function.text}`",
            node.function.span,
            "expected `4Mi tokens`, `512 sequences` or `ramp(…)`",
            helps=did_you_mean(node.function.text, ["ramp"]),
        )
    given = named(node)
    start = size_of(given["from"].value, sequence, "`from` of `ramp`", key="from")
    final = size_of(given["to"].value, sequence, "`to` of `ramp`", key="to")
    if start >= final:
        raise fault("E0511", f"a ramp from {start} to {final} sequences does not rise", node.span)
    increment = None
    if "increment" in given:
        value = given["increment"].value
        increment = size_of(value, sequence, "`increment` of `ramp`", key="increment")
    ramp = Ramp(
        start_sequences=start,
        increment_sequences=increment,
        over_tokens=length(given, "over", (Dimension.TOKENS,)),
        over_steps=length(given, "steps", ()),
    )
    check_sizes(ramp, final, node.span)
    return final, ramp


def length(
    given: dict[str, syntax.Argument], name: str, dimensions: tuple[Dimension, ...]
) -> int | None:
    if name not in given:
        return None
    node = given[name].value
    return amount(evaluate(node), node.span, f"`{name}` of `ramp`", dimensions)


def check_sizes(ramp: Ramp, final: int, span: Span) -> None:
    sizes = ramp.sizes(final, most=MOST_SIZES + 1)
    if len(sizes) > MOST_SIZES:
        raise fault(
            "E0511",
            f"a ramp has at most {MOST_SIZES} sizes, and this one has more",
            span,
            helps=("leave `increment` out: then the batch doubles",),
        )
    if ramp.over_steps is not None and ramp.over_steps < len(sizes):
        raise fault(
            "E0511",
            f"{ramp.over_steps} steps are too few for the {len(sizes)} sizes of the ramp",
            span,
            ", ".join(map(str, sizes)) + f" sequences, then {final}",
            helps=(f"at least `steps = {len(sizes)}`",),
        )


def named(node: syntax.Call) -> dict[str, syntax.Argument]:
    """The arguments by name. Errors: Fault for those that are unknown, missing, or one too many."""
    given: dict[str, syntax.Argument] = {}
    for argument in node.arguments:
        name = argument.name or ""
        if name not in RAMP_OPTIONS:
            what = f"has no option `{name}`" if name else "takes its options by name"
            raise fault(
                "E0202",
                f"`ramp` {what}",
                argument.span,
                f"it has {listing(RAMP_OPTIONS)}",
                helps=did_you_mean(name, RAMP_OPTIONS),
            )
        if name in given:
            raise fault("E0217", f"`{name}` is given twice", argument.span)
        given[name] = argument
    for name in ("from", "to"):
        if name not in given:
            raise fault("E0205", f"`ramp` needs `{name}`", node.span, "not given")
    if ("over" in given) == ("steps" in given):
        raise length_fault(node, given)
    return given


def length_fault(node: syntax.Call, given: dict[str, syntax.Argument]) -> Fault:
    if "over" in given:
        return fault(
            "E0507",
            "`over` and `steps` both say how long the ramp is",
            given["steps"].span,
            "the second one",
            secondary=((given["over"].span, "the first one"),),
        )
    return fault(
        "E0205",
        "`ramp` needs `over` or `steps`",
        node.span,
        "how long it takes is not given",
        helps=("write `over=500M tokens` or `steps=1000`",),
    )
