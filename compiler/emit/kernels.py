"""kernels.py and test_kernels.py of a lowered program, where it has kernels."""

from __future__ import annotations

from llmspec.compiler.emit.classes import place
from llmspec.compiler.emit.header import Header
from llmspec.compiler.kernels.checks import print_checks
from llmspec.compiler.kernels.group import Group
from llmspec.compiler.kernels.kernel import Kernel, groups_in
from llmspec.compiler.kernels.kinds import INDUCTOR, TRITON
from llmspec.compiler.kernels.module import print_kernels
from llmspec.compiler.lower import Lowered
from llmspec.compiler.precision import BYTES, Precision
from llmspec.compiler.text import quoted
from llmspec.dsl.tuned import TunedKernel

BY_RULE = "Tiles are by rule (runtime/fused.py); `llmspec tune` measures others."
MEASURED = "Tiles are those of `kernels {name}` where they were measured, else by rule."
ABOUT = {
    TRITON: (
        "",
        "Operators that one kernel computes together. Each is here twice: in plain PyTorch, which",
        "CPUs run and test_kernels.py compares with, and in Triton, which GPUs run. Backwards are",
        "derived from the operators' derivatives. Numbers are float32 inside, or wider. Rows are",
        "all dimensions but the last one: columns.",
    ),
    INDUCTOR: (
        "",
        "Operators that one kernel computes together: functions that torch.compile compiles at",
        "their first call, each as one graph. Backwards are derived from the operators'",
        "derivatives. Numbers are float32 inside, or wider. Rows are all dimensions but the last",
        "one: columns.",
    ),
}

CHECKS = {
    TRITON: (
        "",
        "Each Triton kernel against its plain function. Where there is a GPU: "
        "python test_kernels.py",
    ),
    INDUCTOR: ("", "Each compiled function against itself as it stands: python test_kernels.py"),
}


def kernel_files(
    lowered: Lowered, precision: Precision, bytes_per_s: float | None
) -> dict[str, str]:
    """Relative path -> text; nothing where the program has no kernels."""
    found = kernels_of(lowered)
    if not found:
        return {}
    by = lowered.plan.kernels
    top = Header(lowered.plan, quoted(lowered.plan.spec)).lines()[:2]
    head, tiles = [*top, *ABOUT[by]], None
    if by == TRITON:
        known = bool(lowered.measured.kernels)
        head.append(MEASURED.format(name=lowered.measured.name) if known else BY_RULE)
        tiles = tiles_of(lowered) if known else None
    text = print_kernels(
        found,
        header=head,
        width=BYTES[precision.compute],
        bytes_per_s=bytes_per_s,
        tiles=tiles,
        by=by,
    )
    checks = print_checks(found, header=[*top, *CHECKS[by]], by=by)
    return {"kernels.py": text, "test_kernels.py": checks}


def tiles_of(lowered: Lowered) -> dict[str, dict[int, TunedKernel]]:
    """By a kernel's name and the columns of its rows, what was measured of it."""
    found: dict[str, dict[int, TunedKernel]] = {}
    for unit in lowered.units.values():
        for group in groups_in(unit):
            known = lowered.measured.of(group)
            if known is not None:
                found.setdefault(group.name, {})[group.columns] = known
    return found


def kernels_of(lowered: Lowered) -> dict[str, tuple[Group, list[str]]]:
    """By name: the first group that it computes, and every place where it is used."""
    found: dict[str, tuple[Group, list[str]]] = {}
    for unit in lowered.units.values():
        for node in unit.calls():
            if isinstance(node.target, Kernel):
                group = node.target.group
                span = node.meta.get("span")
                where = f"`{unit.name}`" + (f", {place(span)}" if span else "")
                _, places = found.setdefault(group.name, (group, []))
                if where not in places:
                    places.append(where)
    return found
