"""Print kernels.py: each kernel in plain PyTorch and in Triton, forward and backward."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from llmspec.compiler.emit.text import Text, formatted, in_bytes
from llmspec.compiler.kernels.body import plain_body, triton_body
from llmspec.compiler.kernels.group import Group, Input
from llmspec.compiler.kernels.tiles import reduces_rows
from llmspec.compiler.ops.formula import Expr, in_order

RULE = "# " + "-" * 98
COUNTED = {"B": "SEQUENCES", "T": "TOKENS", "H": "HEADS", "K": "HEADS", "C": "TOKENS"}
"""Letters of dimensions in names of constants."""
SCALARS = {"stream": "int", "threshold": "int", "raised": "float"}
"""What a dropout draws its mask from, besides tensors."""


@dataclass
class Pass:
    """One direction of one kernel: what it reads and what it writes, as its functions name them."""

    name: str
    group: Group
    roots: list[Expr]
    reads: list[tuple[str, Expr]]
    names: dict[int, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.names = {id(e): name for name, e in self.reads}
        self.reached = {id(e) for e in self.order}

    @property
    def order(self) -> list[Expr]:
        known = [e for _, e in self.reads]
        return [e for _, e in self.reads] + in_order(self.roots, known)

    @property
    def draws(self) -> bool:
        return any(e.op == "keep" for e in self.order)

    @property
    def like(self) -> str:
        """A tensor of the whole shape."""
        return next(n for n, e in self.reads if e.rows and e.columns and self.full(e))

    def full(self, e: Expr) -> bool:
        place = self.input_of(e)
        return place is None or place.place.full

    def input_of(self, e: Expr) -> Input | None:
        return next((i for i in self.group.inputs if i.expr is e), None)

    def integer(self, e: Expr) -> bool:
        found = self.input_of(e)
        return found is not None and found.integer

    @property
    def scalars(self) -> dict[str, str]:
        return SCALARS if self.draws else {}

    @property
    def parameters(self) -> str:
        tensors = [f"{name}: Tensor" for name, _ in self.reads]
        return ", ".join([*tensors, *(f"{n}: {t}" for n, t in self.scalars.items())])

    @property
    def arguments(self) -> str:
        return ", ".join([*(name for name, _ in self.reads), *self.scalars])

    @property
    def returns(self) -> str:
        return _tuple_type(len(self.roots))

    @property
    def sums(self) -> list[Expr]:
        return [e for e in self.roots if e.op == "column_sum"]


def _tuple_type(count: int) -> str:
    return "Tensor" if count == 1 else f"tuple[{', '.join(['Tensor'] * count)}]"


def forward_pass(group: Group) -> Pass:
    reads = [(i.name, i.expr) for i in group.inputs]
    return Pass(group.name, group, group.written, reads)


def backward_pass(group: Group) -> Pass | None:
    """None: every gradient is one that comes in."""
    if not group.distinct_gradients:
        return None
    reads = [(e.label, e) for e in group.read_backward]
    reads += [(i.name, i.expr) for i in group.kept_inputs]
    return Pass(f"{group.name}_backward", group, group.distinct_gradients, reads)


# --------------------------------------------------------------------------------------------------
# One kernel


@dataclass
class KernelPrinter:
    group: Group
    text: Text
    places: Sequence[str]
    width: int
    bytes_per_s: float | None
    imports: set[tuple[str, str]] = field(default_factory=set)

    def print(self) -> None:
        forward, backward = forward_pass(self.group), backward_pass(self.group)
        self._header(forward, backward)
        for one in (forward, backward):
            if one is None:
                continue
            self._plain(one)
            self._kernel(one)
            self._launcher(one)
        self._operators(forward, backward)

    # -- words

    def _header(self, forward: Pass, backward: Pass | None) -> None:
        t, group = self.text, self.group
        t.line(RULE)
        t.line(f"# {group.name}: {'; '.join(self.places)}")
        t.line("#")
        t.line(f"#   forward   {self._moves(group.forward_bytes(self.width))}")
        if backward is not None:
            t.line(f"#   backward  {self._moves(group.backward_bytes(self.width))}")
        kept = [i.name for i in group.kept_inputs]
        kept += [o.name for o in group.kept_outputs] + [e.label for e in group.kept_inside]
        t.line(f"#   kept for the backward: {', '.join(kept) or 'nothing'}")
        t.blank(2)

    def _moves(self, size: int) -> str:
        shape = f"{self.group.rows} rows of {self.group.columns}"
        said = f"{shape}: moves {in_bytes(size)}"
        if self.bytes_per_s:
            said += f", {size / self.bytes_per_s * 1e3:.3g} ms predicted, bound by memory"
        return said

    # -- plain PyTorch

    def _plain(self, one: Pass) -> None:
        t = self.text
        body = plain_body(one.roots, one.names, one.like)
        body.run()
        made = [body.argument(r) for r in one.roots]
        with t.block(f"def {one.name}_plain({one.parameters}) -> {one.returns}:"):
            t.line(f"kind = {one.like}.dtype")
            floats = [n for n, e in one.reads if not one.integer(e)]
            self.imports.add(("runtime.fused", "wide"))
            for name in floats:
                t.line(f"{name} = wide({name})")
            for name, value in body.lines:
                t.line(f"{name} = {value}")
            ends = [
                f"{name}.to(kind)" if e.rows and e.columns else name
                for name, e in zip(made, one.roots, strict=True)
            ]
            t.line(f"return {', '.join(ends)}")
        for name, word in (("turn", "turned"),):
            if any(e.op == name for e in one.order):
                self.imports.add(("runtime.fused", word))
        if one.draws:
            self.imports.add(("runtime.random", "keep_scaled"))
        t.blank(2)

    # -- Triton

    def _kernel(self, one: Pass) -> None:
        t = self.text
        self.imports |= {("runtime.fused", "jit"), ("runtime.fused", "tl")}
        body = triton_body(one.roots, one.names)
        body.run()
        pointers = [f"{name}_ptr" for name, _ in one.reads]
        results = self._results(one)
        pointers += [f"{name}_ptr" for name in results]
        sizes = list(dict(self._row_sizes(one).values()))
        names = [*pointers, *one.scalars, "rows"]
        fixed = [*sizes, "COLUMNS", "TILE_ROWS", "TILE_COLUMNS"]
        given = ", ".join([*names, *(f"{f}: tl.constexpr" for f in fixed)])
        t.line('@jit("stream")' if one.draws else "@jit()")
        with t.block(f"def {one.name}_kernel({given}):"):
            across = "" if reduces_rows(one.roots) else "tl.program_id(1) * TILE_COLUMNS + "
            t.line(f"column = {across}tl.arange(0, TILE_COLUMNS)[None, :]")
            for name, e in one.reads:
                if not e.rows:
                    self._load(one, name, e)
            if one.sums:
                for e in one.sums:
                    t.line(f"{self._sum_name(results, one, e)} = tl.zeros((1, TILE_COLUMNS), tl.float32)")
                start, step = "tl.program_id(0) * TILE_ROWS", "tl.num_programs(0) * TILE_ROWS"
                with t.block(f"for first in range({start}, rows, {step}):"):
                    t.line("row = first + tl.arange(0, TILE_ROWS)[:, None]")
                    self._tile(one, body.lines, results)
                for e in one.sums:
                    name = self._sum_name(results, one, e)
                    at = f"{name}_ptr + tl.program_id(0) * COLUMNS + column"
                    t.line(f"tl.store({at}, {name}, mask=column < COLUMNS)")
            else:
                t.line("row = tl.program_id(0) * TILE_ROWS + tl.arange(0, TILE_ROWS)[:, None]")
                self._tile(one, body.lines, results)
        t.blank(2)

    def _results(self, one: Pass) -> list[str]:
        body = triton_body(one.roots, one.names)
        body.run()
        return [body.argument(r) for r in one.roots]

    def _sum_name(self, results: list[str], one: Pass, e: Expr) -> str:
        return results[next(i for i, r in enumerate(one.roots) if r is e)]

    def _row_sizes(self, one: Pass) -> dict[str, tuple[str, str]]:
        """Of the grid's dimensions that a shared row is found by: the constant's name, and what it
        is in a launcher."""
        out: dict[str, tuple[str, str]] = {}
        for name, e in one.reads:
            found = one.input_of(e)
            if found is None or not found.place.rows or found.place.full:
                continue
            first, stop, last = found.place.first, found.place.stop, len(self.group.whole) - 1
            if stop < last:
                out[f"{name} //"] = self._span(one, stop, last)
            if first:
                out[f"{name} %"] = self._span(one, first, stop)
        return out

    def _span(self, one: Pass, first: int, stop: int) -> tuple[str, str]:
        dims = str(self.group.members[0].meta["dims"])[first:stop].upper()
        words = [COUNTED.get(d, f"DIM_{first + i}") for i, d in enumerate(dims)]
        name = "_".join(words) or f"DIMS_{first}"
        size = f"{one.like}.shape[{first}]" if stop == first + 1 else (
            f"{one.like}.shape[{first}:{stop}].numel()"
        )
        return name, size

    def _load(self, one: Pass, name: str, e: Expr) -> None:
        """`inside`, `at` and `row` are there where the value has rows."""
        cast = "" if one.integer(e) else ".to(tl.float32)"
        other = "" if one.integer(e) else ", other=0.0"
        row, mask = "row", []
        sizes = self._row_sizes(one)
        if f"{name} //" in sizes:
            row = f"row // {sizes[f'{name} //'][0]}"
        if f"{name} %" in sizes:
            row = f"{row if row == 'row' else f'({row})'} % {sizes[f'{name} %'][0]}"
        if e.rows:
            mask.append("row < rows")
        if e.columns:
            mask.append("column < COLUMNS")
        masked = "inside" if len(mask) == 2 else mask[0]
        match e.rows, e.columns:
            case True, True:
                at = "at" if one.full(e) else f"({row}) * COLUMNS + column"
            case True, False:
                at = row
            case _:
                at = "column"
        self.text.line(f"{name} = tl.load({name}_ptr + {at}, mask={masked}{other}){cast}")

    def _tile(self, one: Pass, lines: list[tuple[str, str]], results: list[str]) -> None:
        t = self.text
        t.line("inside = (row < rows) & (column < COLUMNS)")
        t.line("at = row.to(tl.int64) * COLUMNS + column")
        sums = {self._sum_name(results, one, e) for e in one.sums}
        turned = [e.args[0] for e in one.order if e.op == "turn"]
        for name, e in one.reads:
            if e.rows:
                self._load(one, name, e)
        if turned:
            t.line("# the other half of the row; what comes from the upper one changes its sign")
            t.line("other = (column + COLUMNS // 2) % COLUMNS")
            t.line("sign = tl.where(column < COLUMNS // 2, -1.0, 1.0)")
            for e in dict.fromkeys(turned):
                name = one.names[id(e)]
                at = "row.to(tl.int64) * COLUMNS + other"
                loaded = f"tl.load({name}_ptr + {at}, mask=inside, other=0.0).to(tl.float32)"
                t.line(f"turned_{name} = sign * {loaded}")
        for name, value in lines:
            t.line(f"{name} += {value}" if name in sums else f"{name} = {value}")
        for name, e in zip(results, one.roots, strict=True):
            if name in sums:
                continue
            where, mask = ("at", "inside") if e.columns else ("row", "row < rows")
            t.line(f"tl.store({name}_ptr + {where}, {name}, mask={mask})")

    def _launcher(self, one: Pass) -> None:
        t = self.text
        rule = "whole_rows" if reduces_rows(one.roots) else "flat"
        self.imports.add(("runtime.fused", rule))
        results = self._results(one)
        with t.block(f"def {one.name}_triton({one.parameters}) -> {one.returns}:"):
            for name, e in one.reads:
                if e.rows and one.input_of(e) is None or (e.rows and e.columns):
                    t.line(f"{name} = {name}.contiguous()")
            t.line(f"rows, columns = {one.like}.shape[:-1].numel(), {one.like}.shape[-1]")
            t.line(f"tile = {rule}(columns)")
            if one.sums:
                t.line(f"grid = tile.sums(rows, {one.like}.device)")
            else:
                t.line("grid = tile.grid(rows)")
            for name, e in zip(results, one.roots, strict=True):
                t.line(f"{name} = {self._empty(one, e)}")
            sizes = [f"{n}={v}" for n, v in dict(self._row_sizes(one).values()).items()]
            given = [n for n, _ in one.reads] + results + list(one.scalars) + ["rows"]
            fixed = [*sizes, "COLUMNS=columns", "**tile.options"]
            t.line(f"{one.name}_kernel[grid]({', '.join([*given, *fixed])})")
            ends = [f"{n}.sum(0)" if e.op == "column_sum" else n for n, e in zip(results, one.roots, strict=True)]
            t.line(f"return {', '.join(ends)}")
        t.blank(2)

    def _empty(self, one: Pass, e: Expr) -> str:
        if e.op == "column_sum":
            columns = "columns" if e.columns else "1"
            return f"{one.like}.new_empty(grid[0], {columns}, dtype=torch.float32)"
        if e.columns:
            return f"torch.empty_like({one.like})"
        return f"{one.like}.new_empty(*{one.like}.shape[:-1], 1, dtype=torch.float32)"

    # -- operators

    def _operators(self, forward: Pass, backward: Pass | None) -> None:
        t, group = self.text, self.group
        self.imports.add(("runtime.fused", "operator"))
        if backward is not None:
            name = backward.name
            t.line(f'{name} = operator("{name}", {name}_plain, {name}_triton)')
            t.blank(2)
        self._keep(forward)
        self._gradients(forward, backward)
        own = self._op_name(forward)
        t.line(
            f'{own} = operator("{group.name}", {group.name}_plain, {group.name}_triton, '
            f"_{group.name}_gradients, _keep_{group.name})"
        )
        t.blank(2)
        if own != group.name:
            self._face(forward)

    def _op_name(self, forward: Pass) -> str:
        plain = not self.group.kept_inside and not forward.draws
        return self.group.name if plain else f"_{self.group.name}"

    def _keep(self, forward: Pass) -> None:
        t, group = self.text, self.group
        inputs = [n for n, _ in forward.reads] + list(forward.scalars)
        backward = backward_pass(group)
        kept = [e for _, e in backward.reads] if backward is not None else []
        wanted = [n for n, e in forward.reads if any(e is k for k in kept)]
        results = [o.name for o in group.outputs] + [e.label for e in group.kept_inside]
        made = [
            n
            for n, e in zip(results, group.written, strict=True)
            if any(e is k for k in kept)
        ]
        self.kept_names = [*made, *wanted]
        summed = self._summed()
        with t.block(f"def _keep_{group.name}(ctx, inputs, output) -> None:"):
            used = set(wanted) | set(summed)
            if backward and backward.draws:
                used |= set(SCALARS)
            if used:
                names = [n if n in used else "_" for n in inputs]
                t.line(f"{', '.join(names)}{',' if len(names) == 1 else ''} = inputs")
            if made:
                names = [n if n in made else "_" for n in results]
                t.line(f"{', '.join(names)} = output")
            t.line(f"ctx.save_for_backward({', '.join(self.kept_names)})")
            if backward and backward.draws:
                t.line("ctx.mask = stream, threshold, scale")
            for name in summed:
                t.line(f"ctx.{name}_shape = {name}.shape")
        t.blank(2)

    def _summed(self) -> list[str]:
        """Inputs that some rows share: their gradients are added up afterwards."""
        return [
            i.name
            for i in self.group.inputs
            if i.differentiable and i.place.rows and i.size != self.group.rows * (self.group.columns if i.place.columns else 1)
        ]

    def _gradients(self, forward: Pass, backward: Pass | None) -> None:
        t, group = self.text, self.group
        coming = [e.label for e in group.incoming.values()]
        more = [f"_{i}" for i in range(len(group.kept_inside))]
        with t.block(f"def _{group.name}_gradients(ctx, {', '.join([*coming, *more])}):"):
            names = {id(e): e.label for e in group.incoming.values()}
            if backward is not None:
                results = self._results(backward)
                names |= {id(e): n for n, e in zip(results, backward.roots, strict=True)}
                kept = self.kept_names
                if kept:
                    t.line(f"{', '.join(kept)}{',' if len(kept) == 1 else ''} = ctx.saved_tensors")
                given = [n for n, _ in backward.reads]
                given += ["*ctx.mask"] if backward.draws else []
                target = ", ".join(results)
                t.line(f"{target} = {backward.name}({', '.join(given)})")
            ends = []
            for i in group.inputs:
                if not i.differentiable:
                    ends.append("None")
                    continue
                text = names[id(group.gradients[i])]
                if i.name in self._summed():
                    text += f".sum_to_size(ctx.{i.name}_shape)"
                ends.append(text)
            ends += ["None"] * len(forward.scalars)
            t.line(f"return {', '.join(ends)}")
        t.blank(2)

    def _face(self, forward: Pass) -> None:
        """What the model calls, where that is not the operator itself."""
        t, group = self.text, self.group
        tensors = [i.name for i in group.inputs if not (i.integer and forward.draws)]
        parameters = [f"{n}: Tensor" for n in tensors]
        given = [i.name if i.name in tensors else f"mask.{i.extra.name}" for i in group.inputs]  # type: ignore[union-attr]
        if forward.draws:
            self.imports.add(("runtime.random", "Mask"))
            parameters.append("mask: Mask")
            given += [f"mask.{n}" for n in SCALARS]
        count = len(group.outputs)
        with t.block(f"def {group.name}({', '.join(parameters)}) -> {_tuple_type(count)}:"):
            call = f"_{group.name}({', '.join(given)})"
            if group.kept_inside:
                call += "[0]" if count == 1 else f"[:{count}]"
            t.line(f"return {call}")
        t.blank(2)


# --------------------------------------------------------------------------------------------------
# The file


def print_kernels(
    kernels: dict[str, tuple[Group, list[str]]],
    *,
    header: Sequence[str],
    width: int,
    bytes_per_s: float | None,
) -> str:
    """kernels: by name, the group and where it is used. width: bytes of an element."""
    body = Text()
    imports: set[tuple[str, str]] = set()
    for group, places in kernels.values():
        printer = KernelPrinter(group, body, places, width, bytes_per_s)
        printer.print()
        imports |= printer.imports
    head = Text()
    head.line('"""' + header[0])
    for line in header[1:]:
        head.line(line)
    head.line('"""')
    head.blank()
    head.line("from __future__ import annotations")
    head.blank()
    head.line("import torch")
    head.line("from torch import Tensor")
    by_module: dict[str, set[str]] = {}
    for module, name in imports:
        by_module.setdefault(module, set()).add(name)
    for module, names in sorted(by_module.items()):
        head.line(f"from {module} import {', '.join(sorted(names))}")
    head.blank(2)
    return formatted(head.render() + body.render(), "kernels.py")
