"""Print what makes a kernel a torch.library operator with a gradient."""

from __future__ import annotations

from dataclasses import dataclass

from llmspec.compiler.kernels.body import triton_body
from llmspec.compiler.kernels.direction import SCALARS, Direction, tuple_type
from llmspec.compiler.kernels.group import Group
from llmspec.compiler.kernels.kinds import TRITON
from llmspec.compiler.ops.registry import shape_of
from llmspec.compiler.text import Text


@dataclass
class OperatorPrinter:
    group: Group
    forward: Direction
    backward: Direction | None
    text: Text
    imports: set[tuple[str, str]]
    by: str = TRITON

    def __post_init__(self) -> None:
        kept = [e for _, e in self.backward.reads] if self.backward is not None else []
        reads = [(n, e) for n, e in self.forward.reads if any(e is k for k in kept)]
        given = {i.name for i in self.group.inputs if i.node is not None}
        self.kept_inputs = [n for n, _ in reads if n in given]
        self.extras = [n for n, _ in reads if n not in given]
        self.results = [o.name for o in self.group.outputs]
        self.results += [e.label for e in self.group.kept_inside]
        pairs = zip(self.results, self.group.written, strict=True)
        self.kept_results = [n for n, e in pairs if any(e is k for k in kept)]
        self.kept = [*self.kept_results, *self.kept_inputs]
        if self.backward is not None and self.backward.draws:
            self.extras += SCALARS

    @property
    def own_name(self) -> str:
        """The operator's, behind a function where the model passes and takes less than it does."""
        plain = not self.group.kept_inside and not self.forward.draws
        return self.group.name if plain else f"_{self.group.name}"

    def print(self) -> None:
        name = self.group.name
        module = "runtime.fused" if self.by == TRITON else "runtime.compiled"
        self.imports.add((module, "operator"))
        if self.backward is not None:
            back = self.backward.name
            self.text.line(f'{back} = operator("{back}", {self._functions(back)})')
            self.text.blank(2)
        self._keep()
        self._gradients()
        functions = f"{self._functions(name)}, _{name}_gradients, _keep_{name}"
        self.text.line(f'{self.own_name} = operator("{name}", {functions})')
        self.text.blank(2)
        if self.own_name != name:
            self._face()

    def _functions(self, name: str) -> str:
        return f"{name}_plain, {name}_triton" if self.by == TRITON else f"{name}_plain"

    def _keep(self) -> None:
        t, summed = self.text, self._summed()
        used = {*self.kept_inputs, *self.extras, *summed}
        with t.block(f"def _keep_{self.group.name}(ctx, inputs, output) -> None:"):
            if used:
                given = [n for n, _ in self.forward.reads] + list(self.forward.scalars)
                t.line(f"{_unpacked([n if n in used else '_' for n in given])} = inputs")
            if self.kept_results:
                given = [n if n in self.kept_results else "_" for n in self.results]
                t.line(f"{', '.join(given)} = output")
            t.line(f"ctx.save_for_backward({', '.join(self.kept)})")
            if self.extras:  # no activations: all layers share them
                t.line(f"ctx.extras = {_unpacked(self.extras)}")
            for name in summed:
                t.line(f"ctx.{name}_shape = {name}.shape")
        t.blank(2)

    def _summed(self) -> dict[str, str]:
        """Inputs whose gradients still have to take their shape: rows of theirs that several of the
        grid's share are added up, dimensions of one restored."""
        out = {}
        for i in self.group.inputs:
            if i.node is None or i.place.full:
                continue
            if i.place.rows:
                out[i.name] = f".sum_to_size(ctx.{i.name}_shape)"
            elif len(shape_of(i.node)) > 1:
                out[i.name] = f".view(ctx.{i.name}_shape)"
        return out

    def _gradients(self) -> None:
        t, group = self.text, self.group
        coming = [e.label for e in group.incoming.values()]
        arguments = ["ctx", *coming, *(f"_{e.label}" for e in group.kept_inside)]
        names = {id(e): e.label for e in group.incoming.values()}
        with t.block(f"def _{group.name}_gradients({', '.join(arguments)}):"):
            if self.backward is not None:
                names |= self._call_backward(self.backward)
            summed, ends = self._summed(), []
            for i in group.inputs:
                text = names[id(group.gradients[i])] if i.differentiable else "None"
                ends.append(text + summed.get(i.name, ""))
            ends += ["None"] * len(self.forward.scalars)
            t.line(f"return {', '.join(ends)}")
        t.blank(2)

    def _call_backward(self, backward: Direction) -> dict[int, str]:
        if self.kept:
            self.text.line(f"{_unpacked(self.kept)} = ctx.saved_tensors")
        if self.extras:
            self.text.line(f"{_unpacked(self.extras)} = ctx.extras")
        body = triton_body(backward.roots, backward.names)
        body.run()
        results = [body.argument(r) for r in backward.roots]
        given = [n for n, _ in backward.reads] + list(backward.scalars)
        self.text.line(f"{', '.join(results)} = {backward.name}({', '.join(given)})")
        return {id(e): n for n, e in zip(results, backward.roots, strict=True)}

    def _face(self) -> None:
        t, group = self.text, self.group
        given, parameters = [], []
        for i in group.inputs:
            drawn = i.extra is not None and i.extra.drawn
            given.append(f"mask.{i.extra.name}" if drawn and i.extra else i.name)
            parameters += [] if drawn else [f"{i.name}: Tensor"]
        if self.forward.draws:
            self.imports.add(("runtime.random", "Mask"))
            parameters.append("mask: Mask")
            given += [f"mask.{n}" for n in SCALARS]
        count = len(group.outputs)
        with t.block(f"def {group.name}({', '.join(parameters)}) -> {tuple_type(count)}:"):
            part = "" if not group.kept_inside else "[0]" if count == 1 else f"[:{count}]"
            t.line(f"return {self.own_name}({', '.join(given)}){part}")
        t.blank(2)


def _unpacked(names: list[str]) -> str:
    return f"{names[0]}," if len(names) == 1 else ", ".join(names)
