"""Print model.py: one class per distinct block, and the model that chains them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from llmspec.compiler.emit.again import Choices, Operators, constant
from llmspec.compiler.emit.chain import ChainPrinter
from llmspec.compiler.emit.classes import Style, print_block, print_plain
from llmspec.compiler.emit.comments import Comments, Times
from llmspec.compiler.emit.header import Header
from llmspec.compiler.emit.legend import legend
from llmspec.compiler.lower import Lowered
from llmspec.compiler.passes.recompute import by_instance, in_words
from llmspec.compiler.plan import EVERYTHING
from llmspec.compiler.precision import TORCH, WORDS, Precision
from llmspec.compiler.text import Text, formatted, quoted

Freed = Callable[[str, Operators], str]
"""What computing operators of a unit again saves and costs, in words."""


@dataclass(kw_only=True)
class ModelPrinter:
    """seed: of dropout masks. times: predicted seconds of what is sent forward."""

    lowered: Lowered
    precision: Precision
    seed: int
    spec: str
    times: Times | None = None
    freed: Freed | None = None

    def __post_init__(self) -> None:
        self.plan, self.chain = self.lowered.plan, self.lowered.whole.instances
        zero, mesh, precision = self.plan.zero, self.plan.mesh, self.precision
        comments = Comments(mesh, precision, self.times or (lambda move: None))
        self.style = Style(
            source=quoted(self.spec),
            cast=precision.mixed and zero == 0,
            # ZeRO leaves experts that one rank alone has as they are stored
            cast_experts=precision.mixed and (zero == 0 or mesh.expert_data == 1),
            stored=precision.stored,
            recompute=self._choices(),
            comment=comments.of_move,
            sent=comments.of_sender,
            placements={n: p.parameters for n, p in self.lowered.placements.items()},
        )

    def _choices(self) -> dict[str, Choices]:
        """By unit, what each of its uses computes again."""
        chosen = by_instance(self.chain, self.plan.recompute)
        by_unit: dict[str, list[Operators]] = {}
        there = {n: {c.name for c in u.calls()} for n, u in self.lowered.units.items()}
        for instance, operators in zip(self.chain, chosen, strict=True):
            if instance.prefix:
                if not isinstance(operators, str):  # what is inside a kernel goes with it
                    operators = tuple(o for o in operators if o in there[instance.unit])
                by_unit.setdefault(instance.unit, []).append(operators)
        some = [n for n, own in by_unit.items() if any(own) and set(own) != {EVERYTHING}]

        def words(name: str) -> Callable[[Operators], str]:
            def of(operators: Operators) -> str:
                said = ", ".join(in_words(self.lowered.units[name], operators))
                return said if self.freed is None else f"{said}: {self.freed(name, operators)}"

            return of

        return {
            name: Choices(tuple(own), constant(name, some), words(name))
            for name, own in by_unit.items()
        }

    def print(self) -> str:
        body = Text()
        distinct = dict.fromkeys(i.unit for i in self.chain)
        plain = {n for n in distinct if self._plain(n)}
        makers = {}
        for name in distinct:
            unit = self.lowered.units[name]
            if name in plain:
                makers[name] = print_plain(unit, self.style, body)
            else:
                print_block(unit, self.style, body)
        ChainPrinter(self.lowered, self.style, body, makers).print()
        head = Text()
        self._print_head(head)
        return formatted(head.render() + body.render(), "model.py")

    def _plain(self, name: str) -> bool:
        return all(i.prefix == "" for i in self.chain if i.unit == name)

    def _print_head(self, text: Text) -> None:
        choices = [c for c in self.style.recompute.values() if c.mixed]
        if any(isinstance(o, str) for c in choices for o in c.of_each):
            self.style.imports.add(("runtime.recompute", "EVERYTHING"))
        first, *rest = Header(self.plan, quoted(self.spec)).lines()
        text.line('"""' + first)
        for line in [*rest, *legend(self.lowered)]:
            text.line(line)
        text.line('"""')
        text.blank()
        if ("collections.abc", "Collection") in self.style.imports:
            text.line("from collections.abc import Collection")
            text.blank()
        for module in ("torch", "torch.nn.functional as F"):
            text.line(f"import {module}")
        text.line("from torch import Tensor, nn")
        by_module: dict[str, set[str]] = {}
        for module, name in self.style.imports | {("runtime.mesh", "Mesh")}:
            if module == "collections.abc":
                continue
            by_module.setdefault(module, set()).add(name)
        for module, names in sorted(by_module.items()):
            if module:
                text.line(f"from {module} import {', '.join(sorted(names))}")
            else:  # modules beside this one
                text.lines += [f"import {name}" for name in sorted(names)]
        text.blank()
        if self.style.cast or (self.style.cast_experts and self.plan.mesh.expert > 1):
            compute, stored = TORCH[self.precision.compute], WORDS[self.precision.stored]
            text.line(f"COMPUTE = {compute}  # weights are stored in {stored}")
        if self.precision.stored != "fp32":
            text.line(f"STORED = {TORCH[self.precision.stored]}  # weights and their gradients")
        if self.lowered.whole.dropout:
            text.line(f"SEED = {self.seed}")
        if len(self.plan.stages) > 1:
            cuts = tuple(
                (max(a - 1, 0), min(b - 1, len(self.chain) - 2)) for a, b in self.plan.stages
            )
            text.line("# blocks of each pipeline stage: first, stop")
            text.line(f"STAGES = {cuts!r}")
        self._print_choices(text)
        text.blank(2)

    def _print_choices(self, text: Text) -> None:
        """What blocks compute again, where it is not simply all."""
        for unit, choices in self.style.recompute.items():
            if not choices.mixed:
                continue
            which = "each" if choices.differ else "a"
            text.blank()
            choices.print(text, f"{which} block `{quoted(unit)}`")
