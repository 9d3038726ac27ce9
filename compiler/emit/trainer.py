"""The class `Trainer` of train.py: the model on a process, and one step of it."""

from __future__ import annotations

from llmspec.compiler.emit.actions import actions_reader
from llmspec.compiler.emit.train_file import TrainFile
from llmspec.compiler.ops.registry import shape_of
from llmspec.compiler.orders import Schedule
from llmspec.compiler.precision import LossScale


def print_trainer(file: TrainFile) -> None:
    t = file.text
    with t.block("class Trainer:"):
        t.line('"""The model on this process, and what one optimizer step computes."""')
        t.blank()
        with t.block("def __init__(self, mesh: Mesh):"):
            t.line("self.mesh = mesh")
            if scale := file.precision.loss_scale:
                print_loss_scale(file, scale)
            if file.staged:
                print_staged_init(file)
            else:
                print_single_init(file)
        t.blank()
        if file.staged:
            print_staged_step(file)
        else:
            print_single_step(file)


def print_loss_scale(file: TrainFile, scale: LossScale) -> None:
    """What keeps float16 gradients in range."""
    file.imports.add("from runtime.loss_scale import LossScale")
    how = f"grow_every={scale.grow_every}" if scale.dynamic else "dynamic=False"
    file.text.line(f"self.scale = LossScale({scale.start!r}, {how})")


def wrapper(file: TrainFile, model: str) -> str:
    """How gradients of `model` are summed over data ranks."""
    plan = file.plan
    if plan.zero == 0:
        file.imports.add("from runtime.replicated_data_parallel import ReplicatedGradients")
        types = ", reduce=REDUCE" if file.precision.reduced != file.precision.stored else ""
        return f"ReplicatedGradients({model}, mesh{types})"
    file.imports.add("from runtime.sharded_data_parallel import ShardedGradients")
    types = ", compute=COMPUTE, reduce=REDUCE" if file.typed else ""
    how = f"zero={plan.zero}{types}{file.home()}"
    return f"ShardedGradients({model}, mesh, units={model}.units(), {how})"


def print_data_moves(file: TrainFile) -> None:
    """Comments: what travels over the data ranks and stands in no other line."""
    plan = file.plan
    sizes = {"data": plan.mesh.data, "context": plan.mesh.context}
    ranks = " and ".join(name for name, size in sizes.items() if size > 1) or "data"
    if plan.zero == 0 and plan.mesh.data * plan.mesh.context > 1:
        file.text.line(f"# sums gradients over the {ranks} ranks in buckets, beside the backward")
    if plan.zero > 0:
        gathered = "once a step" if plan.zero < 3 else "for its forward and for its backward"
        summed = "once a step" if plan.zero == 1 else "after every backward"
        file.text.line(
            f"# FSDP2 gathers each unit's parameters {gathered}, and sums its gradients over the "
            f"{ranks} ranks {summed}; each rank keeps a part"
        )
    if plan.mesh.expert > 1:
        same = plan.mesh.expert_data
        rest = f"over the {same} ranks that have the same ones" if same > 1 else "nowhere else"
        file.text.line(f"# gradients of experts: {rest}")
    if file.stored_on_host:
        file.text.line("# the parts are in host memory, and with them the optimizer's state")


def print_single_init(file: TrainFile) -> None:
    t = file.text
    t.line("self.model = Model(mesh)")
    print_data_moves(file)
    t.line(f"self.gradients = {wrapper(file, 'self.model')}")
    t.line(f"initialise(self.model, mesh, seed=SEED{file.home()})")
    t.line("self.models = [self.model]")


def print_inner_scale(file: TrainFile) -> None:
    """Losses inside the model are divided, and scaled, as the token loss is."""
    if file.inner_losses:
        file.imports.add("from runtime import auxiliary")
        scale = ", self.scale.value" if file.precision.loss_scale else ""
        file.text.line(f"auxiliary.begin(batch.target_tokens{scale})")


def step_docstring(file: TrainFile) -> str:
    scaled = " times the loss scale" if file.precision.loss_scale else ""
    what = f"Gradients of one batch{scaled}, summed over all processes"
    return f'"""{what}; this process\'s loss."""'


def print_single_step(file: TrainFile) -> None:
    t = file.text
    with t.block("def step(self, batch: Batch) -> Tensor:"):
        t.line(step_docstring(file))
        print_inner_scale(file)
        t.line("loss = torch.zeros((), device=self.mesh.device)")
        count = "batch.count(MICROBATCH)" if file.ramp else "MICROBATCHES"
        with t.block(f"for micro in batch.microbatches({count}):"):
            t.line("self.gradients.before_microbatch(micro)")
            t.line("part = self.model(micro.tokens_BT, micro.targets_BT, micro.samples_B)")
            t.line("part = part / batch.target_tokens")
            scaled = "(part * self.scale.value)" if file.precision.loss_scale else "part"
            t.line(f"{scaled}.backward()")
            t.line("loss = loss + part.detach()")
        t.line("self.gradients.finish()")
        t.line("return loss")
    t.blank()
    if file.train.validate:
        print_single_evaluate(file)
        t.blank()
    with t.block("def clip(self, max_norm: float | None) -> Tensor:"):
        t.line('"""The norm of all gradients before clipping."""')
        t.line(f"return clip_(self.model.parameters(), self.mesh, max_norm{file.unscaled()})")


