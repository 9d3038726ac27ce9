"""Print model.py: one class per distinct block, and the model that chains them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from torch import fx

from llmspec.compiler.cost.unit import sent_by, sent_width
from llmspec.compiler.emit.again import Choices, Operators, constant
from llmspec.compiler.emit.classes import (
    Style,
    class_name,
    first_dropout,
    group_text,
    grow,
    has_dropout,
    leaf_groups,
    member_text,
    print_block,
    print_plain,
)
from llmspec.compiler.emit.text import Text, formatted, in_bytes, plural, quoted
from llmspec.compiler.graph import Instance, Unit, without_gradient
from llmspec.compiler.lower import Lowered
from llmspec.compiler.ops.collective import Move, sends
from llmspec.compiler.ops.registry import Sends, shapes_of
from llmspec.compiler.passes.recompute import by_instance, in_words
from llmspec.compiler.placement import Collective
from llmspec.compiler.plan import EVERYTHING, Plan
from llmspec.compiler.precision import BYTES, TORCH, WORDS, Precision

LETTERS = {
    "B": "sequences",
    "T": "tokens",
    "S": "tokens attended to",
    "D": "width",
    "H": "heads",
    "K": "key/value heads",
    "E": "head size",
    "F": "hidden width",
    "I": "heads x head size",
    "M": "head size of values",
    "N": "head size without positions",
    "O": "head size with positions",
    "Q": "rank of queries",
    "L": "rank of keys and values",
    "J": "key/value heads x head size",
    "V": "vocabulary",
    "C": "positions",
    "W": "tokens of all context ranks",
    "R": "rows: each expert's tokens",
    "X": "experts",
    "P": "experts of a token",
}

OVER = {"x": "expert"}
"""The axis over which a letter in lower case is split, when it is not the tensor axis."""

VERBS = {
    Collective.ALL_REDUCE: "sum",
    Collective.ALL_GATHER: "gather",
    Collective.REDUCE_SCATTER: "sum and scatter",
    Collective.ALL_TO_ALL: "exchange",
    Collective.SEND: "pass on",
    Collective.SLICE: "keep this rank's slice",
}


Times = Callable[[Move | Sends], float | None]
Freed = Callable[[str, Operators], str]
"""What computing operators of a unit again saves and costs, in words."""


@dataclass
class Header:
    """What the top of a file says of the plan."""

    plan: Plan
    spec: str

    def lines(self) -> list[str]:
        p, m = self.plan, self.plan.mesh
        axes = {
            "pipeline": m.pipeline,
            "replicas": m.replicas,
            "shards": m.shards,
            "context": m.context,
            "tensor": m.tensor,
        }
        named = [f"{name} {size}" for name, size in axes.items() if size > 1]
        mesh = " x ".join(named) + f" = {m.world_size} processes" if named else "one process"
        if m.expert > 1:
            mesh += f", experts over {m.expert} data ranks"
        return [
            f"Emitted by llmspec from {self.spec}. Spec {p.spec_hash}, plan {p.plan_hash}.",
            f"Change the spec or the plan, then: llmspec compile {self.spec}",
            "",
            f"Mesh: {mesh}. ZeRO {p.zero}." + self.host(),
        ]

    def host(self) -> str:
        names = [_HOST_WORDS[word] for word in self.plan.offload]
        return f" In host memory: {' and '.join(names)}." if names else ""


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockRun:
    """Equal blocks one after the other. start: the first one's place among all blocks."""

    unit: str
    container: str
    start: int
    count: int


