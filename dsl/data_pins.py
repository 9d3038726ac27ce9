"""Whether data ranks can share the batch, and the state that ZeRO and offload move."""

from __future__ import annotations

from math import prod

from llmspec.dsl.diagnostics import fault, listing
from llmspec.dsl.pins import Pins, context_ranks, divisors, factors
from llmspec.dsl.program import Constraint


def batch_divides(pins: Pins) -> None:
    """`data` × `microbatch` must divide the batch, and each size of its ramp; either alone must
    too."""
    if pins.train is None:
        return
    sizes = {k: n for k in ("data", "microbatch") if (n := pins.number(k)) is not None}
    unit = prod(sizes.values())
    batches = [*(size for _, size in pins.train.ramp_stages), pins.train.batch_sequences]
    batch = next((size for size in batches if size % unit), None)
    if not sizes or batch is None:
        return
    *earlier, last = pins.spans(sizes)
    length = pins.train.sequence_length
    near = [n for n in (batch // unit * unit, (batch // unit + 1) * unit) if n]
    batch_span = pins.train.key_spans.get("batch")
    secondary = [(span, "with this") for span in earlier]
    if batch_span is not None:
        secondary.append((batch_span, f"{batch} sequences of {length} tokens"))
    raise fault(
        "E0408",
        f"{factors(sizes)} does not divide a batch of {batch} sequences",
        last,
        secondary=secondary,
        helps=("use " + listing(f"batch = {n} sequences" for n in near),)
        if len(batches) == 1
        else (f"every size of the ramp must be a multiple of {unit} sequences",),
    )


def shards_are_data(pins: Pins) -> None:
    """Context ranks shard with every data rank, so shards come in multiples of them."""
    shard, data, zero = pins.pinned("shard"), pins.number("data"), pins.number("zero")
    ranks = pins.number("shard")
    if shard is None or ranks is None:
        return
    if data is not None:
        # one shard is ZeRO 0, whatever the context ranks
        counts = sorted({1} | {d * c for c in context_ranks(pins) for d in divisors(data)})
        if ranks not in counts:
            near = sorted(sorted(counts, key=lambda n: abs(n - ranks))[:3])
            context = pins.number("context") or 1
            beside = f" and {context} context ranks" if context > 1 else ""
            raise fault(
                "E0407",
                f"{ranks} shards do not fit {data} data ranks{beside}",
                shard.span,
                secondary=[(s, "pinned here") for s in pins.spans(["data", "context"])],
                helps=("use " + listing(f"shard = {n}" for n in near),),
            )
    if zero == 0 and ranks > 1:
        raise fault(
            "E0407",
            "`zero = 0` shards nothing",
            shard.span,
            secondary=[(s, "pinned here") for s in pins.spans(["zero"])],
            helps=("leave `shard` out, or set `zero` to 1, 2 or 3",),
        )


def zero_needs_ranks(pins: Pins) -> None:
    """ZeRO shards over data and context ranks; with one of each there is nothing to shard over."""
    zero, pin = pins.number("zero"), pins.pinned("zero")
    if pin is None or not zero or pins.number("data") != 1:
        return
    if context_ranks(pins) == [1]:
        raise fault(
            "E0407",
            f"`zero = {zero}` has no ranks to shard over",
            pin.span,
            "there is one data rank, and one context rank",
            secondary=[(s, "pinned here") for s in pins.spans(["data"])],
            helps=("use `zero = 0`, or more data ranks",),
        )


def parameters_are_sharded(pins: Pins) -> None:
    """Host memory holds parameters that ZeRO 3 gathers from parts."""
    offload = pins.pinned("offload")
    if offload is None or not _moves_parameters(offload):
        return
    zero = pins.pinned("zero")
    if zero is not None and zero.values[0] != 3:
        raise fault(
            "E0414",
            "`offload = parameters` needs ZeRO 3",
            zero.span,
            "the device would hold the parameters all the time",
            secondary=((offload.span, "pinned here"),),
            helps=("write `zero = 3`, or `offload = optimizer`",),
        )
    ranks = pins.number("data")
    alone = pins.cluster is not None and pins.cluster.world_size == 1
    if alone or (ranks == 1 and (pins.number("context") or 1) == 1):
        raise fault(
            "E0414",
            "`offload = parameters` needs data ranks that share the parameters",
            offload.span,
            "ZeRO 3 shards over them, and there is one",
            helps=("write `offload = optimizer`",),
        )


def experts_have_copies(pins: Pins) -> None:
    """FSDP2 holds in host memory what it gathers: not experts that one rank alone has."""
    expert, offload = pins.pinned("expert"), pins.pinned("offload")
    if expert is None or offload is None or pins.cluster is None:
        return
    ranks = pins.number("expert") or 1
    if ranks == 1 or not _moves_parameters(offload):
        return
    most = pins.cluster.world_size // prod(pins.number(k) or 1 for k in ("tensor", "pipeline"))
    data, context = pins.number("data"), pins.number("context")
    if data is not None and context is not None:
        most = min(most, data * context)
    if most <= ranks:
        raise fault(
            "E0414",
            "`offload = parameters` needs ranks that share each expert",
            expert.span,
            "no expert is on two of the ranks that share parameters, and ZeRO 3 gathers none",
            secondary=((offload.span, "pinned here"),),
            helps=("use fewer expert ranks, or write `offload = optimizer`",),
        )


def _moves_parameters(offload: Constraint | None) -> bool:
    """Whether the line pins parameters into host memory."""
    value = offload.values[0] if offload else None
    return "parameters" in (value if isinstance(value, tuple) else (value,))
