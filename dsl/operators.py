"""One use of an operator: arguments checked against its row, defaults filled in, legality."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from llmspec.dsl.diagnostics import did_you_mean, fault, listing
from llmspec.dsl.options import MEASURES, OperatorRow, OptionRow
from llmspec.dsl.program import Call, Option, Span
from llmspec.dsl.shapes import Flow, Shape
from llmspec.dsl.values import Value, convert, no_meaning


@dataclass(frozen=True, slots=True)
class Given:
    """An option as written. cause: where its value was given, when that is another place."""

    value: Value | Call
    span: Span
    cause: Span | None = None

    @property
    def place(self) -> Span:
        return self.cause or self.span


def resolve_options(
    row: OperatorRow,
    given: Mapping[str, Given],
    shape: Shape,
    measures: Mapping[str, int | None],
    span: Span,
) -> dict[str, Option | Call]:
    """Every declared option with its value. shape: of the first input; measures: of the model."""
    known: dict[str, Option] = {**measures, "model_width": measures["width"]}
    if shape.flow == Flow.FEATURES:
        known["width"] = shape.width
    resolved: dict[str, Option | Call] = {}
    for option in row.options:
        value = known["width"] if option.derived else one_option(row, option, given, known, span)
        resolved[option.name] = value
        if not isinstance(value, Call):
            known[option.name] = value
    RULES.get(row.name, lambda *_: None)(resolved, given, span)
    return resolved


def one_option(
    row: OperatorRow,
    option: OptionRow,
    given: Mapping[str, Given],
    known: Mapping[str, Option],
    span: Span,
) -> Option | Call:
    if option.name in given:
        entry = given[option.name]
        if isinstance(entry.value, Call):
            return entry.value
        return convert(option, entry.value, entry.place, row.name)
    if option.required:
        raise fault("E0205", f"`{row.name}` needs `{option.name}`", span, "not given")
    value = option.default(known) if callable(option.default) else option.default
    if value is None and callable(option.default) and option.name != "head_size":
        name = option.name if option.name in MEASURES else "width"
        raise fault(
            "E0210",
            f"the model's `{name}` is not set",
            span,
            f"`{row.name}` needs it",
            helps=(f"write `{name} = …` in the model, or `{option.name}=…` here",),
        )
    return value


def unknown_option(row: OperatorRow, name: str, span: Span) -> Exception:
    known = [o.name for o in row.options if not o.derived] + list(row.optional_inputs)
    label = f"it has {listing(known)}" if known else "it has no options"
    return fault(
        "E0202",
        f"`{row.name}` has no option `{name}`",
        span,
        label,
        helps=did_you_mean(name, known),
    )


# --------------------------------------------------------------------------------------------------
# Legality


Options = dict[str, Option | Call]


def divisors_near(number: int, wanted: int, count: int = 2) -> list[int]:
    """The divisors of `number` nearest to `wanted`, nearest first."""
    found = {
        d
        for i in range(1, min(number, 100_000) + 1)
        if i * i <= number and number % i == 0
        for d in (i, number // i)
    }
    return sorted(found, key=lambda d: (abs(d - wanted), -d))[:count]


def attention_rule(options: Options, given: Mapping[str, Given], span: Span) -> None:
    width, heads, kv_heads = (options[k] for k in ("width", "heads", "kv_heads"))
    head_size = options["head_size"]
    assert isinstance(width, int) and isinstance(heads, int) and isinstance(kv_heads, int), "counts"
    places = {k: g.place for k, g in given.items()}
    marks = tuple(
        (g.span, "used here") for g in given.values() if g.cause and g is given.get("heads")
    )
    if head_size is None:
        near = divisors_near(width, heads, 1)[0]
        raise fault(
            "E0203",
            f"{heads} heads do not divide a width of {width}",
            places["heads"],
            f"{width} / {heads} = {width / heads:.2f}…",
            secondary=marks,
            helps=(f"{near} heads give a head size of {width // near}",),
        )
    if heads % kv_heads:
        near_kv = [d for d in divisors_near(heads, kv_heads, 3) if d <= heads]
        raise fault(
            "E0204",
            f"{kv_heads} key/value heads do not divide {heads} heads",
            places.get("kv_heads", span),
            f"{heads} / {kv_heads} = {heads / kv_heads:.2f}…",
            helps=("use " + listing(f"kv_heads={d}" for d in near_kv),),
        )
    if options["rope"] is not None and isinstance(head_size, int) and head_size % 2:
        raise fault(
            "E0220",
            f"rotary positions need an even head size, this one is {head_size}",
            places.get("rope", span),
            f"width {width} / heads {heads} = {head_size}",
        )
    if options["window"] is not None and not options["causal"]:
        raise no_meaning("`window` without `causal`", places["window"])


def mixture_rule(options: Options, given: Mapping[str, Given], span: Span) -> None:
    experts, top_k, groups, top = (options[k] for k in ("experts", "top_k", "groups", "top_groups"))
    assert isinstance(experts, int) and isinstance(top_k, int), "counts"
    assert isinstance(groups, int) and isinstance(top, int), "counts"

    def place(name: str) -> Span:
        return given[name].place if name in given else span

    if experts % groups:
        near = sorted(divisors_near(experts, groups))
        raise fault(
            "E0221",
            f"{groups} groups do not divide {experts} experts",
            place("groups"),
            "every group holds the same number of experts",
            helps=("use " + listing(f"groups={d}" for d in near),),
        )
    if top > groups:
        raise fault(
            "E0221", f"a token cannot use {top} of {groups} groups", place("top_groups"), "too many"
        )
    reached = experts // groups * top
    if top_k > reached:
        where = f" in {top} of {groups} groups" if top < groups else ""
        raise fault(
            "E0221",
            f"a token cannot use {top_k} of {reached} experts{where}",
            place("top_k"),
            "more than there are",
            helps=(f"at most `top_k={reached}`",),
        )


def latent_rule(options: Options, given: Mapping[str, Given], span: Span) -> None:
    size = options["rope_size"]
    if isinstance(size, int) and size % 2:
        raise fault(
            "E0220",
            f"rotary positions need an even head size, this one is {size}",
            given["rope_size"].place,
            "an odd number of them do not pair",
        )


RULES = {"attention": attention_rule, "latent_attention": latent_rule, "moe": mixture_rule}
