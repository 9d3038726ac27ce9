"""The hardware file: a device and a cluster of the language, from what a calibration has found."""

from __future__ import annotations

from dataclasses import dataclass, field

from llmspec.dsl import format_text
from llmspec.dsl.units import exact_bytes

DIGITS = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Hardware:
    """name: of the device and of the cluster. kind: `gpu` or `cpu`. what: the machine, in words.

    memory_bytes, usable_bytes: of one device. link, host_link: bytes/s, None: not measured.
    constants: further keys of the device, as they are written, each with a comment.
    """

    name: str
    kind: str
    what: tuple[str, ...]
    devices: int
    memory_bytes: int
    usable_bytes: int
    memory_bytes_per_s: float
    host_memory_bytes: int
    peaks: dict[str, float]
    launch_s: float
    fixed_bytes: int
    multiprocessors: int
    matmul_efficiency: float
    attention_efficiency: float = 1.0
    sustained: float = 1.0
    link_bytes_per_s: float | None = None
    link_latency_s: float = 0.0
    host_link_bytes_per_s: float | None = None
    operators: dict[str, tuple[float, ...]] = field(default_factory=dict)
    collectives: dict[str, tuple[float, ...]] = field(default_factory=dict)


def text(found: Hardware) -> str:
    lines = [f"# {line}" for line in found.what]
    lines += ["", f'{found.kind} "{found.name}" {{', *device_lines(found), "}", ""]
    lines += [
        f"cluster {found.name} {{",
        f'node = {found.devices} * {found.kind}("{found.name}")',
        f"host_memory = {mebibytes(found.host_memory_bytes)} per node",
        "}",
    ]
    return format_text("\n".join(lines) + "\n", path="calibrated")


def device_lines(found: Hardware) -> list[str]:
    peak = ", ".join(f"{k}: {short(v / 1e9)} GFLOP/s" for k, v in found.peaks.items())
    lines = [
        "# a long sum of two vectors, all devices at once",
        f"memory = {mebibytes(found.memory_bytes)} at {short(found.memory_bytes_per_s / 1e9)} GB/s",
        f"usable = {mebibytes(found.usable_bytes)}",
        f"peak = {{ {peak} }}  # the fastest product measured",
    ]
    if found.link_bytes_per_s is not None:
        lines.append(f"link = {short(found.link_bytes_per_s / 1e9)} GB/s  # of an all-reduce")
        lines.append(f"link_latency = {short(found.link_latency_s * 1e6)} us")
        lines.append("link_efficiency = 1.0  # the rate above is measured")
    if found.host_link_bytes_per_s is not None:
        lines.append(f"host_link = {short(found.host_link_bytes_per_s / 1e9)} GB/s")
        lines.append("host_link_efficiency = 1.0  # the rate above is measured")
    lines += [
        f"launch = {short(found.launch_s * 1e6)} us  # one operator on one number",
        f"fixed = {mebibytes(found.fixed_bytes)}  # {FIXED[found.kind]}",
        f"multiprocessors = {found.multiprocessors}",
        f"matmul_efficiency = {short(found.matmul_efficiency)}  # the median product",
        f"attention_efficiency = {short(found.attention_efficiency)}",
        "memory_efficiency = 1.0  # the rate above is measured",
        f"sustained = {short(found.sustained)}  # a whole program against its operators alone",
    ]
    if found.operators:
        lines.append("# launches and share of the predicted rate, forward and backward")
        lines += table("operators", found.operators)
    if found.collectives:
        lines.append("# rounds of the latency above, and share of the rate")
        lines += table("collectives", found.collectives)
    return lines


FIXED = {
    "cpu": "a whole program's memory but for its tensors",
    "gpu": "context, libraries and collectives",
}


def table(key: str, rows: dict[str, tuple[float, ...]]) -> list[str]:
    inner = [f"{name}: [{', '.join(map(short, numbers))}]," for name, numbers in rows.items()]
    return [f"{key} = {{", *inner, "}"]


def mebibytes(size: int) -> str:
    return exact_bytes(max(size // 2**20, 1) * 2**20)


def short(value: float) -> str:
    """Four digits, as the language writes numbers."""
    written = float(f"{value:.{DIGITS}g}")
    return f"{written:.0f}" if written >= 1000 else f"{written!r}"
