"""The keys of a device that hold tables of measured numbers: `{ name: [number, …], … }`."""

from __future__ import annotations

from llmspec.dsl import syntax
from llmspec.dsl.diagnostics import fault
from llmspec.dsl.values import evaluate, plain

TABLES = {"operators": (2, 4), "collectives": (2,)}
"""Key -> how many numbers each of its entries may have."""
LARGEST = 1e6


def factors(key: str, node: syntax.Node) -> dict[str, tuple[float, ...]]:
    """Names to numbers above 0. What the names mean is the compiler's."""
    numbers = ", ".join("1.0" for _ in range(TABLES[key][-1]))
    like = f"it is written like `{{ name: [{numbers}] }}`"
    if not isinstance(node, syntax.Record):
        raise fault("E0302", f"`{key}` gives numbers to names", node.span, helps=(like,))
    found: dict[str, tuple[float, ...]] = {}
    for name, value in node.entries:
        if name.text in found:
            raise fault("E0217", f"`{name.text}` is given twice", name.span)
        found[name.text] = row(value, f"`{name.text}` of `{key}`", TABLES[key], like)
    return found


def row(node: syntax.Node, what: str, counts: tuple[int, ...], like: str) -> tuple[float, ...]:
    value = evaluate(node)
    numbers = value if isinstance(value, tuple) else (value,)
    if len(numbers) not in counts:
        many = " or ".join(map(str, counts))
        raise fault("E0302", f"{what} has {many} numbers", node.span, helps=(like,))
    if all(plain(n) and isinstance(n, int | float) and 0 < n <= LARGEST for n in numbers):
        return tuple(float(n) for n in numbers)  # type: ignore[arg-type]
    raise fault("E0303", f"{what} has numbers above 0, and at most {LARGEST:.0f}", node.span)
