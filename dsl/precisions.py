"""Refuses what the parts of a `precision` cannot be together, or on a device."""

from __future__ import annotations

from llmspec.dsl.diagnostics import fault
from llmspec.dsl.program import Call, Cluster


def check_device(call: Call, cluster: Cluster) -> None:
    """Errors: Fault when the device has no such numbers."""
    peaks = cluster.device.peak_flops
    wanted = "tf32" if dict(call.options).get("tf32") == "on" else call.name
    if wanted == "fp32" or wanted in peaks:
        return
    raise fault(
        "E0508",
        f"`{cluster.device.name}` has no {wanted}",
        call.span,
        "it has " + ", ".join(peaks),
        helps=("write `precision = fp32`",),
    )


def check_parts(call: Call, optimizer: Call | None) -> None:
    """Errors: Fault for parts that exclude each other, or would say nothing."""
    parts = dict(call.options)
    if call.name == "bf16" and parts["rounding"] == "stochastic" and parts["master"] is not None:
        raise fault(
            "E0510",
            "stochastic rounding is for weights that are stored in bf16",
            call.span,
            "these are stored in float32, and an update hardly rounds them",
            helps=("write `bf16(master=none, rounding=stochastic)`",),
        )
    if call.name == "fp16":
        check_fp16(call)
    keeps = optimizer is None or optimizer.name != "sgd" or optimizer.option("momentum")
    if not keeps and parts.get("moments") == "bf16":
        raise fault(
            "E0510",
            "`moments` is said of an optimizer that keeps none",
            call.span,
            "sgd without momentum",
            helps=("leave `moments` out",),
        )


def check_fp16(call: Call) -> None:
    parts = dict(call.options)
    if parts["master"] is None:
        raise fault(
            "E0510",
            "fp16 needs float32 master weights",
            call.span,
            "gradients of fp16 weights would be divided by the loss scale in fp16, and vanish",
            helps=("leave `master` out, or train in `bf16(master=none)`",),
        )
    if parts["scale"] != "dynamic" and parts["grow_every"] is not None:
        raise fault(
            "E0510",
            "a fixed loss scale does not grow",
            call.span,
            helps=("leave `grow_every` out, or write `scale=dynamic`",),
        )
