"""What the top of an emitted file says of its plan, and what comments say of host memory."""

from __future__ import annotations

from dataclasses import dataclass

from llmspec.compiler.plan import Plan
from llmspec.compiler.text import in_bytes

_HOST_WORDS = {
    "activations": "activations",
    "optimizer": "the optimizer",
    "parameters": "parameters and the optimizer",
}


@dataclass
class Header:
    """What the top of a file says of the plan."""

    plan: Plan
    spec: str

    def lines(self) -> list[str]:
        p, m = self.plan, self.plan.mesh
        axes = {
            "pipeline": m.pipeline,
            "replicas": m.replicas,
            "shards": m.shards,
            "context": m.context,
            "tensor": m.tensor,
        }
        named = [f"{name} {size}" for name, size in axes.items() if size > 1]
        mesh = " x ".join(named) + f" = {m.world_size} processes" if named else "one process"
        if m.expert > 1:
            mesh += f", experts over {m.expert} data ranks"
        return [
            f"Emitted by llmspec from {self.spec}. Spec {p.spec_hash}, plan {p.plan_hash}.",
            f"Change the spec or the plan, then: llmspec compile {self.spec}",
            "",
            f"Mesh: {mesh}. ZeRO {p.zero}." + self.host(),
        ]

    def host(self) -> str:
        names = [_HOST_WORDS[word] for word in self.plan.offload]
        return f" In host memory: {' and '.join(names)}." if names else ""


def away_comments(plan: Plan) -> list[str]:
    """What leaves with activations, and what the link then costs in the open."""
    lines = ["what the backward needs of a block waits in host memory; the device has two blocks'"]
    if known := plan.predicted.get("predicted"):
        size = in_bytes(known["host_memory_bytes"]["activations"])
        lines.append(f"{size} a process predicted, {link_words(plan)}")
    return lines


def link_words(plan: Plan) -> str:
    """Of all that crosses the link to the host in a step."""
    spent = plan.predicted["predicted"]["time_s"]["offload"]
    if spent < 1e-6:
        return "its copies hidden behind computing"
    return f"{spent * 1e3:.3g} ms of a step's copies not hidden"