class ModelPrinter:
    def __init__(
        self,
        lowered: Lowered,
        *,
        precision: Precision,
        seed: int,
        spec: str,
        times: Times | None = None,
        freed: Freed | None = None,
    ):
        plan = lowered.plan
        self.lowered, self.plan, self.seed, self.spec = lowered, plan, seed, spec
        self.precision = precision
        self.chain = lowered.whole.instances
        self.times = times or (lambda move: None)
        self.style = Style(
            source=spec,
            cast=precision.mixed and plan.zero == 0,
            # ZeRO leaves experts that one rank alone has as they are stored
            cast_experts=precision.mixed and (plan.zero == 0 or plan.mesh.expert_data == 1),
            stored=precision.stored,
            recompute=self._choices(freed),
            comment=self.comment,
            sent=self.sent,
            placements={n: p.parameters for n, p in lowered.placements.items()},
        )
        self.staged = len(plan.stages) > 1
        self.keeps_on_host = "activations" in plan.offload and bool(lowered.blocks())

    def _choices(self, freed: Freed | None) -> dict[str, Choices]:
        """By unit, what each of its uses computes again."""
        chosen = by_instance(self.chain, self.plan.recompute)
        by_unit: dict[str, list[Operators]] = {}
        for instance, operators in zip(self.chain, chosen, strict=True):
            if instance.prefix:
                by_unit.setdefault(instance.unit, []).append(operators)
        some = [n for n, own in by_unit.items() if any(own) and set(own) != {EVERYTHING}]

        def words(name: str) -> Callable[[Operators], str]:
            def of(operators: Operators) -> str:
                said = ", ".join(in_words(self.lowered.units[name], operators))
                return said if freed is None else f"{said}: {freed(name, operators)}"

            return of

        return {
            name: Choices(tuple(own), constant(name, some), words(name))
            for name, own in by_unit.items()
        }

    # -- comments

    def _elements(self, move: Move) -> int:
        count = 1
        for size in move.whole_shape:
            count *= size
        return count

    def comment(self, move: Move, node: fx.Node) -> tuple[str, ...]:
        if not sends(node) or without_gradient(node):
            return ()
        size = in_bytes(self._elements(move) * BYTES[self.precision.compute])
        forward, backward = move.conversion.forward, move.conversion.backward
        quiet = Collective.NONE
        time_s = self.times(move)
        cost = size if time_s is None else f"{size}, {time_s * 1e3:.3g} ms predicted"
        if forward is quiet:
            text = f"backward: {VERBS[backward]} over tensor, {cost}"
        else:
            text = f"{VERBS[forward]} over tensor: {cost}"
            if forward is Collective.SLICE:
                text = f"this rank's slice; backward: {VERBS[backward]} over tensor, {cost}"
            elif backward is not quiet:
                text += f"; backward: {VERBS[backward]}"
        return (text,)

    def sent(self, node: fx.Node) -> tuple[str, ...]:
        """Of an operator that sends by itself."""
        lines = []
        for one in sent_by(node, shapes_of(node)):
            ranks = getattr(self.plan.mesh, one.axis)
            elements = one.elements_forward or one.elements_backward
            if one.kind is Collective.ALL_TO_ALL:
                elements //= ranks
            width = sent_width(one, BYTES[self.precision.compute])
            messages = one.count if one.kind is Collective.SEND and one.count > 1 else 0
            size = in_bytes((1 if messages else one.count) * elements * width)
            size = f"{messages} x {size}" if messages else size
            time_s = self.times(one)
            cost = size if time_s is None else f"{size}, {time_s * 1e3:.3g} ms predicted"
            what = f"{VERBS[one.kind]} over {one.axis}" + (" meanwhile" if one.hidden else "")
            text = f"{what}: {cost}"
            if not one.elements_forward:
                text = f"backward: {what}, {cost}"
            elif one.elements_backward:
                text += f"; backward: {VERBS[one.kind]}"
            lines.append(text)
        return tuple(lines)

    # -- the file

    def _shared(self, letter: str, size: int) -> str:
        """Of how many tokens these are a context rank's."""
        ranks = self.plan.mesh.context
        return f" ({ranks * size:,} over context)" if ranks > 1 and letter in "TS" else ""

    def _legend(self) -> list[str]:
        """One entry a letter: what it counts, whole and on one rank."""
        whole: dict[str, int] = {}
        local: dict[str, int] = {}
        for name, unit in self.lowered.units.items():
            for node in self.lowered.whole.units[name].graph.nodes:
                for letter, size in zip(
                    node.meta.get("dims", ""), node.meta.get("shape", ()), strict=False
                ):
                    whole.setdefault(letter, size)
            for node in unit.graph.nodes:
                for letter, size in zip(
                    node.meta.get("dims", ""), node.meta.get("shape", ()), strict=False
                ):
                    if letter.islower():
                        local.setdefault(letter, size)
        parts = [
            f"{letter} {size:,} {LETTERS[letter]}{self._shared(letter, size)}".replace(",", "_")
            for letter, size in whole.items()
            if letter in LETTERS
        ]
        parts += [
            f"{letter} {size:,} ({letter.upper()} over {OVER.get(letter, 'tensor')})".replace(
                ",", "_"
            )
            for letter, size in local.items()
        ]
        lines, line = [], "Shapes of one micro-batch on one process:"
        for part in parts:
            if len(line) + len(part) > 92:
                lines.append(line)
                line = "   "
            line += f" {part};"
        return [*lines, line.rstrip(";")]

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
        self._print_model(body, makers)
        head = Text()
        self._print_head(head)
        return formatted(head.render() + body.render(), "model.py")

    def _plain(self, name: str) -> bool:
        return all(i.prefix == "" for i in self.chain if i.unit == name)

    def _print_head(self, text: Text) -> None:
        choices = [c for c in self.style.recompute.values() if c.mixed]
        if any(isinstance(o, str) for c in choices for o in c.of_each):
            self.style.imports.add(("runtime.recompute", "EVERYTHING"))
        text.line('"""' + Header(self.plan, self.spec).lines()[0])
        for line in [*Header(self.plan, self.spec).lines()[1:], *self._legend()]:
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
            text.line(f"from {module} import {', '.join(sorted(names))}")
        text.blank()
        if self.style.cast or (self.style.cast_experts and self.plan.mesh.expert > 1):
            compute, stored = TORCH[self.precision.compute], WORDS[self.precision.stored]
            text.line(f"COMPUTE = {compute}  # weights are stored in {stored}")
        if self.precision.stored != "fp32":
            text.line(f"STORED = {TORCH[self.precision.stored]}  # weights and their gradients")
        if self.lowered.whole.dropout:
            text.line(f"SEED = {self.seed}")
        if self.staged:
            cuts = tuple(
                (max(a - 1, 0), min(b - 1, len(self.chain) - 2)) for a, b in self.plan.stages
            )
            text.line(f"STAGES = {cuts!r}  # blocks of each pipeline stage: first, stop")
        self._print_choices(text)
        text.blank(2)

    def _print_choices(self, text: Text) -> None:
        """What blocks compute again, where it is not simply all."""
        for unit, choices in self.style.recompute.items():
            if not choices.mixed:
                continue
            which = "each" if choices.differ else "a"
            choices.print(text, f"{which} block `{quoted(unit)}`")

    # -- the model

    def _print_model(self, text: Text, makers: dict[str, str]) -> None:
        what = f"`{quoted(self.lowered.whole.name)}`, {plural(len(self.chain) - 2, 'block')}"
        with text.block("class Model(nn.Module):"):
            if self.staged:
                text.line(f'"""One pipeline stage of {what}. Stage 0 takes tokens,')
                text.line("the others what the stage before sent; the last returns the loss.")
                text.line('"""')
            else:
                text.line(f'"""{what}: from tokens to the summed loss of their targets."""')
            text.blank()
            self._print_init(text, makers)
            text.blank()
            self._print_forward(text)
            if self.plan.zero:
                text.blank()
                self._print_units(text)

    def _print_units(self, text: Text) -> None:
        """What FSDP2 gathers as one. A tied table that first and last share stays with the root."""
        blocks = self.lowered.blocks()
        runs = [f"*self.{run.container}.values()" for run in self._runs()]
        every = ", ".join(runs) if runs else "*self.chain" if blocks else ""
        ends = [self.chain[0].unit, self.chain[-1].unit]
        shared = set(leaf_groups(self.lowered.units[ends[0]])) & set(
            leaf_groups(self.lowered.units[ends[1]])
        )
        with text.block("def units(self) -> list[nn.Module]:"):
            text.line('"""What is gathered together, in the order of the forward."""')
            if not self.staged:
                first, last = (
                    ("", "") if shared or len(self.chain) == 1 else (f"self.{e}" for e in ends)
                )
                text.line(f"return [{', '.join(part for part in (first, every, last) if part)}]")
                return
            text.line(f"units: list[nn.Module] = [{every}]")
            with text.block("if self.is_first:"):
                text.line(f"units.insert(0, self.{ends[0]})")
            with text.block("if self.is_last:"):
                text.line(f"units.append(self.{ends[1]})")
            text.line("return units")

    def _on(self, text: Text, condition: str, lines: list[str]) -> None:
        if not lines:
            return
        if not self.staged:
            for line in lines:
                text.line(line)
            return
        with text.block(f"if {condition}:"):
            for line in lines:
                text.line(line)

    def _print_init(self, text: Text, makers: dict[str, str]) -> None:
        first, last = self.chain[0], self.chain[-1]
        stage = ", stage: int" if self.staged else ""
        with text.block(f"def __init__(self, mesh: Mesh{stage}):"):
            text.line("super().__init__()")
            if self.staged:
                text.line("first, stop = STAGES[stage]")
                text.line("self.is_first, self.is_last = stage == 0, stage == len(STAGES) - 1")
            if self.keeps_on_host:
                self.style.imports.add(("runtime.host_activations", "HostActivations"))
                text.line("self.host = HostActivations(mesh)")
            for container in self._containers():
                text.line(f"{container} = Group()")
                self.style.imports.add(("runtime.parameters", "Group"))
            self._on(text, "self.is_first", self._unit_lines(first, 0, makers))
            self._print_blocks(text, makers)
            self._on(text, "self.is_last", self._unit_lines(last, len(self.chain) - 1, makers))

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

    def _unit_lines(self, instance: Instance, index: int, makers: dict[str, str]) -> list[str]:
        """The statements that make a plain unit: its groups, then the module that uses them."""
        unit = self.lowered.units[instance.unit]
        lines = []
        for path in leaf_groups(unit):
            if self._made_by_first(path, instance):
                continue
            lines.append(f"self.{path} = {self._group(unit, path)}")
        maker = makers[unit.name].replace("{first_dropout}", str(first_dropout(index)))
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

    def _print_blocks(self, text: Text, makers: dict[str, str]) -> None:
        blocks = self.lowered.blocks()
        if not blocks:
            return
        for run in self._runs():
            index = f"i + {run.start}" if run.start else "i"
            before = sum(b.unit == run.unit for b in blocks[: run.start])
            use = f"i + {before}" if before else "i"
            maker = self._block_maker(self.lowered.units[run.unit], index, use)
            bounds = self._bounds(run)
            text.line(
                f"self.{run.container} = nn.ModuleDict("
                f"{{str(i): {maker} for i in range({bounds})}})"
            )
        if self._runs():
            return
        for path in dict.fromkeys(b.prefix.rpartition(".")[0] for b in blocks):
            if path:
                text.line(f"self.{path} = nn.ModuleDict()")
        text.line("self.chain = nn.ModuleList()")
        for number, block in enumerate(blocks):
            self._print_single(text, block, number, makers)

    def _bounds(self, run: BlockRun) -> str:
        """Of the numbers of a run's blocks that this process has."""
        if not self.staged:
            return str(run.count)
        first = f"max(first - {run.start}, 0)" if run.start else "first"
        stop = f"stop - {run.start}" if run.start else "stop"
        is_last = run.start + run.count == len(self.lowered.blocks())
        return f"{first}, {stop}" if is_last else f"{first}, min({stop}, {run.count})"

    def _print_single(
        self, text: Text, block: Instance, number: int, makers: dict[str, str]
    ) -> None:
        """A block of a chain that is not uniform."""
        unit = self.lowered.units[block.unit]
        if block.prefix:
            path, _, key = block.prefix.rpartition(".")
            target = f'self.{path}["{key}"]' if path else f"self.{key}"
            use = sum(b.unit == block.unit for b in self.lowered.blocks()[:number])
            lines = [f"{target} = {self._block_maker(unit, str(number), str(use))}"]
        else:
            lines = self._unit_lines(block, number + 1, makers)
            target = f"self.{unit.name}"
        lines.append(f"self.chain.append({target})")
        self._on(text, f"first <= {number} < stop", lines)

    def _print_forward(self, text: Text) -> None:
        start = "x" if self.staged else "tokens_BT"
        arguments = f"{start}: Tensor, targets_BT: Tensor, samples_B: Tensor"
        with text.block(f"def forward(self, {arguments}) -> Tensor:"):
            self._on(text, "self.is_first", [f"x = {self._call('first', start)}"])
            self._print_loop(text)
            tail = f"return {self._call('last', 'x')}"
            self._on(text, "self.is_last", [tail])
            if self.staged:
                text.line("return x")

    def _extra(self, name: str) -> str:
        """The further inputs of a unit."""
        names = {"targets": "targets_BT", "samples": "samples_B"}
        inputs = self.lowered.units[name].inputs
        flow = "targets" if name == "last" and inputs[0] == "targets" else inputs[0]
        return "".join(f", {names[i]}" for i in inputs if i in names and i != flow)

    def _call(self, which: str, value: str) -> str:
        instance = self.chain[0] if which == "first" else self.chain[-1]
        return f"self.{instance.unit}({value}{self._extra(instance.unit)})"

    def _print_loop(self, text: Text) -> None:
        blocks = self.lowered.blocks()
        if not blocks:
            return
        for run in self._runs():
            with text.block(f"for block in self.{run.container}.values():"):
                self._print_use(text, self._extra(run.unit))
        if self._runs():
            return
        extras = {self._extra(b.unit) for b in blocks}
        if len(extras) == 1:
            with text.block("for block in self.chain:"):
                self._print_use(text, extras.pop())
            return
        by_class = {class_name(b.unit): self._extra(b.unit) for b in blocks}
        with text.block("for block in self.chain:"):
            for kind, extra in by_class.items():
                with text.block(f"if isinstance(block, {kind}):"):
                    self._print_use(text, extra)

    def _print_use(self, text: Text, extra: str) -> None:
        """One block's call."""
        if not self.keeps_on_host:
            text.line(f"x = block(x{extra})")
            return
        for comment in away_comments(self.plan):
            text.line(f"# {comment}")
        with text.block("with self.host.keep(block, x):"):
            text.line(f"x = block(x{extra})")


def away_comments(plan: Plan) -> list[str]:
    """What leaves with activations, and what the link then costs in the open."""
    lines = ["what the backward needs of a block waits in host memory; the device has two blocks'"]
    if known := plan.predicted.get("predicted"):
        size = in_bytes(known["host_memory_bytes"]["activations"])
        lines.append(f"{size} a process predicted, {link_words(plan)}")
    return lines


def link_words(plan: Plan) -> str:
    """Of all that crosses the link to the host in a step."""
    spent = plan.predicted["predicted"]["time_s"]["offload"]
    if spent < 1e-6:
        return "its copies hidden behind computing"
    return f"{spent * 1e3:.3g} ms of a step's copies not hidden"


_HOST_WORDS = {
    "activations": "activations",
    "optimizer": "the optimizer",
    "parameters": "parameters and the optimizer",
}


def print_model(
    lowered: Lowered,
    *,
    precision: Precision,
    seed: int,
    spec: str,
    times: Times | None = None,
    freed: Freed | None = None,
) -> str:
    """model.py of the lowered program. times(move) -> seconds of its forward, or None."""
    return ModelPrinter(
        lowered, precision=precision, seed=seed, spec=quoted(spec), times=times, freed=freed
    ).print()
