"""The road from a spec to a directory, one function a step.

load      spec text            -> Program       (dsl)
model     Program              -> ModelGraph    (build, or raise)
plan      Program, ModelGraph  -> Plan          (search)
lower     ModelGraph, Plan     -> Lowered       (PASSES)
emit      Lowered              -> files
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from torch import nn

from llmspec.compiler.build.model import build_model
from llmspec.compiler.cost.hardware import machine_of
from llmspec.compiler.cost.network import axis_group, collective_s, inner_groups
from llmspec.compiler.cost.recompute import Operators, flow_of
from llmspec.compiler.cost.types import types_of
from llmspec.compiler.cost.unit import sent_width
from llmspec.compiler.emit.package import emit, write
from llmspec.compiler.errors import Refused, Unsupported
from llmspec.compiler.graph import ModelGraph
from llmspec.compiler.kernels.measured import Measured
from llmspec.compiler.lower import Lowered, lower
from llmspec.compiler.ops.collective import Move
from llmspec.compiler.ops.registry import Sends
from llmspec.compiler.plan import Plan, from_json
from llmspec.compiler.search.search import Found, Infeasible, search
from llmspec.compiler.search.tradeoffs import Front, WhyNot, pareto, why_not
from llmspec.dsl import Diagnostic, load, program_under
from llmspec.dsl.left_open import settled
from llmspec.dsl.program import HuggingFaceModel, Model, Program, PythonModel


@dataclass
class Session:
    """One spec on its way. `trust`: whether the user lets the file of a `python(…)` model run."""

    program: Program
    trust: bool = False
    graphs: dict[int, ModelGraph] = field(default_factory=dict)
    module: nn.Module | None = None

    def graph(self, sequences: int) -> ModelGraph:
        """The model's graph for micro-batches of `sequences`.

        Errors: Refused when the model cannot be built, with a diagnostic of the user's file.
        """
        if sequences not in self.graphs:
            self.graphs[sequences] = self._build(sequences)
        return self.graphs[sequences]

    def settle(self, plan: Plan) -> None:
        """From here on the program is the plan's: what the spec left open is decided.

        Errors: Refused when the spec does not offer what the plan has chosen.
        """
        program = settled(self.program, plan.choices)
        if program is None:
            words = ", ".join(f"{key} = {value}" for key, value in plan.choices.items())
            raise Refused(
                Diagnostic(
                    code="E0801",
                    message="the plan chooses what its spec does not leave open, or not so",
                    span=self.program.train.span,
                    label=f"the plan's choices: {words or 'none'}",
                )
            )
        self.program = program

    def _build(self, sequences: int) -> ModelGraph:
        model, tokens = self.program.model, self.program.train.sequence_length
        try:
            match model:
                case Model():
                    return build_model(model, sequences=sequences, tokens=tokens)
                case PythonModel():
                    return self._raise(model, sequences, tokens)
                case HuggingFaceModel():
                    raise Unsupported("a model from a Hugging Face configuration", model.span)
        except Unsupported as error:
            raise refused(error) from None

    def _raise(self, model: PythonModel, sequences: int, tokens: int) -> ModelGraph:
        # torch.export takes a second to import, and only these models need it
        from llmspec.compiler.raising import load_module, raise_model

        if not self.trust:
            raise Refused(
                Diagnostic(
                    code="E0602",
                    message=f"model `{model.name}` is Python code, and runs only if you trust it",
                    span=model.span,
                    label=f"would run {model.path}",
                    helps=("add `--trust` to the command",),
                )
            )
        try:
            if self.module is None:
                self.module = load_module(model, self.program.folder)
            return raise_model(self.module, model.name, sequences=sequences, tokens=tokens)
        except Unsupported as error:
            place = error.span or model.span
            raise Refused(Diagnostic(code="E0603", message=error.what, span=place)) from None


def refused(error: Unsupported) -> Refused:
    return Refused(
        Diagnostic(code="E0601", message=f"{error.what} has no meaning yet", span=error.span)
    )


def open_session(path: str, *, train: str | None = None, trust: bool = False) -> Session:
    """Errors: SpecError with every fault of the file."""
    return Session(load(path, train=train), trust)


def find_plan(session: Session) -> Found | Infeasible:
    """Search; the session's program is the plan's from then on. Errors: Refused for a fault that
    only the search can see."""
    try:
        found = search(session.program, session.graph)
    except Unsupported as error:
        raise refused(error) from None
    if isinstance(found, Found):
        session.settle(found.plan)
    return found


def find_front(session: Session) -> Front | Infeasible:
    """Memory against time. Errors: as of `find_plan`."""
    try:
        return pareto(session.program, session.graph)
    except Unsupported as error:
        raise refused(error) from None


def ask_why_not(session: Session, text: str) -> WhyNot | Infeasible:
    """`text`: lines of a plan block, or of what a train block may leave open, with commas or `;`
    between them. Errors: as of `find_plan`."""
    asked = program_under(text, session.program)
    try:
        return why_not(session.program, session.graph, asked)
    except Unsupported as error:
        raise refused(error) from None


def is_plan_file(path: str) -> bool:
    return path.endswith(".json")


def open_plan(path: str, *, trust: bool = False) -> tuple[Session, Plan]:
    """A saved plan and the spec that it belongs to, which lies where the plan says.

    Errors: Refused when it is not a plan, or stale: the spec has changed since.
    """
    try:
        plan = from_json(Path(path).read_text())
    except (OSError, ValueError) as error:
        raise Refused(
            Diagnostic(code="E0801", message=f"`{path}` cannot be read as a plan: {error}")
        ) from None
    spec = find_spec(path, plan.spec)
    session = open_session(spec, train=plan.train, trust=trust)
    if session.program.source_hash != plan.spec_hash:
        raise Refused(
            Diagnostic(
                code="E0802",
                message=f"plan `{path}` is stale: `{spec}` has changed since it was made",
                notes=(f"plan made for {plan.spec_hash}, now {session.program.source_hash}",),
                helps=(f"plan again: llmspec plan {spec} --save {path}",),
            )
        )
    session.settle(plan)
    return session, plan


def find_spec(plan_path: str, spec: str) -> str:
    """The spec beside the plan file, or up to three folders above (a program's plan.json)."""
    folder = Path(plan_path).resolve().parent
    for place in (folder, *list(folder.parents)[:3]):
        if (place / spec).is_file():
            return os.path.relpath(place / spec)
    raise Refused(
        Diagnostic(
            code="E0803",
            message=f"the spec `{spec}` of plan `{plan_path}` is not beside it",
            helps=("put the plan file in the spec's folder",),
        )
    )


def lower_plan(session: Session, plan: Plan) -> Lowered:
    return lower(session.graph(plan.microbatch), plan, measured_kernels(session.program))


def measured_kernels(program: Program) -> Measured:
    return machine_of(program.cluster, types_of(program.train)).kernels


def emit_plan(session: Session, plan: Plan) -> dict[str, str]:
    """Every file of the emitted directory: relative path -> text."""
    model, types = plan.predicted.get("model", {}), types_of(session.program.train)
    lowered = lower_plan(session, plan)
    return emit(
        session.program,
        lowered,
        flops_per_token=float(model.get("flops_per_token", 0.0)),
        times=move_times(session.program, plan),
        freed=recompute_words(session.program, lowered),
        bytes_per_s=machine_of(session.program.cluster, types).memory_bytes_per_s,
    )


def move_times(program: Program, plan: Plan) -> Callable[[Move | Sends], float | None]:
    """Predicted seconds of a collective's forward (or of its backward, when only that sends)."""
    types = types_of(program.train)
    machine = machine_of(program.cluster, types)
    where = axis_group("tensor", plan.mesh, machine)
    inner = inner_groups(plan.mesh.tensor, plan.mesh.context, plan.mesh.expert, machine)

    def time_s(move: Move | Sends) -> float | None:
        if isinstance(move, Sends):
            elements = move.elements_forward or move.elements_backward
            sent = sent_width(move, types.compute) * elements
            return move.count * collective_s(move.kind, sent, inner[move.axis])
        size = float(types.compute)
        for dim in move.whole_shape:
            size *= dim
        step = move.conversion
        forward = collective_s(step.forward, size, where)
        return forward or collective_s(step.backward, size, where)

    return time_s


def recompute_words(program: Program, lowered: Lowered) -> Callable[[str, Operators], str]:
    """What a choice saves and costs one use of a unit."""
    plan, types = lowered.plan, types_of(program.train)
    machine = machine_of(program.cluster, types)
    where = axis_group("tensor", plan.mesh, machine)
    inner = inner_groups(plan.mesh.tensor, plan.mesh.context, plan.mesh.expert, machine)

    def words(name: str, operators: Operators) -> str:
        flow = flow_of(lowered.units[name], where, machine, types.compute, inner)
        bare, again = flow.again(()), flow.again(operators)
        freed = (bare.kept_bytes - again.kept_bytes) / 2**20
        return f"{freed:,.1f} MiB less, {again.whole_s * 1e3:.3g} ms more predicted"

    return words


def default_folder(program: Program) -> Path:
    return Path(program.folder) / "build" / program.train.name


def compile_plan(session: Session, plan: Plan, folder: Path) -> dict[str, str]:
    """Emit and write the directory; its files."""
    files = emit_plan(session, plan)
    write(files, folder)
    return files
