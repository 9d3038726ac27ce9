"""The class `Model`: the units of the chain one after the other, or those of a pipeline stage."""

from __future__ import annotations

from dataclasses import dataclass, replace

from llmspec.compiler.emit.classes import (
    Style,
    class_name,
    first_dropout,
    group_text,
    grow,
    has_dropout,
    leaf_groups,
    member_text,
)
from llmspec.compiler.emit.header import away_comments
from llmspec.compiler.graph import Instance, Unit
from llmspec.compiler.lower import Lowered
from llmspec.compiler.text import Text, plural, quoted


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockRun:
    """Equal blocks one after the other. start: the first one's place among all blocks."""

    unit: str
    container: str
    start: int
    count: int


@dataclass
class ChainPrinter:
    """makers: by plain unit, the expression that makes it."""

    lowered: Lowered
    style: Style
    text: Text
    makers: dict[str, str]

    def __post_init__(self) -> None:
        self.plan = self.lowered.plan
        self.chain = self.lowered.whole.instances
        self.staged = len(self.plan.stages) > 1
        self.keeps_on_host = "activations" in self.plan.offload and bool(self.lowered.blocks())

    def print(self) -> None:
        t = self.text
        what = f"`{quoted(self.lowered.whole.name)}`, {plural(len(self.chain) - 2, 'block')}"
        with t.block("class Model(nn.Module):"):
            if self.staged:
                t.line(f'"""One pipeline stage of {what}. Stage 0 takes tokens,')
                t.line("the others what the stage before sent; the last returns the loss.")
                t.line('"""')
            else:
                t.line(f'"""{what}: from tokens to the summed loss of their targets."""')
            t.blank()
            self._print_init()
            t.blank()
            self._print_forward()
            if self.plan.zero:
                t.blank()
                self._print_units()

    def _print_units(self) -> None:
        """What FSDP2 gathers as one. A tied table that first and last share stays with the root."""
        t = self.text
        blocks = self.lowered.blocks()
        runs = [f"*self.{run.container}.values()" for run in self._runs()]
        every = ", ".join(runs) if runs else "*self.chain" if blocks else ""
        ends = [self.chain[0].unit, self.chain[-1].unit]
        shared = set(leaf_groups(self.lowered.units[ends[0]])) & set(
            leaf_groups(self.lowered.units[ends[1]])
        )
        with t.block("def units(self) -> list[nn.Module]:"):
            t.line('"""What is gathered together, in the order of the forward."""')
            if not self.staged:
                first, last = (
                    ("", "") if shared or len(self.chain) == 1 else (f"self.{e}" for e in ends)
                )
                t.line(f"return [{', '.join(part for part in (first, every, last) if part)}]")
                return
            t.line(f"units: list[nn.Module] = [{every}]")
            with t.block("if self.is_first:"):
                t.line(f"units.insert(0, self.{ends[0]})")
            with t.block("if self.is_last:"):
                t.line(f"units.append(self.{ends[1]})")
            t.line("return units")

    def _on(self, condition: str, lines: list[str]) -> None:
        t = self.text
        if not lines:
            return
        if not self.staged:
            for line in lines:
                t.line(line)
            return
        with t.block(f"if {condition}:"):
            for line in lines:
                t.line(line)

    def _print_init(self) -> None:
        t = self.text
        first, last = self.chain[0], self.chain[-1]
        stage = ", stage: int" if self.staged else ""
        with t.block(f"def __init__(self, mesh: Mesh{stage}):"):
            t.line("super().__init__()")
            if self.staged:
                t.line("first, stop = STAGES[stage]")
                t.line("self.is_first, self.is_last = stage == 0, stage == len(STAGES) - 1")
            if self.keeps_on_host:
                self.style.imports.add(("runtime.host_activations", "HostActivations"))
                t.line("self.host = HostActivations(mesh)")
            for container in self._containers():
                t.line(f"{container} = Group()")
                self.style.imports.add(("runtime.parameters", "Group"))
            self._on("self.is_first", self._unit_lines(first, 0))
            self._print_blocks()
            self._on("self.is_last", self._unit_lines(last, len(self.chain) - 1))

    def _containers(self) -> list[str]:
        """Modules above the groups and blocks that need to be there before them."""
        paths: dict[str, None] = {}
        tops = [i.prefix for i in self.chain if i.prefix]
        for instance in self.chain:
            if not instance.prefix:
                tops += list(leaf_groups(self.lowered.units[instance.unit]))
        for path in tops:
            parts = path.split(".")
            stop = len(parts) - (2 if parts[-1].isdigit() else 1)
            for depth in range(1, stop + 1):
                paths[".".join(("self", *parts[:depth]))] = None
        return list(paths)

    def _unit_lines(self, instance: Instance, index: int) -> list[str]:
        """The statements that make a plain unit: its groups, then the module that uses them."""
        unit = self.lowered.units[instance.unit]
        lines = []
        for path in leaf_groups(unit):
            if self._made_by_first(path, instance):
                continue
            lines.append(f"self.{path} = {self._group(unit, path)}")
        maker = self.makers[unit.name].replace("{first_dropout}", str(first_dropout(index)))
        return [*lines, f"self.{unit.name} = {maker}"]

    def _made_by_first(self, path: str, instance: Instance) -> bool:
        """A tied table that the first unit of the same process already made."""
        first = self.chain[0]
        return (
            not self.staged
            and instance is not first
            and path in leaf_groups(self.lowered.units[first.unit])
        )

    def _group(self, unit: Unit, path: str) -> str:
        tree: dict = {}
        for weight in unit.parameters.values():
            group, _, name = weight.path.rpartition(".")
            if group == path:
                grow(tree, name, member_text(unit, weight, self.style))
        return group_text(tree, self.style)

    def _block_maker(self, unit: Unit, index: str, use: str) -> str:
        """`index`: of the block; `use`: of the unit's use."""
        arguments = ["mesh"]
        if has_dropout(unit.calls()):
            arguments.append(f"{first_dropout(1)} * ({index} + 1)")
        choices = self.style.recompute.get(unit.name)
        if choices is not None and choices.differ:
            arguments.append(f"{choices.constant}[{use}]")
        return f"{class_name(unit.name)}({', '.join(arguments)})"

    def _runs(self) -> tuple[BlockRun, ...]:
        """The blocks as rows of equal ones, each numbered from 0 in a container of its own; empty
        when they do not lie so."""
        runs: list[BlockRun] = []
        for number, block in enumerate(self.lowered.blocks()):
            container, _, key = block.prefix.rpartition(".")
            last = runs[-1] if runs else None
            if last and (last.unit, last.container) == (block.unit, container):
                runs[-1] = replace(last, count=last.count + 1)
            else:
                runs.append(BlockRun(unit=block.unit, container=container, start=number, count=1))
            if not container or key != str(runs[-1].count - 1):
                return ()
        containers = [run.container for run in runs]
        return tuple(runs) if len(set(containers)) == len(containers) else ()

    def _print_blocks(self) -> None:
        t = self.text
        blocks = self.lowered.blocks()
        if not blocks:
            return
        for run in self._runs():
            index = f"i + {run.start}" if run.start else "i"
            before = sum(b.unit == run.unit for b in blocks[: run.start])
            use = f"i + {before}" if before else "i"
            maker = self._block_maker(self.lowered.units[run.unit], index, use)
            bounds = self._bounds(run)
            t.line(
                f"self.{run.container} = nn.ModuleDict("
                f"{{str(i): {maker} for i in range({bounds})}})"
            )
        if self._runs():
            return
        for path in dict.fromkeys(b.prefix.rpartition(".")[0] for b in blocks):
            if path:
                t.line(f"self.{path} = nn.ModuleDict()")
        t.line("self.chain = nn.ModuleList()")
        for number, block in enumerate(blocks):
            self._print_single(block, number)

    def _bounds(self, run: BlockRun) -> str:
        """Of the numbers of a run's blocks that this process has."""
        if not self.staged:
            return str(run.count)
        first = f"max(first - {run.start}, 0)" if run.start else "first"
        stop = f"stop - {run.start}" if run.start else "stop"
        is_last = run.start + run.count == len(self.lowered.blocks())
        return f"{first}, {stop}" if is_last else f"{first}, min({stop}, {run.count})"

    def _print_single(self, block: Instance, number: int) -> None:
        """A block of a chain that is not uniform."""
        unit = self.lowered.units[block.unit]
        if block.prefix:
            path, _, key = block.prefix.rpartition(".")
            target = f'self.{path}["{key}"]' if path else f"self.{key}"
            use = sum(b.unit == block.unit for b in self.lowered.blocks()[:number])
            lines = [f"{target} = {self._block_maker(unit, str(number), str(use))}"]
        else:
            lines = self._unit_lines(block, number + 1)
            target = f"self.{unit.name}"
        lines.append(f"self.chain.append({target})")
        self._on(f"first <= {number} < stop", lines)

    def _print_forward(self) -> None:
        t = self.text
        start = "x" if self.staged else "tokens_BT"
        arguments = f"{start}: Tensor, targets_BT: Tensor, samples_B: Tensor"
        with t.block(f"def forward(self, {arguments}) -> Tensor:"):
            self._on("self.is_first", [f"x = {self._call('first', start)}"])
            self._print_loop()
            tail = f"return {self._call('last', 'x')}"
            self._on("self.is_last", [tail])
            if self.staged:
                t.line("return x")

    def _extra(self, name: str) -> str:
        """The further inputs of a unit."""
        names = {"targets": "targets_BT", "samples": "samples_B"}
        inputs = self.lowered.units[name].inputs
        flow = "targets" if name == "last" and inputs[0] == "targets" else inputs[0]
        return "".join(f", {names[i]}" for i in inputs if i in names and i != flow)

    def _call(self, which: str, value: str) -> str:
        instance = self.chain[0] if which == "first" else self.chain[-1]
        return f"self.{instance.unit}({value}{self._extra(instance.unit)})"

    def _print_loop(self) -> None:
        t = self.text
        blocks = self.lowered.blocks()
        if not blocks:
            return
        for run in self._runs():
            with t.block(f"for block in self.{run.container}.values():"):
                self._print_use(self._extra(run.unit))
        if self._runs():
            return
        extras = {self._extra(b.unit) for b in blocks}
        if len(extras) == 1:
            with t.block("for block in self.chain:"):
                self._print_use(extras.pop())
            return
        by_class = {class_name(b.unit): self._extra(b.unit) for b in blocks}
        with t.block("for block in self.chain:"):
            for kind, extra in by_class.items():
                with t.block(f"if isinstance(block, {kind}):"):
                    self._print_use(extra)

    def _print_use(self, extra: str) -> None:
        """One block's call."""
        t = self.text
        if not self.keeps_on_host:
            t.line(f"x = block(x{extra})")
            return
        for comment in away_comments(self.plan):
            t.line(f"# {comment}")
        with t.block("with self.host.keep(block, x):"):
            t.line(f"x = block(x{extra})")
