"""`kernels NAME { … }` sections in, `TunedKernels` out, and back to text."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from llmspec.dsl import syntax
from llmspec.dsl.diagnostics import did_you_mean, fault, shown
from llmspec.dsl.program import Span
from llmspec.dsl.tuned import TunedKernel, TunedKernels, TunedPass
from llmspec.dsl.units import Dimension
from llmspec.dsl.values import evaluate, in_units, whole

KERNEL_KEYS = ("columns", "bytes", "structure", "use", "forward", "backward")
PASS_KEYS = ("tile", "warps", "stages", "rate", "by_rule", "eager")
USES = ("triton", "eager")
MOST_NUMBERS = 2**18
"""Of a tile."""
LIKE = (
    "it is written like `{ columns: 4096, bytes: 2, "
    "forward: { tile: [1, 4096], warps: 8, rate: 3.1 TB/s } }`",
)


def kernels_of(section: syntax.Section) -> TunedKernels:
    """Errors: Fault for what is no measurement of a kernel."""
    found: dict[tuple[object, ...], TunedKernel] = {}
    places: dict[tuple[object, ...], Span] = {}
    for statement in section.body:
        if not isinstance(statement, syntax.Setting) or statement.relation != "=":
            raise fault(
                "E0501", "`kernels` is a list of `name = { … }`", statement.span, helps=LIKE
            )
        value = statement.value
        nodes = value.items if isinstance(value, syntax.Sequence) else (value,)
        for node in nodes:
            kernel = kernel_of(statement.key.text, node)
            if kernel.identity in found:
                raise fault(
                    "E0217",
                    f"`{kernel.name}` of {kernel.columns} columns is given twice",
                    node.span,
                    "here again",
                    secondary=((places[kernel.identity], "first here"),),
                )
            found[kernel.identity], places[kernel.identity] = kernel, node.span
    return TunedKernels(name=section.name or "", kernels=tuple(found.values()))


def kernel_of(name: str, node: syntax.Node) -> TunedKernel:
    what = f"`{shown(name)}`"
    given = entries(node, what, KERNEL_KEYS, ("columns", "bytes", "forward"))
    return TunedKernel(
        name=name,
        columns=_count(given, "columns"),
        width=_power(given["bytes"], "`bytes`", most=8),
        structure=_text(given["structure"]) if "structure" in given else None,
        fused=_use(given["use"]) == "triton" if "use" in given else True,
        forward=pass_of(given["forward"], "`forward`"),
        backward=pass_of(given["backward"], "`backward`") if "backward" in given else None,
    )


def pass_of(node: syntax.Node, what: str) -> TunedPass:
    given = entries(node, what, PASS_KEYS, ("tile", "warps", "rate"))
    tile = given["tile"]
    if not isinstance(tile, syntax.Sequence) or len(tile.items) != 2:
        raise fault("E0302", "`tile` is rows and columns", tile.span, helps=LIKE)
    rows, columns = (_power(n, "a side of `tile`", most=MOST_NUMBERS) for n in tile.items)
    if rows * columns > MOST_NUMBERS:
        raise fault("E0303", f"a tile has at most {MOST_NUMBERS} numbers", tile.span)
    rates = {k: _rate(k, given[k]) for k in ("rate", "by_rule", "eager") if k in given}
    return TunedPass(
        rows=rows,
        columns=columns,
        warps=_power(given["warps"], "`warps`", most=32),
        stages=_count(given, "stages", most=8) if "stages" in given else 1,
        rate=rates.pop("rate"),
        **rates,
    )


def entries(
    node: syntax.Node, what: str, keys: Sequence[str], needed: Sequence[str]
) -> dict[str, syntax.Node]:
    """A record's values by key. Errors: Fault for other keys, repeated ones, missing ones."""
    if not isinstance(node, syntax.Record):
        raise fault("E0302", f"{what} is not a record of measurements", node.span, helps=LIKE)
    found: dict[str, syntax.Node] = {}
    for name, value in node.entries:
        if name.text not in keys:
            listed = "the keys are " + ", ".join(f"`{k}`" for k in keys)
            near = did_you_mean(name.text, keys, otherwise=listed)
            raise fault(
                "E0502", f"`{shown(name.text)}` is not a key of {what}", name.span, helps=near
            )
        if name.text in found:
            raise fault("E0217", f"`{name.text}` is given twice", name.span)
        found[name.text] = value
    for key in needed:
        if key not in found:
            raise fault("E0503", f"{what} needs `{key}`", node.span, "not given", helps=LIKE)
    return found


def _count(given: Mapping[str, syntax.Node], key: str, most: int = 2**31) -> int:
    node = given[key]
    count = whole(evaluate(node), node.span, f"`{key}`", least=1)
    if count > most:
        raise fault("E0303", f"`{key}` is at most {most}", node.span)
    return count


def _power(node: syntax.Node, what: str, *, most: int) -> int:
    count = whole(evaluate(node), node.span, what, least=1)
    if count & (count - 1) or count > most:
        raise fault("E0303", f"{what} is a power of two, at most {most}", node.span)
    return count


def _rate(key: str, node: syntax.Node) -> float:
    measure = in_units(evaluate(node), Dimension.BYTES_PER_S, node.span, f"`{key}`")
    if measure.value <= 0:
        raise fault("E0303", f"`{key}` is more than 0", node.span)
    return float(measure.value)


def _text(node: syntax.Node) -> str:
    if isinstance(node, syntax.Text):
        return node.value
    raise fault("E0206", "`structure` is a text, as `llmspec tune` writes it", node.span)


def _use(node: syntax.Node) -> str:
    word = node.text if isinstance(node, syntax.Name) else ""
    if word not in USES:
        near = did_you_mean(word, USES, otherwise="write `triton` or `eager`")
        raise fault("E0504", "`use` is `triton` or `eager`", node.span, helps=near)
    return word


# --------------------------------------------------------------------------------------------------
# Back to text


def kernels_text(found: TunedKernels, rate: Callable[[float], str]) -> str:
    """`rate`: how bytes/s are written."""
    by_name: dict[str, list[TunedKernel]] = {}
    for kernel in found.kernels:
        by_name.setdefault(kernel.name, []).append(kernel)
    lines = [f"kernels {found.name} {{"]
    for name, kernels in by_name.items():
        records = [_record(k, rate) for k in kernels]
        if len(records) == 1:
            lines += [f"{name} = {records[0][0]}", *records[0][1:]]
            continue
        lines.append(f"{name} = [")
        for record in records:
            lines += [*record[:-1], f"{record[-1]},"]
        lines.append("]")
    return "\n".join([*lines, "}"])


def _record(kernel: TunedKernel, rate: Callable[[float], str]) -> list[str]:
    head = f"columns: {kernel.columns}, bytes: {kernel.width}"
    if kernel.structure is not None:
        head += f', structure: "{kernel.structure}"'
    lines = [f"{{ {head}, use: {kernel.use}"]
    for word, one in kernel.directions:
        lines[-1] += ","
        lines.append(f"{word}: {_pass(one, rate)}")
    return [*lines[:-1], f"{lines[-1]} }}"]


def _pass(one: TunedPass, rate: Callable[[float], str]) -> str:
    parts = [f"tile: [{one.rows}, {one.columns}]", f"warps: {one.warps}", f"stages: {one.stages}"]
    for key, value in (("rate", one.rate), ("by_rule", one.by_rule), ("eager", one.eager)):
        if value is not None:
            parts.append(f"{key}: {rate(value)}")
    return f"{{ {', '.join(parts)} }}"
