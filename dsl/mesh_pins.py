"""Whether tensor and context ranks can share a model, and the axes of a mesh a cluster."""

from __future__ import annotations

from collections.abc import Sequence
from math import gcd, lcm, prod

from llmspec.dsl.diagnostics import fault, listing
from llmspec.dsl.parameters import operators_of
from llmspec.dsl.pins import AXES, Pins, divisors, factors
from llmspec.dsl.program import Cluster, Model, Relation


def axes_fill_world(pins: Pins) -> None:
    if pins.cluster is None:
        return
    worlds = pins.cluster.worlds()
    sizes = {key: n for key in AXES if (n := pins.number(key)) is not None}
    if not sizes:
        return
    product = prod(sizes.values())
    # who pins all others says with `context` that what is left shares sequences
    whole_mesh = set(AXES) - set(sizes) <= {"context"}
    if product in worlds or (not whole_mesh and any(world % product == 0 for world in worlds)):
        return
    *earlier, last = pins.spans(sizes)
    verb = "is not" if whole_mesh else "does not divide"
    rest = prod([*sizes.values()][:-1])
    near = min(worlds, key=lambda world: (world % rest > 0, abs(world - product)))
    raise fault(
        "E0404",
        f"{factors(sizes)} {verb} {devices_of(pins.cluster)}",
        last,
        secondary=[(span, "with this") for span in earlier],
        helps=axis_help(sizes, near, whole_mesh),
    )


def devices_of(cluster: Cluster) -> str:
    if not cluster.nodes_are_bound:
        return f"the cluster's {cluster.world_size} devices"
    return f"what 1 to {cluster.nodes} whole nodes of {cluster.devices_per_node} devices have"


def axis_help(sizes: dict[str, int], world: int, whole_mesh: bool) -> tuple[str, ...]:
    """The last pinned axis, made to fit the others; or context ranks beside them."""
    *others, last = sizes
    rest = prod(sizes[k] for k in others)
    if world % rest:
        return ()
    left = world // rest
    fits = [left] if whole_mesh else divisors(left)
    near = sorted(fits, key=lambda d: abs(d - sizes[last]))[:3]
    helps: tuple[str, ...] = ("use " + listing(f"{last} = {d}" for d in sorted(near)),)
    if whole_mesh and "context" not in sizes and left % sizes[last] == 0:
        helps += (f"or `context = {left // sizes[last]}`, ranks that share sequences",)
    return helps


def tensor_splits_heads(pins: Pins) -> None:
    """Of a model that is written in the language; of others the graph has to be known."""
    if isinstance(pins.model, Model):
        check_heads(pins, heads_of(pins.model))


def check_heads(pins: Pins, heads: Sequence[int]) -> None:
    """`heads`: key/value heads of each attention. Errors: Fault for a line about tensor ranks that
    no number of ranks keeps."""
    if not heads:
        return
    common = gcd(*heads)
    for constraint in pins.constraints:
        if constraint.key != "tensor" or constraint.relation is Relation.LE:
            continue
        if any(constraint.allows(d) for d in divisors(common)):
            continue
        value = constraint.values[0]
        assert isinstance(value, int), "tensor takes numbers"
        worlds = pins.cluster.worlds() if pins.cluster else (common,)
        legal = [d for d in divisors(common) if any(world % d == 0 for world in worlds)]
        near = sorted(sorted(legal, key=lambda d: abs(d - value))[:3])
        fewest = min(heads)
        raise fault(
            "E0403",
            f"{value} tensor ranks cannot share {fewest} key/value heads",
            constraint.span,
            "every rank holds the same number of whole heads",
            helps=("use " + listing(f"tensor = {d}" for d in near),),
        )


def heads_of(model: Model) -> list[int]:
    found = [use.option("kv_heads") for use in operators_of(model, "attention")]
    found += [use.option("heads") for use in operators_of(model, "latent_attention")]
    return [h for h in found if isinstance(h, int)]


def sequence_needs_tensor(pins: Pins) -> None:
    sequence = pins.pinned("sequence")
    if sequence and sequence.values[0] == "on" and pins.number("tensor") == 1:
        raise fault(
            "E0407",
            "`sequence = on` splits over tensor ranks, and there is one",
            sequence.span,
            secondary=[(s, "pinned here") for s in pins.spans(["tensor"])],
        )


def context_splits_tokens(pins: Pins) -> None:
    """Each rank holds two chunks of a sequence, and tensor ranks may split those again."""
    pin, ranks = pins.pinned("context"), pins.number("context")
    if pin is None or ranks is None or ranks == 1 or pins.train is None:
        return
    length = pins.train.sequence_length
    sequence = pins.pinned("sequence")
    split = sequence is not None and sequence.values[0] == "on"
    tensor = (pins.number("tensor") or 1) if split else 1
    unit = lcm(2 * ranks, tensor * ranks)
    if length % unit == 0:
        return
    near = [n for n in (length // unit * unit, (length // unit + 1) * unit) if n]
    fits = [n for n in divisors(length // 2) if length % lcm(2 * n, tensor * n) == 0]
    if pins.cluster is not None:
        worlds = pins.cluster.worlds()
        fits = [n for n in fits if any(world % n == 0 for world in worlds)]
    fits = sorted(sorted(fits, key=lambda n: abs(n - ranks))[:2])
    secondary = [(s, "with this") for s in pins.spans(["tensor"] if tensor > 1 else [])]
    span = pins.train.key_spans.get("sequence_length")
    if span is not None:
        secondary.append((span, f"{length} tokens"))
    raise fault(
        "E0410",
        f"{ranks} context ranks cannot share sequences of {length} tokens",
        pin.span,
        f"every rank holds the same number of tokens: {unit} must divide them",
        secondary=secondary,
        helps=(
            *(("use " + listing(f"context = {n}" for n in fits),) if fits else ()),
            "or " + listing(f"sequence_length = {n}" for n in near),
        ),
    )


def ulysses_splits_heads(pins: Pins) -> None:
    """Every rank computes some of the query heads that a tensor rank has."""
    style, ranks = pins.pinned("context_style"), pins.number("context")
    if style is None or not isinstance(pins.model, Model):
        return
    if ranks == 1:
        raise fault(
            "E0407",
            "`context_style` says how context ranks share attention, and there is one",
            style.span,
            secondary=[(s, "pinned here") for s in pins.spans(["context"])],
        )
    tensor = pins.number("tensor") or 1
    heads = [use.option("heads") for use in operators_of(pins.model, "attention")]
    common = gcd(*(h for h in heads if isinstance(h, int)), 0)
    if style.values[0] != "ulysses" or ranks is None or common % (ranks * tensor) == 0:
        return
    shared = f"{ranks} context × {tensor} tensor ranks" if tensor > 1 else f"{ranks} context ranks"
    fits = [n for n in divisors(common) if common % (n * tensor) == 0 and n > 1]
    near = sorted(sorted(fits, key=lambda n: abs(n - ranks))[:2])
    raise fault(
        "E0411",
        f"{shared} cannot share {common} heads",
        style.span,
        "every rank computes the same number of whole heads",
        secondary=[(s, "with this") for s in pins.spans(["context", "tensor"])],
        helps=(
            *(("use " + listing(f"context = {n}" for n in near),) if near else ()),
            "or `context_style = ring`, which splits no heads",
        ),
    )
