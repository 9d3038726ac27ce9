"""Print kernels.py: each kernel in plain PyTorch and in Triton, forward and backward."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from llmspec.compiler.kernels.body import plain_body
from llmspec.compiler.kernels.direction import Direction, backward_of, forward_of
from llmspec.compiler.kernels.group import Group
from llmspec.compiler.kernels.kinds import INDUCTOR, TRITON
from llmspec.compiler.kernels.operators import OperatorPrinter
from llmspec.compiler.kernels.triton import TritonPrinter
from llmspec.compiler.text import Text, formatted, in_bytes
from llmspec.dsl.tuned import TunedKernel

RULE = "# " + "-" * 98


@dataclass
class KernelPrinter:
    """places: where the model uses it. width: bytes of an element. bytes_per_s: of memory.
    tiles: by columns, those that were measured; others are by rule. by: what makes it."""

    group: Group
    places: Sequence[str]
    width: int
    bytes_per_s: float | None
    text: Text
    imports: set[tuple[str, str]]
    tiles: Mapping[int, TunedKernel] | None = None
    by: str = TRITON

    def print(self) -> None:
        forward, backward = forward_of(self.group), backward_of(self.group)
        self._header(backward is not None)
        forward_tiles = {c: k.forward for c, k in (self.tiles or {}).items()}
        backward_tiles = {c: k.backward for c, k in (self.tiles or {}).items() if k.backward}
        for one, tiles in ((forward, forward_tiles), (backward, backward_tiles)):
            if one is not None:
                self._plain(one)
                if self.by == TRITON:
                    triton = TritonPrinter(one, self.text, self.imports, tiles)
                    triton.print()
                    triton.print_launcher()
        given = (self.group, forward, backward, self.text, self.imports)
        OperatorPrinter(*given, by=self.by).print()

    def _header(self, has_backward: bool) -> None:
        t, group = self.text, self.group
        t.line(RULE)
        t.line(f"# {group.name}: {'; '.join(self.places)}")
        t.line("#")
        reads = _shaped([(i.name, i.node.meta["dims"]) for i in group.inputs if i.node is not None])
        writes = _shaped([(o.name, o.node.meta["dims"]) for o in group.outputs])
        t.line(f"#   {reads} -> {writes}")
        t.line(f"#   forward moves {self._moves(group.forward_bytes(self.width))}")
        if has_backward:
            again = group.read_again_bytes(self.width) if self.by == INDUCTOR else 0
            moved = self._moves(group.backward_bytes(self.width) + again)
            t.line(f"#   backward moves {moved}")
            if again:
                t.line(f"#     of these {in_bytes(again)} again, for sums over rows")
        kept = [i.name for i in group.kept_inputs]
        kept += [o.name for o in group.kept_outputs] + [e.label for e in group.kept_inside]
        t.line(f"#   kept for the backward: {', '.join(kept) or 'nothing'}")
        self._say_tiles()
        t.blank(2)

    def _say_tiles(self) -> None:
        """Nothing where the program's cluster has no measured kernels at all."""
        if self.tiles is None:
            return
        if not self.tiles:
            self.text.line("#   tiles by rule: not measured")
        for columns, kernel in sorted(self.tiles.items()):
            for word, one in kernel.directions:
                self.text.line(f"#   {word} tile of {columns} columns measured: {one.words}")

    def _moves(self, size: int) -> str:
        if not self.bytes_per_s:
            return in_bytes(size)
        time_ms = size / self.bytes_per_s * 1e3
        return f"{in_bytes(size)}: {time_ms:.3g} ms predicted, bound by memory"

    def _plain(self, one: Direction) -> None:
        t = self.text
        body = plain_body(one.roots, one.names, one.like)
        body.run()
        self.imports.add(("runtime.fused", "wide"))
        if any(e.op == "turn" for e in one.order):
            self.imports.add(("runtime.fused", "turned"))
        if any(e.op == "seen" for e in one.order):
            self.imports.add(("runtime.context", "hidden_keys"))
        if one.draws:
            self.imports.add(("runtime.random", "keep_scaled"))
        with t.block(f"def {one.name}_plain({one.parameters}) -> {one.returns}:"):
            t.line(f"kind = {one.like}.dtype")
            for name, e in one.reads:
                if not one.integer(e):
                    t.line(f"{name} = wide({name})")
            for name, value in body.lines:
                t.line(f"{name} = {value}")
            ends = [f"{body.argument(e)}{'.to(kind)' * (e.rows and e.columns)}" for e in one.roots]
            t.line(f"return {', '.join(ends)}")
        t.blank(2)


def _shaped(values: Sequence[tuple[str, str]]) -> str:
    """`gate, up [B, T, F]; weight [D]`."""
    by_dims: dict[str, list[str]] = {}
    for name, dims in values:
        by_dims.setdefault(dims, []).append(name)
    parts = [f"{', '.join(n)} [{', '.join(d)}]" if d else ", ".join(n) for d, n in by_dims.items()]
    return "; ".join(parts)


def print_kernels(
    kernels: Mapping[str, tuple[Group, Sequence[str]]],
    *,
    header: Sequence[str],
    width: int,
    bytes_per_s: float | None,
    tiles: Mapping[str, Mapping[int, TunedKernel]] | None = None,
    by: str = TRITON,
) -> str:
    """kernels: by name, the group and the places where it is used. tiles: by name and columns, what
    was measured; None: on no cluster."""
    body, imports = Text(), set[tuple[str, str]]()
    for name, (group, places) in kernels.items():
        own = None if tiles is None else tiles.get(name, {})
        KernelPrinter(group, places, width, bytes_per_s, body, imports, own, by).print()
    head = Text()
    head.line('"""' + header[0])
    head.lines += [*header[1:], '"""', "", "from __future__ import annotations", ""]
    head.lines += ["import torch", "from torch import Tensor"]
    by_module: dict[str, set[str]] = {}
    for module, name in imports:
        by_module.setdefault(module, set()).add(name)
    for module, names in sorted(by_module.items()):
        head.line(f"from {module} import {', '.join(sorted(names))}")
    head.blank(2)
    return formatted(head.render() + body.render(), "kernels.py")
