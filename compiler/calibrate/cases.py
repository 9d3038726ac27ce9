"""What a calibration measures: products, and every operator of small models as it is printed."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import fx

from llmspec import dsl
from llmspec.compiler.cost.compute import is_integer
from llmspec.compiler.driver import Session
from llmspec.compiler.graph import Unit
from llmspec.compiler.ops.registry import (
    Localised,
    entry_of,
    shape_of,
    shapes_of,
    tensor_operands,
)

Case = dict[str, Any]
MODELS = ("llama", "gpt2")
"""Of the library: their operators are most models'."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Effort:
    """How large the measured things are, and how long each is measured.

    rows: of a product, and tokens of a model. widths: of products, at least two. model: layers,
    width, heads, ffn, vocab, context of the models whose operators are measured; sequences of it.
    unit_width: of the square weight of a unit of ZeRO's. vector_bytes: of the vectors that measure
    memory, larger than any cache.
    """

    seconds: float
    rows: int
    widths: tuple[int, ...]
    model: tuple[int, int, int, int, int, int]
    sequences: int
    vector_bytes: int
    message_bytes: tuple[int, ...]
    unit_width: int
    steps: int


CPU = Effort(
    seconds=0.15,
    rows=1024,
    widths=(192, 256, 512, 768),
    model=(3, 256, 4, 704, 1024, 256),
    sequences=4,
    vector_bytes=2**26,
    message_bytes=(2**12, 2**16, 2**20, 2**22, 2**24),
    unit_width=768,
    steps=14,
)
GPU = Effort(
    seconds=0.3,
    rows=8192,
    widths=(1024, 2048, 4096, 8192),
    model=(4, 2048, 16, 5632, 32_000, 2048),
    sequences=4,
    vector_bytes=2**30,
    message_bytes=(2**12, 2**16, 2**20, 2**24, 2**28),
    unit_width=8192,
    steps=30,
)
TINY = (1, 32, 2, 64, 64, 16)
"""A model whose operators take the time of their launches."""


@dataclass(frozen=True, slots=True)
class Measured:
    """One operator at one place: `key` is its name in a task, and in the results."""

    key: str
    node: fx.Node
    tiny: bool


@dataclass
class Operators:
    """Units as a task for the workers, and what stands behind each key of the results."""

    units: list[Case] = field(default_factory=list)
    measured: dict[str, Measured] = field(default_factory=dict)
    seen: set[Any] = field(default_factory=set)

    def add(self, unit: Unit, label: str, dtype: str, tiny: bool) -> None:
        calls, imports = [], set()
        for node in unit.calls():
            entry, shapes = entry_of(node), shapes_of(node)
            printed = entry.render(node, [argument(a) for a in node.args], Localised())
            imports |= {one for one in printed.imports if one[0]}
            numbers = tuple(a for a in node.args if not isinstance(a, fx.Node))
            once = (entry.name, shapes.operands, shapes.result, str(numbers), tiny)
            key = f"{label}.{node.name}"
            own = not entry.alias and once not in self.seen
            if own:
                self.seen.add(once)
                self.measured[key] = Measured(key, node, tiny)
            reads = list(dict.fromkeys(a.name for a in tensor_operands(node)))
            calls.append(
                {"name": node.name, "text": printed.text, "key": key, "measured": own}
                | {"reads": reads}
            )
        if any(call["measured"] for call in calls):
            inputs = [
                made(n, unit) for n in unit.graph.nodes if n.op in ("placeholder", "get_attr")
            ]
            self.units.append(
                {"inputs": inputs, "imports": sorted(imports), "calls": calls, "dtype": dtype}
            )


def argument(value: object) -> str:
    return value.name if isinstance(value, fx.Node) else repr(value)


def made(node: fx.Node, unit: Unit) -> Case:
    """How an input of a unit is filled. below: of whole numbers; None: normal, times `scale`."""
    below = vocabulary(unit) if is_integer(node) else None
    scale = 0.02 if node.op == "get_attr" else 1.0
    return {"name": node.name, "shape": list(shape_of(node)), "below": below, "scale": scale}


def vocabulary(unit: Unit) -> int:
    """What ids may be at most: rows of the tables and columns of the logits that they meet."""
    sizes = [2**15]
    for node in unit.calls():
        operands = tensor_operands(node)
        if any(is_integer(o) for o in operands):
            floats = [shape_of(o) for o in operands if not is_integer(o)]
            sizes += [s[0] if len(s) == 2 else s[-1] for s in floats]
    return min(sizes)


def model_text(name: str, sizes: tuple[int, int, int, int, int, int]) -> str:
    layers, width, heads, ffn, vocab, context = sizes
    more = f"kv_heads={max(1, heads // 2)}, ffn={ffn}, " if name == "llama" else ""
    return (
        f"import {name}\nmodel m = {name}(layers={layers}, width={width}, heads={heads}, {more}"
        f"vocab={vocab}, context={context})\n"
    )


def session(name: str, sizes: tuple[int, int, int, int, int, int]) -> Session:
    """Of one of the models, for its graph alone: the cluster means nothing."""
    text = model_text(name, sizes) + "cluster any { node = cpu }\n"
    text += "train m { model = m; cluster = any; dataset = synthetic; batch = 1 sequences; "
    text += "steps = 1; precision = fp32 }\n"
    return Session(dsl.load("calibrate.llmspec", text=text))


def operators(effort: Effort, dtype: str) -> Operators:
    found = Operators()
    for name in MODELS:
        for sizes, sequences, tiny in ((TINY, 1, True), (effort.model, effort.sequences, False)):
            graph = session(name, sizes).graph(sequences)
            for unit in graph.units.values():
                found.add(unit, f"{name}.{'tiny' if tiny else 'full'}.{unit.name}", dtype, tiny)
    return found


def products(effort: Effort, dtypes: dict[str, str]) -> list[Case]:
    """dtypes: name in the language -> PyTorch's. Wide, narrow and deep ones of each width."""
    found = []
    for name, dtype in dtypes.items():
        for width in effort.widths:
            for columns, depth in ((width, width), (4 * width, width), (width, 4 * width)):
                sizes = {"rows": effort.rows, "columns": columns, "depth": depth}
                found.append({"name": name, "dtype": dtype, "tf32": name == "tf32", **sizes})
    return found


UNITS = 6
"""Of ZeRO's, in a chain."""
KINDS = ("all_reduce", "all_gather", "reduce_scatter", "all_to_all", "send")


def task(effort: Effort, *, gpu: bool, world: int, dtypes: dict[str, str], trains: str) -> Case:
    """The workers' task but for its operators. trains: the type that models are measured in."""
    elements = effort.model[1]
    found: Case = {
        "seconds": effort.seconds,
        "launches": [{"count": 100}],
        "products": products(effort, dtypes),
        "memory": [{"bytes": effort.vector_bytes}],
        "updates": [{"count": n, "width": w} for n, w in ((32, 8), (32, elements))],
    }
    if world > 1:
        found["collectives"] = [
            {"kind": kind, "bytes": size} for kind in KINDS for size in effort.message_bytes
        ]
        found["weights"] = [{"width": 8}]
        found["units"] = [{"count": UNITS, "width": w} for w in (16, effort.unit_width)]
    if gpu:
        found["copies"] = [{"bytes": 2**28}]
    return found
