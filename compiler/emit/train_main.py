"""The function `main` of train.py: optimizer, data, the loop over steps."""

from __future__ import annotations

from llmspec.compiler.emit.header import link_words
from llmspec.compiler.emit.train_file import TrainFile, literal
from llmspec.compiler.precision import TORCH
from llmspec.compiler.text import in_bytes
from llmspec.dsl.program import Call


def print_main(file: TrainFile) -> None:
    t, train = file.text, file.train
    m = file.plan.mesh
    sizes = {"pipeline": m.pipeline, "replicas": m.replicas, "shards": m.shards}
    sizes |= {"expert": m.expert, "context": m.context, "tensor": m.tensor}
    axes = ", ".join(f"{k}={v}" for k, v in sizes.items() if v > 1)
    clip = train.optimizer.option("clip")
    t.line("@record  # torchrun shows the first failure of any process")
    with t.block("def main() -> None:"):
        t.line(f"mesh = start({axes})")
        t.line("trainer = Trainer(mesh)")
        if file.precision.tf32:
            t.line('torch.set_float32_matmul_precision("high")  # products in TF32')
        print_optimizer(file)
        phases = [call_text(file, "learning_rate", p) for p in train.learning_rate]
        peak = literal(train.optimizer.option("lr"))  # type: ignore[arg-type]
        t.line(f"rate = learning_rate.schedule({', '.join([peak, 'STEPS', *phases])})")
        t.line(f"data = {dataset(file, train.dataset)}")
        if file.ramp:
            t.line("ramp = batches.Ramp(BATCH, RAMP)")
        if train.validate:
            held_out = train.validate.option("dataset")
            t.line(f"held_out = {dataset(file, held_out)}")  # type: ignore[arg-type]
        print_loop(file, literal(clip))  # type: ignore[arg-type]


def call_text(
    file: TrainFile, module: str, call: Call, skip: tuple[str, ...] = (), lead: str = ""
) -> str:
    parts = [lead] if lead else []
    parts += [
        f"{name}={literal(value)}"  # type: ignore[arg-type]
        for name, value in call.options
        if name not in skip and value is not None
    ]
    return f"{module}.{call.name}({', '.join(parts)})"


def dataset(file: TrainFile, call: Call) -> str:
    sizes = "sequence_length=SEQUENCE, vocab=VOCABULARY, seed=SEED"
    lead = ""
    if call.arguments:
        one = call.arguments[0] if len(call.arguments) == 1 else call.arguments
        lead = literal(one) + ", "
    return call_text(file, "batches", call, lead=lead + sizes)


def print_optimizer(file: TrainFile) -> None:
    """The line that makes it, and where its state is."""
    t, made, offload = file.text, optimizer(file), file.plan.offload
    if "optimizer" in offload:
        t.line("# its state and a copy of the weights are in host memory, updated by the CPU:")
        t.line("# gradients go there and weights come back, bucket by bucket")
        file.imports.add("from runtime.host_optimizer import on_host")
        made = f"on_host({made}, mesh)"
    known = file.plan.predicted.get("predicted")
    if known and ("optimizer" in offload or "parameters" in offload):
        size = in_bytes(known["peak_host_memory_bytes"])
        update = known["time_s"]["optimizer"] * 1e3
        t.line(f"# {size} of host memory a process, {update:.3g} ms an update predicted,")
        t.line(f"# {link_words(file.plan)}")
    t.line(f"optimizer = {made}")


def optimizer(file: TrainFile) -> str:
    """PyTorch's own class, where weights and moments have one type."""
    precision, call = file.precision, file.train.optimizer
    if not precision.own_update:
        return call_text(file, "optimizers", call, ("clip",), "trainer.models")
    file.imports.add("from runtime import short_optimizers")
    text = call_text(file, "short_optimizers", call, ("clip",), "trainer.models")
    more = f", moments={TORCH[precision.moments]}"
    if precision.stochastic:
        more += ', rounding="stochastic", seed=SEED'
    return text.removesuffix(")") + more + ")"


def print_loop(file: TrainFile, clip: str) -> None:
    t, train = file.text, file.train
    keep = train.checkpoint.option("keep") if train.checkpoint else 1
    t.line(f'checkpoints = Checkpoints(str(FOLDER / "checkpoints"), mesh, keep={keep})')
    t.line("resumed = checkpoints.restore(trainer.models, optimizer)")
    t.line('first = resumed["step"] if resumed else 0')
    if file.precision.loss_scale:
        t.line("trainer.scale.restore(resumed)")
    peak = ", peak_flops=PEAK_FLOPS" if file.peak() else ""
    ramp = "ramp=ramp, " if file.ramp else ""
    predicted = ""
    if file.predicted():
        file.imports.add("from runtime.predicted import Predicted")
        predicted = ", predicted=Predicted(step_s=STEP_S, memory_bytes=MEMORY_BYTES)"
    t.line(
        'metrics = Metrics(str(FOLDER / "log.jsonl"), mesh, steps=STEPS, first=first, '
        f"every={train.log.steps}, tokens_per_step=BATCH * SEQUENCE, {ramp}"
        f"flops_per_token=FLOPS_PER_TOKEN{peak}{predicted})"
    )
    with t.block("if first:"):
        t.line('metrics.say(f"resumed after step {first} of {STEPS}")')
    with (
        t.block("with Interrupts() as interrupts:"),
        t.block("for step in range(first, STEPS):"),
    ):
        print_step(file, clip)
    t.line("checkpoints.wait()")
    t.line("metrics.close()")
    t.line("mesh.close()")


def print_step(file: TrainFile, clip: str) -> None:
    t, train = file.text, file.train
    t.line("optimizers.set_learning_rate(optimizer, rate(step))")
    batch = "data.batch(step, BATCH, mesh)"
    if file.ramp:
        batch = "data.take(ramp.first(step), ramp.rows(step), mesh)"
    t.line(f"loss = trainer.step({batch})")
    t.line(f"norm = trainer.clip({clip})")
    figures = []
    if file.precision.loss_scale:
        t.line("# the norm is over all processes: if it is not finite, all skip this update")
        with t.block("if trainer.scale.accepts(norm):"):
            t.line("optimizer.step()")
        figures.append("trainer.scale.report()")
    else:
        t.line("optimizer.step()")
    if file.experts:
        file.imports.add("from runtime.balance import balance_experts")
        t.line("loads = balance_experts(trainer.models, mesh)")
        figures.append("loads")
    more = ""
    if file.inner_losses:
        names = ", ".join(f'"{name}"' for name in file.inner_losses)
        t.line(f"inner = auxiliary.parts({names}, device=mesh.device)")
        more += ", parts=inner"
    more += f", figures={' | '.join(figures)}" if figures else ""
    t.line("done = step + 1")
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
        extra = ", trainer.scale.state()" if file.precision.loss_scale else ""
        t.line(f"checkpoints.save(done, trainer.models, optimizer{extra})")
    with t.block("if stop:"):
        t.line('metrics.say(f"stopped after step {done}; start again to go on from there")')
        t.line("break")
