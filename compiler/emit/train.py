"""Print train.py: mesh, model, gradients, optimizer, data and the loop of one plan."""

from __future__ import annotations

from dataclasses import dataclass, field

from llmspec.compiler.emit.model import Header, link_words
from llmspec.compiler.emit.text import Text, formatted, in_bytes, quoted
from llmspec.compiler.errors import InternalError
from llmspec.compiler.lower import Lowered
from llmspec.compiler.ops import routing
from llmspec.compiler.ops.registry import shape_of
from llmspec.compiler.orders import Schedule
from llmspec.compiler.precision import TORCH, WORDS, LossScale, precision_of
from llmspec.dsl.program import Call, Option, Program


def literal(value: Option) -> str:
    """A value of the spec as Python source; only plain data gets through."""
    if isinstance(value, tuple):
        inner = ", ".join(literal(v) for v in value)
        return f"({inner},)" if len(value) == 1 else f"({inner})"
    if value is None or isinstance(value, bool | int | float | str):
        return repr(value)
    raise InternalError(f"{value!r} cannot be written into a program")


MOST_WORDS = 4000
"""Actions that train.py spells out; more of them it reads from plan.json."""


@dataclass
class TrainPrinter:
    program: Program
    lowered: Lowered
    model_flops_per_token: float
    text: Text = field(default_factory=Text)
    imports: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.plan = self.lowered.plan
        self.train = self.program.train
        self.precision = precision_of(self.train)
        self.staged = len(self.plan.stages) > 1
        self.ramp = self.train.ramp_stages
        calls = {n.target for unit in self.lowered.whole.units.values() for n in unit.calls()}
        self.experts = routing.expert_counts in calls
        self.inner_losses = bool(calls & {routing.balance_loss, routing.z_loss})
        # FSDP2 needs to be told of every type that is not the stored one
        shorter = self.precision.mixed or self.precision.reduced != self.precision.stored
        self.typed = shorter and self.plan.zero > 0

    # -- pieces

    def constants(self) -> None:
        t, plan, p = self.train, self.plan, self.precision
        self.text.line(f"STEPS = {t.steps}")
        self.text.line(f"BATCH = {t.batch_sequences}  # sequences per step, over all processes")
        if self.ramp:
            self.text.line("# the batch grows up to that: so many steps of so many sequences first")
            self.text.line(f"RAMP = {self.ramp!r}")
            self.text.line(f"MICROBATCH = {plan.microbatch}  # sequences of one, on one data rank")
        self.text.line(f"MICROBATCHES = {plan.microbatches}  # of {plan.microbatch} sequences each")
        self.text.line(f"SEQUENCE = {t.sequence_length}")
        self.text.line(f"VOCABULARY = {self.lowered.whole.vocab}")
        self.text.line(f"SEED = {t.seed}")
        self.text.line("FOLDER = Path(__file__).parent")
        self.text.line(f"FLOPS_PER_TOKEN = {self.model_flops_per_token:.6g}  # model, not hardware")
        if peak := self.peak():
            self.text.line(
                f"PEAK_FLOPS = {peak:.6g}  # of one device, {self.precision.matrix}, dense"
            )
        if self.staged or self.typed:
            stored = f"  # weights are {WORDS[p.stored]}" if p.mixed else ""
            self.text.line(f"COMPUTE = {TORCH[p.compute]}{stored}")
        if self.typed or p.reduced != p.stored:
            self.text.line(f"REDUCE = {TORCH[p.reduced]}  # gradients are summed in it")
        if self.staged:
            self.actions()

    def actions(self) -> None:
        self.text.blank()
        self.text.line("# what each pipeline rank does in a step: stage, action, micro-batch")
        if Schedule(self.plan.schedule).splits:
            self.text.line("# I: the part of a backward that the stage before waits for; W, when")
            self.text.line("# there is time, the rest of it: the gradients of matrices")
        if name := self.actions_reader():
            total = sum(map(len, self.plan.actions))
            self.text.line(f"# {total:,} of them, in plan.json".replace(",", "_"))
            self.text.line(f'ACTIONS = {name}(FOLDER / "plan.json")')
            return
        if not self.ramp:
            with self.text.block("ACTIONS = {"):
                self.action_lists(self.plan.actions)
            self.text.line("}")
            return
        self.text.line("# by the number of micro-batches, which grows with the batch")
        with self.text.block("ACTIONS = {"):
            whole = {str(self.plan.microbatches): self.plan.actions}
            for count, lists in (self.plan.ramp_actions | whole).items():
                with self.text.block(f"{count}: {{"):
                    self.action_lists(lists)
                self.text.line("},")
        self.text.line("}")

    def actions_reader(self) -> str:
        """What reads lists that are too long to be spelled out; "" for others."""
        if sum(map(len, self.plan.actions)) <= MOST_WORDS:
            return ""
        return "planned_actions_by_count" if self.ramp else "planned_actions"

    def action_lists(self, lists: tuple[tuple[str, ...], ...]) -> None:
        for rank, words in enumerate(lists):
            with self.text.block(f"{rank}: ("):
                line = ""
                for word in words:
                    if len(line) + len(word) > 84:
                        self.text.line(f'"{line.strip()} "')
                        line = ""
                    line += f" {word}"
                self.text.line(f'"{line.strip()}"')
            self.text.line(").split(),")

    def wrapper(self, model: str) -> str:
        """How gradients of `model` are summed over data ranks."""
        plan = self.plan
        if plan.zero == 0:
            self.imports.add("from runtime.replicated_data_parallel import ReplicatedGradients")
            types = ", reduce=REDUCE" if self.precision.reduced != self.precision.stored else ""
            return f"ReplicatedGradients({model}, mesh{types})"
        self.imports.add("from runtime.sharded_data_parallel import ShardedGradients")
        types = ", compute=COMPUTE, reduce=REDUCE" if self.typed else ""
        how = f"zero={plan.zero}{types}{self.home()}"
        return f"ShardedGradients({model}, mesh, units={model}.units(), {how})"

    @property
    def stored_on_host(self) -> bool:
        return "parameters" in self.plan.offload

    def home(self) -> str:
        return ", on_host=True" if self.stored_on_host else ""

    def data_moves(self) -> None:
        """Comments: what travels over the data ranks and stands in no other line."""
        plan = self.plan
        sizes = {"data": plan.mesh.data, "context": plan.mesh.context}
        ranks = " and ".join(name for name, size in sizes.items() if size > 1) or "data"
        if plan.zero == 0 and plan.mesh.data * plan.mesh.context > 1:
            self.text.line(
                f"# sums gradients over the {ranks} ranks in buckets, beside the backward"
            )
        if plan.zero > 0:
            gathered = "once a step" if plan.zero < 3 else "for its forward and for its backward"
            summed = "once a step" if plan.zero == 1 else "after every backward"
            self.text.line(f"# FSDP2 gathers each unit's parameters {gathered},")
            self.text.line(
                f"# and sums its gradients over the {ranks} ranks {summed}, a part on each"
            )
        if plan.mesh.expert > 1:
            same = plan.mesh.expert_data
            rest = f"over the {same} ranks that have the same ones" if same > 1 else "nowhere else"
            self.text.line(f"# those of experts: {rest}")
        if self.stored_on_host:
            self.text.line("# the parts are in host memory, and with them the optimizer's state")

    def boundary(self) -> tuple[str, str]:
        """Shape and type of what stages send each other."""
        first = self.lowered.units[self.lowered.whole.instances[0].unit]
        shape = repr(shape_of(first.result()))
        return shape, "COMPUTE"

    # -- Trainer

    def trainer(self) -> None:
        t = self.text
        with t.block("class Trainer:"):
            t.line('"""The model on this process, and what one optimizer step computes."""')
            t.blank()
            with t.block("def __init__(self, mesh: Mesh):"):
                t.line("self.mesh = mesh")
                if scale := self.precision.loss_scale:
                    self.loss_scale(scale)
                if self.staged:
                    self.staged_init()
                else:
                    self.single_init()
            t.blank()
            if self.staged:
                self.staged_step()
            else:
                self.single_step()

    def loss_scale(self, scale: LossScale) -> None:
        """What keeps float16 gradients in range."""
        self.imports.add("from runtime.loss_scale import LossScale")
        how = f"grow_every={scale.grow_every}" if scale.dynamic else "dynamic=False"
        self.text.line(f"self.scale = LossScale({scale.start!r}, {how})")

    def unscaled(self) -> str:
        """An argument of `clip_`, which divides by the loss scale as it clips."""
        return ", loss_scale=self.scale.value" if self.precision.loss_scale else ""

    def single_init(self) -> None:
        t = self.text
        t.line("self.model = Model(mesh)")
        self.data_moves()
        t.line(f"self.gradients = {self.wrapper('self.model')}")
        t.line(f"initialise(self.model, mesh, seed=SEED{self.home()})")
        t.line("self.models = [self.model]")

    def inner_scale(self) -> None:
        """Losses inside the model are divided, and scaled, as the token loss is."""
        if self.inner_losses:
            self.imports.add("from runtime import auxiliary")
            scale = "self.scale.value" if self.precision.loss_scale else "1"
            self.text.line(f"auxiliary.set_scale({scale} / batch.target_tokens)")

    def step_docstring(self) -> str:
        scaled = " times the loss scale" if self.precision.loss_scale else ""
        what = f"Gradients of one batch{scaled}, summed over all processes"
        return f'"""{what}; this process\'s loss."""'

    def single_step(self) -> None:
        t = self.text
        with t.block("def step(self, batch: Batch) -> Tensor:"):
            t.line(self.step_docstring())
            self.inner_scale()
            t.line("loss = torch.zeros((), device=self.mesh.device)")
            count = "batch.count(MICROBATCH)" if self.ramp else "MICROBATCHES"
            with t.block(f"for micro in batch.microbatches({count}):"):
                t.line("self.gradients.before_microbatch(micro)")
                t.line("part = self.model(micro.tokens_BT, micro.targets_BT, micro.samples_B)")
                t.line("part = part / batch.target_tokens")
                scaled = "(part * self.scale.value)" if self.precision.loss_scale else "part"
                t.line(f"{scaled}.backward()")
                t.line("loss = loss + part.detach()")
            t.line("self.gradients.finish()")
            t.line("return loss")
        t.blank()
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
        t.blank()
        with t.block("def clip(self, max_norm: float | None) -> Tensor:"):
            t.line('"""The norm of all gradients before clipping."""')
            t.line(f"return clip_(self.model.parameters(), self.mesh, max_norm{self.unscaled()})")

    def tied(self) -> str:
        """Weights of several stages: (name, owning stage, copy's stage)."""
        plan, instances = self.plan, self.lowered.whole.instances
        owner: dict[str, int] = {}
        found: list[str] = []
        for index, instance in enumerate(instances):
            stage = next(s for s, (a, b) in enumerate(plan.stages) if a <= index < b)
            for weight in self.lowered.whole.units[instance.unit].parameters.values():
                name = weight.tied or instance.full_name(weight.path)
                if owner.setdefault(name, stage) != stage:
                    found.append(f'TiedWeights("{name}", owner={owner[name]}, copy={stage})')
        return f"[{', '.join(found)}]" if found else ""

    def staged_init(self) -> None:
        t = self.text
        self.imports.add("from runtime.pipeline import Executor")
        if name := self.actions_reader():
            self.imports.add(f"from runtime.pipeline import {name}")
        schedule, stages = Schedule(self.plan.schedule), len(self.plan.stages)
        if self.plan.interleave == 1:
            t.line("stages = [mesh.pipeline.rank]")
        elif schedule.turns:
            t.line("# the chain goes down the ranks and back up")
            t.line(f"stages = [mesh.pipeline.rank, {stages - 1} - mesh.pipeline.rank]")
        else:
            t.line(f"stages = range(mesh.pipeline.rank, {stages}, mesh.pipeline.size)")
        t.line("models = {stage: Model(mesh, stage) for stage in stages}")
        self.data_moves()
        t.line(f"gradients = {{stage: {self.wrapper('m')} for stage, m in models.items()}}")
        with t.block("for model in models.values():"):
            t.line(f"initialise(model, mesh, seed=SEED{self.home()})")
        t.line("self.models = list(models.values())")
        shape, kind = self.boundary()
        tied = self.tied()
        if tied:
            self.imports.add("from runtime.pipeline import TiedWeights")
        more = f", tied={tied}" if tied else ""
        more += ", loss_scale=self.scale" if self.precision.loss_scale else ""
        actions, count = ("actions", "count") if self.ramp else ("ACTIONS", "MICROBATCHES")
        made = (
            f"Executor(stages=models, gradients=gradients, actions={actions}, "
            f"mesh=mesh, microbatches={count}, boundary=({shape}, {kind}){more})"
        )
        if self.ramp:
            loop = "for count, actions in ACTIONS.items()"
            t.line(f"self.executors = {{count: {made} {loop}}}")
            made = "self.executors[MICROBATCHES]"
        t.line(f"self.executor = {made}")

    def staged_step(self) -> None:
        t = self.text
        with t.block("def step(self, batch: Batch) -> Tensor:"):
            t.line(self.step_docstring())
            self.inner_scale()
            executor = "executors[batch.count(MICROBATCH)]" if self.ramp else "executor"
            t.line(f"return self.{executor}.step(batch)")
        t.blank()
        with t.block("def evaluate(self, batch: Batch) -> Tensor:"):
            t.line('"""This process\'s part of the batch\'s mean loss, no gradients."""')
            t.line("return self.executor.evaluate(batch)")
        t.blank()
        with t.block("def clip(self, max_norm: float | None) -> Tensor:"):
            t.line('"""The norm of all gradients before clipping."""')
            t.line("own = [p for model in self.models for p in model.parameters()]")
            t.line("copies = self.executor.copies()")
            t.line(
                f"return clip_(own, self.mesh, max_norm, counted_elsewhere=copies{self.unscaled()})"
            )

    # -- main

    def call_text(self, module: str, call: Call, skip: tuple[str, ...] = (), lead: str = "") -> str:
        parts = [lead] if lead else []
        parts += [
            f"{name}={literal(value)}"  # type: ignore[arg-type]
            for name, value in call.options
            if name not in skip and value is not None
        ]
        return f"{module}.{call.name}({', '.join(parts)})"

    def dataset(self, call: Call) -> str:
        sizes = "sequence_length=SEQUENCE, vocab=VOCABULARY, seed=SEED"
        lead = ""
        if call.arguments:
            one = call.arguments[0] if len(call.arguments) == 1 else call.arguments
            lead = literal(one) + ", "
        return self.call_text("batches", call, lead=lead + sizes)

    def main(self) -> None:
        t, train = self.text, self.train
        m = self.plan.mesh
        sizes = {"pipeline": m.pipeline, "replicas": m.replicas, "shards": m.shards}
        sizes |= {"expert": m.expert, "context": m.context, "tensor": m.tensor}
        axes = ", ".join(f"{k}={v}" for k, v in sizes.items() if v > 1)
        clip = train.optimizer.option("clip")
        t.line("@record  # torchrun shows the first failure of any process")
        with t.block("def main() -> None:"):
            t.line(f"mesh = start({axes})")
            t.line("trainer = Trainer(mesh)")
            if self.precision.tf32:
                t.line('torch.set_float32_matmul_precision("high")  # products in TF32')
            self.print_optimizer()
            phases = [self.call_text("learning_rate", p) for p in train.learning_rate]
            peak = literal(train.optimizer.option("lr"))  # type: ignore[arg-type]
            t.line(f"rate = learning_rate.schedule({', '.join([peak, 'STEPS', *phases])})")
            t.line(f"data = {self.dataset(train.dataset)}")
            if self.ramp:
                t.line("ramp = batches.Ramp(BATCH, RAMP)")
            if train.validate:
                held_out = train.validate.option("dataset")
                t.line(f"held_out = {self.dataset(held_out)}")  # type: ignore[arg-type]
            self.loop(literal(clip))  # type: ignore[arg-type]

    def print_optimizer(self) -> None:
        """The line that makes it, and where its state is."""
        t, made, offload = self.text, self.optimizer(), self.plan.offload
        if "optimizer" in offload:
            t.line("# its state and a copy of the weights are in host memory, updated by the CPU:")
            t.line("# gradients go there and weights come back, bucket by bucket")
            self.imports.add("from runtime.host_optimizer import on_host")
            made = f"on_host({made}, mesh)"
        known = self.plan.predicted.get("predicted")
        if known and ("optimizer" in offload or "parameters" in offload):
            size = in_bytes(known["peak_host_memory_bytes"])
            update = known["time_s"]["optimizer"] * 1e3
            t.line(f"# {size} of host memory a process, {update:.3g} ms an update predicted,")
            t.line(f"# {link_words(self.plan)}")
        t.line(f"optimizer = {made}")

    def optimizer(self) -> str:
        """PyTorch's own class, where weights and moments have one type."""
        precision, call = self.precision, self.train.optimizer
        if not precision.own_update:
            return self.call_text("optimizers", call, ("clip",), "trainer.models")
        self.imports.add("from runtime import short_optimizers")
        text = self.call_text("short_optimizers", call, ("clip",), "trainer.models")
        more = f", moments={TORCH[precision.moments]}"
        if precision.stochastic:
            more += ', rounding="stochastic", seed=SEED'
        return text.removesuffix(")") + more + ")"

    def loop(self, clip: str) -> None:
        t, train = self.text, self.train
        keep = train.checkpoint.option("keep") if train.checkpoint else 1
        t.line(f'checkpoints = Checkpoints(str(FOLDER / "checkpoints"), mesh, keep={keep})')
        t.line("resumed = checkpoints.restore(trainer.models, optimizer)")
        t.line('first = resumed["step"] if resumed else 0')
        if self.precision.loss_scale:
            t.line("trainer.scale.restore(resumed)")
        peak = ", peak_flops=PEAK_FLOPS" if self.peak() else ""
        ramp = "ramp=ramp, " if self.ramp else ""
        t.line(
            'metrics = Metrics(str(FOLDER / "log.jsonl"), mesh, steps=STEPS, first=first, '
            f"every={train.log.steps}, tokens_per_step=BATCH * SEQUENCE, {ramp}"
            f"flops_per_token=FLOPS_PER_TOKEN{peak})"
        )
        with t.block("if first:"):
            t.line('metrics.say(f"resumed after step {first} of {STEPS}")')
        with (
            t.block("with Interrupts() as interrupts:"),
            t.block("for step in range(first, STEPS):"),
        ):
            self.one_step(clip)
        t.line("checkpoints.wait()")
        t.line("metrics.close()")
        t.line("mesh.close()")

    def one_step(self, clip: str) -> None:
        t, train = self.text, self.train
        t.line("optimizers.set_learning_rate(optimizer, rate(step))")
        batch = "data.batch(step, BATCH, mesh)"
        if self.ramp:
            batch = "data.take(ramp.first(step), ramp.rows(step), mesh)"
        t.line(f"loss = trainer.step({batch})")
        t.line(f"norm = trainer.clip({clip})")
        figures = []
        if self.precision.loss_scale:
            t.line("# the norm is over all processes: if it is not finite, all skip this update")
            with t.block("if trainer.scale.accepts(norm):"):
                t.line("optimizer.step()")
            figures.append("trainer.scale.report()")
        else:
            t.line("optimizer.step()")
        if self.experts:
            self.imports.add("from runtime.balance import balance_experts")
            t.line("loads = balance_experts(trainer.models, mesh)")
            figures.append("loads")
        t.line("done = step + 1")
        more = f", figures={' | '.join(figures)}" if figures else ""
        t.line(f"stop = metrics.step(done, loss, norm, rate(step), stop=interrupts.asked{more})")
        if train.validate:
            count = train.validate.option("batches")
            with t.block(f"if done % {train.validate.steps} == 0 or done == STEPS:"):
                t.line(f"held = (held_out.batch(i, BATCH, mesh) for i in range({count}))")
                t.line("total = sum(reduce_loss(trainer.evaluate(batch), mesh) for batch in held)")
                t.line(f"metrics.validation(done, total / {count})")
        every = f"done % {train.checkpoint.steps} == 0 or " if train.checkpoint else ""
        with t.block(f"if stop or {every}done == STEPS:"):
            t.line("metrics.flush()")
            extra = ", trainer.scale.state()" if self.precision.loss_scale else ""
            t.line(f"checkpoints.save(done, trainer.models, optimizer{extra})")
        with t.block("if stop:"):
            t.line('metrics.say(f"stopped after step {done}; start again to go on from there")')
            t.line("break")

    def peak(self) -> float | None:
        """Peak operations per second of one device, in the type that products run in."""
        peaks = self.program.cluster.device.peak_flops
        return peaks.get(self.precision.matrix) or peaks.get("fp32")

    # -- the file

    def print(self) -> str:
        self.trainer()
        self.text.blank(2)
        self.main()
        body = self.text
        self.text = Text()
        self.head()
        self.constants()
        self.text.blank(2)
        tail = ["", "", 'if __name__ == "__main__":', "    main()"]
        source = self.text.render() + body.render() + "\n".join(tail) + "\n"
        return formatted(source, "train.py")

    def head(self) -> None:
        t = self.text
        lines = Header(self.plan, quoted(self.plan.spec)).lines()
        t.line('"""' + lines[0])
        for line in lines[1:]:
            t.line(line)
        t.line('"""')
        t.blank()
        t.line("from pathlib import Path")
        t.line("from torch.distributed.elastic.multiprocessing.errors import record")
        t.blank()
        t.line("import torch")
        t.line("from torch import Tensor")
        t.blank()
        t.line("from model import Model")
        t.line("from runtime import batches, learning_rate, optimizers")
        t.line("from runtime.batches import Batch")
        t.line("from runtime.checkpoint import Checkpoints")
        t.line("from runtime.clip import clip_")
        t.line("from runtime.interrupts import Interrupts")
        t.line("from runtime.metrics import Metrics, reduce_loss")
        t.line("from runtime.initialise import initialise")
        t.line("from runtime.mesh import Mesh, start")
        for line in sorted(self.imports):
            t.line(line)
        t.blank()


def print_train(program: Program, lowered: Lowered, *, model_flops_per_token: float) -> str:
    """train.py of the lowered program."""
    return TrainPrinter(program, lowered, model_flops_per_token).print()