def print_single_evaluate(file: TrainFile) -> None:
    t = file.text
    with t.block("def evaluate(self, batch: Batch) -> Tensor:"):
        t.line('"""This process\'s part of the batch\'s mean loss, no gradients."""')
        t.line("loss = torch.zeros((), device=self.mesh.device)")
        with (
            t.block("with self.gradients.evaluation():"),
            t.block("for micro in batch.microbatches(MICROBATCHES):"),
        ):
            t.line("part = self.model(micro.tokens_BT, micro.targets_BT, micro.samples_B)")
            t.line("loss = loss + part / batch.target_tokens")
        t.line("return loss")


def print_staged_init(file: TrainFile) -> None:
    t = file.text
    file.imports.add("from runtime.pipeline import Executor")
    if name := actions_reader(file):
        file.imports.add(f"from runtime.pipeline import {name}")
    schedule, stages = Schedule(file.plan.schedule), len(file.plan.stages)
    if file.plan.interleave == 1:
        t.line("stages = [mesh.pipeline.rank]")
    elif schedule.turns:
        t.line("# the chain goes down the ranks and back up")
        t.line(f"stages = [mesh.pipeline.rank, {stages - 1} - mesh.pipeline.rank]")
    else:
        t.line(f"stages = range(mesh.pipeline.rank, {stages}, mesh.pipeline.size)")
    t.line("models = {stage: Model(mesh, stage) for stage in stages}")
    print_data_moves(file)
    t.line(f"gradients = {{stage: {wrapper(file, 'm')} for stage, m in models.items()}}")
    with t.block("for model in models.values():"):
        t.line(f"initialise(model, mesh, seed=SEED{file.home()})")
    t.line("self.models = list(models.values())")
    if tied := tied_weights(file):
        file.imports.add("from runtime.pipeline import TiedWeights")
    more = f", tied={tied}" if tied else ""
    more += ", loss_scale=self.scale" if file.precision.loss_scale else ""
    actions, count = ("actions", "count") if file.ramp else ("ACTIONS", "MICROBATCHES")
    made = (
        f"Executor(stages=models, gradients=gradients, actions={actions}, "
        f"mesh=mesh, microbatches={count}, boundary=({boundary(file)}, COMPUTE){more})"
    )
    if file.ramp:
        loop = "for count, actions in ACTIONS.items()"
        t.line(f"self.executors = {{count: {made} {loop}}}")
        made = "self.executors[MICROBATCHES]"
    t.line(f"self.executor = {made}")


def tied_weights(file: TrainFile) -> str:
    """Weights of several stages: (name, owning stage, copy's stage)."""
    plan, instances = file.plan, file.lowered.whole.instances
    owner: dict[str, int] = {}
    found: list[str] = []
    for index, instance in enumerate(instances):
        stage = next(s for s, (a, b) in enumerate(plan.stages) if a <= index < b)
        for weight in file.lowered.whole.units[instance.unit].parameters.values():
            name = weight.tied or instance.full_name(weight.path)
            if owner.setdefault(name, stage) != stage:
                found.append(f'TiedWeights("{name}", owner={owner[name]}, copy={stage})')
    return f"[{', '.join(found)}]" if found else ""


def boundary(file: TrainFile) -> str:
    """Shape of what stages send each other."""
    first = file.lowered.units[file.lowered.whole.instances[0].unit]
    return repr(shape_of(first.result()))


def print_staged_step(file: TrainFile) -> None:
    t = file.text
    with t.block("def step(self, batch: Batch) -> Tensor:"):
        t.line(step_docstring(file))
        print_inner_scale(file)
        executor = "executors[batch.count(MICROBATCH)]" if file.ramp else "executor"
        t.line(f"return self.{executor}.step(batch)")
    t.blank()
    if file.train.validate:
        with t.block("def evaluate(self, batch: Batch) -> Tensor:"):
            t.line('"""This process\'s part of the batch\'s mean loss, no gradients."""')
            t.line("return self.executor.evaluate(batch)")
        t.blank()
    with t.block("def clip(self, max_norm: float | None) -> Tensor:"):
        t.line('"""The norm of all gradients before clipping."""')
        t.line("own = [p for model in self.models for p in model.parameters()]")
        t.line("copies = self.executor.copies()")
        t.line(f"return clip_(own, self.mesh, max_norm, counted_elsewhere=copies{file.unscaled()})")
