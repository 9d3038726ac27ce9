"""Print one direction of a kernel in Triton, and the function that launches it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from llmspec.compiler.kernels.body import triton_body
from llmspec.compiler.kernels.direction import Direction
from llmspec.compiler.kernels.tiles import reduces_rows
from llmspec.compiler.ops.formula import Expr
from llmspec.compiler.text import Text
from llmspec.dsl.tuned import TunedPass

WIDE = ".to(tl.float32)"


@dataclass
class TritonPrinter:
    """tiles: by columns, those that were measured; others are by rule."""

    one: Direction
    text: Text
    imports: set[tuple[str, str]]
    tiles: Mapping[int, TunedPass] = field(default_factory=dict)

    def __post_init__(self) -> None:
        body = triton_body(self.one.roots, self.one.names)
        self.lines = body.run()
        self.results = [body.argument(r) for r in self.one.roots]
        pairs = list(zip(self.results, self.one.roots, strict=True))
        self.sums = {n: e for n, e in pairs if e.op == "column_sum"}
        self.whole_rows = reduces_rows(self.one.roots)

    # -- the kernel

    def print(self) -> None:
        self.imports |= {("runtime.fused", "jit"), ("runtime.fused", "tl")}
        if self.one.draws:
            self.imports.add(("runtime.fused", "random_bits"))
        pointers = [f"{n}_ptr" for n, _ in self.one.reads] + [f"{n}_ptr" for n in self.results]
        sizes = list(dict(self.one.row_sizes.values()))
        fixed = [*sizes, "COLUMNS", "TILE_ROWS", "TILE_COLUMNS"] + ["STAGES"] * bool(self.sums)
        given = [*pointers, *self.one.scalars, "rows", *(f"{f}: tl.constexpr" for f in fixed)]
        self.text.line('@jit("stream")' if self.one.draws else "@jit()")
        with self.text.block(f"def {self.one.name}_kernel({', '.join(given)}):"):
            across = "" if self.whole_rows else "tl.program_id(1) * TILE_COLUMNS + "
            self.text.line(f"column = {across}tl.arange(0, TILE_COLUMNS)[None, :]")
            for name, e in self.one.reads:
                if not e.rows:
                    self._load(name, e)
            if self.sums:
                self._loop()
            else:
                first = "tl.program_id(0) * TILE_ROWS"
                self.text.line(f"row = {first} + tl.arange(0, TILE_ROWS)[:, None]")
                self._tile()
        self.text.blank(2)

    def _loop(self) -> None:
        """Over every so manieth tile of rows; what is summed over rows is written once."""
        t = self.text
        for name in self.sums:
            t.line(f"{name} = tl.zeros((1, TILE_COLUMNS), tl.float32)")
        start, step = "tl.program_id(0) * TILE_ROWS", "tl.num_programs(0) * TILE_ROWS"
        with t.block(f"for first in tl.range({start}, rows, {step}, num_stages=STAGES):"):
            t.line("row = first + tl.arange(0, TILE_ROWS)[:, None]")
            self._tile()
        for name in self.sums:
            at = f"{name}_ptr + tl.program_id(0) * COLUMNS + column"
            t.line(f"tl.store({at}, {name}, mask=column < COLUMNS)")

    def _tile(self) -> None:
        t = self.text
        t.line("inside = (row < rows) & (column < COLUMNS)")
        t.line("at = row.to(tl.int64) * COLUMNS + column")
        for name, e in self.one.reads:
            if e.rows:
                self._load(name, e)
        self._turned()
        for name, value in self.lines:
            t.line(f"{name} += {value}" if name in self.sums else f"{name} = {value}")
        for name, e in zip(self.results, self.one.roots, strict=True):
            if name not in self.sums:
                where, mask = ("at", "inside") if e.columns else ("row", "row < rows")
                t.line(f"tl.store({name}_ptr + {where}, {name}, mask={mask})")

    def _load(self, name: str, e: Expr) -> None:
        integer = self.one.integer(e)
        at, mask = self._row(name), "row < rows"
        if e.columns and not e.rows:
            at, mask = "column", "column < COLUMNS"
        elif e.columns:
            at, mask = "at" if self.one.full(e) else f"({at}) * COLUMNS + column", "inside"
        rest = ", other=0" if integer else ", other=0.0"
        loaded = f"tl.load({name}_ptr + {at}, mask={mask}{rest})"
        self.text.line(f"{name} = {loaded}{'' if integer else WIDE}")

    def _row(self, name: str) -> str:
        """Which of its rows the grid's row reads."""
        sizes, row = self.one.row_sizes, "row"
        if f"{name} //" in sizes:
            row = f"row // {sizes[f'{name} //'][0]}"
        if f"{name} %" in sizes:
            row = f"{row if row == 'row' else f'({row})'} % {sizes[f'{name} %'][0]}"
        return row

    def _turned(self) -> None:
        turned = dict.fromkeys(e.args[0] for e in self.one.order if e.op == "turn")
        if not turned:
            return
        t = self.text
        t.line("# the other half of the row; what comes from the upper one changes its sign")
        t.line("other = (column + COLUMNS // 2) % COLUMNS")
        t.line("sign = tl.where(column < COLUMNS // 2, -1.0, 1.0)")
        for e in turned:
            name = self.one.names[id(e)]
            at = f"{name}_ptr + row.to(tl.int64) * COLUMNS + other"
            t.line(f"turned_{name} = sign * tl.load({at}, mask=inside, other=0.0){WIDE}")

    # -- its launcher

    def print_launcher(self) -> None:
        t, one = self.text, self.one
        rule = "whole_rows" if self.whole_rows else "flat"
        self.imports.add(("runtime.fused", rule))
        with t.block(f"def {one.name}_triton({one.parameters}) -> {one.returns}:"):
            for name, e in one.reads:
                if e.columns and e.rows:
                    t.line(f"{name} = {name}.contiguous()")
            t.line(f"rows, columns = {one.like}.shape[:-1].numel(), {one.like}.shape[-1]")
            t.line(f"tile = {rule}(columns{self._measured()})")
            grid = f"sums(rows, {one.like}.device)" if self.sums else "grid(rows)"
            t.line(f"grid = tile.{grid}")
            for name, e in zip(self.results, one.roots, strict=True):
                t.line(f"{name} = {self._empty(e)}")
            given = [n for n, _ in one.reads] + self.results + list(one.scalars) + ["rows"]
            given += [f"{n}={v}" for n, v in dict(one.row_sizes.values()).items()]
            given += ["STAGES=tile.stages"] * bool(self.sums)
            given += ["COLUMNS=columns", "**tile.options"]
            t.line(f"{one.name}_kernel[grid]({', '.join(given)})")
            ends = [f"{n}.sum(0)" if n in self.sums else n for n in self.results]
            t.line(f"return {', '.join(ends)}")
        t.blank(2)

    def _measured(self) -> str:
        rows = [
            f"{columns}: ({tile.rows}, {tile.columns}, {tile.warps}, {tile.stages})"
            for columns, tile in sorted(self.tiles.items())
        ]
        return f", measured={{{', '.join(rows)}}}" if rows else ""

    def _empty(self, e: Expr) -> str:
        like = self.one.like
        if e.op == "column_sum":
            return f"{like}.new_empty(grid[0], columns, dtype=torch.float32)"
        if e.columns:
            return f"torch.empty_like({like})"
        return f"{like}.new_empty(*{like}.shape[:-1], 1, dtype=torch.float32)"
