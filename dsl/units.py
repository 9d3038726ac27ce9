"""Numbers and units: digits and a unit in, a value in base units and its dimension out."""

from __future__ import annotations

from dataclasses import dataclass
from decimal import Decimal
from enum import StrEnum


class Dimension(StrEnum):
    NUMBER = "a plain number"
    BYTES = "bytes"
    BYTES_PER_S = "bytes per second"
    OPERATIONS_PER_S = "operations per second"
    SECONDS = "a time"
    TOKENS = "tokens"
    SEQUENCES = "sequences"


@dataclass(frozen=True, slots=True)
class Measure:
    """A value with a unit, in base units; `per`: `gpu`, `node`, `hour`, … or None."""

    value: int | float
    dimension: Dimension
    per: str | None = None


MULTIPLIERS = {"": 1, "k": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "P": 10**15}
BINARY = {"Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40, "Pi": 2**50}
SECONDS = {
    **{"ns": 1e-9, "us": 1e-6, "ms": 1e-3, "s": 1, "second": 1, "minute": 60, "hour": 3600},
    **{"day": 86400, "week": 604800},
}


def unit_table() -> dict[str, tuple[Dimension, int | float]]:
    """What one of each unit is worth. Small b is a bit, big B a byte; Ki is 1024, k is 1000."""
    table: dict[str, tuple[Dimension, int | float]] = {}
    for prefix, factor in {**MULTIPLIERS, **BINARY}.items():
        table[f"{prefix}B"] = (Dimension.BYTES, factor)
        table[f"{prefix}B/s"] = (Dimension.BYTES_PER_S, factor)
        table[f"{prefix}b"] = (Dimension.BYTES, factor / 8)
        table[f"{prefix}b/s"] = (Dimension.BYTES_PER_S, factor / 8)
    for prefix, factor in {**MULTIPLIERS, "E": 10**18}.items():
        table[f"{prefix}FLOP/s"] = (Dimension.OPERATIONS_PER_S, factor)
    for name, seconds in SECONDS.items():
        table[name] = (Dimension.SECONDS, seconds)
        if len(name) > 2:
            table[f"{name}s"] = (Dimension.SECONDS, seconds)
    for name, dimension in (("token", Dimension.TOKENS), ("sequence", Dimension.SEQUENCES)):
        table[name] = table[f"{name}s"] = (dimension, 1)
    return table


UNITS = unit_table()
EXAMPLES = {
    Dimension.NUMBER: "4096",
    Dimension.BYTES: "72 GiB",
    Dimension.BYTES_PER_S: "400 Gb/s",
    Dimension.OPERATIONS_PER_S: "989 TFLOP/s",
    Dimension.SECONDS: "30 days",
    Dimension.TOKENS: "4Mi tokens",
    Dimension.SEQUENCES: "256 sequences",
}


LARGEST = Decimal(10) ** 30


def parse_number(digits: str) -> int | float:
    """`128_256`, `4Mi`, `1.4T`, `3e-4`. Whole ones stay exact. Errors: OverflowError past 1e30."""
    text = digits.replace("_", "")
    suffix = next((s for s in (*BINARY, "k", "M", "G", "T") if text.endswith(s)), "")
    number = text.removesuffix(suffix)
    exponent = number.lower().partition("e")[2]
    if len(text) > 40 or (exponent and abs(int(exponent)) > 30):
        raise OverflowError(digits)
    value = Decimal(number) * {**MULTIPLIERS, **BINARY}[suffix]
    if abs(value) > LARGEST:
        raise OverflowError(digits)
    whole = value == value.to_integral_value()
    return int(value) if whole and (suffix or "." not in number) else float(value)


def measure(number: int | float, unit: str, per: str | None) -> Measure:
    """In base units. Errors: OverflowError past 1e30, which could not be written out again."""
    dimension, factor = UNITS[unit]
    # in decimal, so that 2.039 TB/s is 2_039_000_000_000 B/s and 5 us are 5e-06 s
    value = Decimal(str(number)) * Decimal(str(factor))
    if abs(value) > LARGEST:
        raise OverflowError(f"{number} {unit}")
    whole = value == value.to_integral_value()
    return Measure(int(value) if whole else float(value), dimension, per)


def render_bytes(value: float) -> str:
    for name in ("TiB", "GiB", "MiB", "KiB"):
        if abs(value) >= BINARY[name[:2]]:
            return f"{value / BINARY[name[:2]]:.4g} {name}"
    return f"{value:.4g} B"


def exact_bytes(value: int) -> str:
    """The shortest exact way to write a number of bytes in the language."""
    for name in ("TiB", "GiB", "MiB", "KiB"):
        if value and value % BINARY[name[:2]] == 0:
            return f"{value // BINARY[name[:2]]} {name}"
    return f"{value} B"
