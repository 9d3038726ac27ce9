"""Print train.py: mesh, model, gradients, optimizer, data and the loop of one plan."""

from __future__ import annotations

from llmspec.compiler.emit.actions import print_actions
from llmspec.compiler.emit.header import Header
from llmspec.compiler.emit.train_file import TrainFile
from llmspec.compiler.emit.train_main import print_main
from llmspec.compiler.emit.trainer import print_trainer
from llmspec.compiler.lower import Lowered
from llmspec.compiler.precision import TORCH, WORDS
from llmspec.compiler.text import Text, formatted, in_bytes, plural, quoted
from llmspec.dsl.program import Program


def print_head(file: TrainFile) -> None:
    t = file.text
    lines = Header(file.plan, quoted(file.plan.spec)).lines()
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
    for line in sorted(file.imports):
        t.line(line)
    t.blank()


def print_constants(file: TrainFile) -> None:
    t, plan, p = file.train, file.plan, file.precision
    if plan.choices:
        file.text.line("# the spec leaves this open, and the search has chosen:")
        for key, value in plan.choices.items():
            file.text.line(f"#   {key} = {value}")
    file.text.line(f"STEPS = {t.steps}")
    file.text.line(f"BATCH = {t.batch_sequences}  # sequences per step, over all processes")
    if file.ramp:
        file.text.line("# the batch grows up to that: so many steps of so many sequences first")
        file.text.line(f"RAMP = {file.ramp!r}")
        file.text.line(f"MICROBATCH = {plan.microbatch}  # sequences of one, on one data rank")
    each = plural(plan.microbatch, "sequence")
    file.text.line(f"MICROBATCHES = {plan.microbatches}  # of {each} each")
    file.text.line(f"SEQUENCE = {t.sequence_length}")
    file.text.line(f"VOCABULARY = {file.lowered.whole.vocab}")
    file.text.line(f"SEED = {t.seed}")
    file.text.line("FOLDER = Path(__file__).parent")
    file.text.line(f"FLOPS_PER_TOKEN = {file.model_flops_per_token:.6g}  # model, not hardware")
    if peak := file.peak():
        file.text.line(f"PEAK_FLOPS = {peak:.6g}  # of one device, {file.precision.matrix}, dense")
    if known := file.predicted():
        step_s, memory_bytes, what = known
        file.text.line("# what plan.json predicts; the run ends with what was measured beside it")
        file.text.line(f"STEP_S = {step_s:.6g}")
        file.text.line(f"MEMORY_BYTES = {memory_bytes}  # {in_bytes(memory_bytes)}, {what}")
    if file.staged or file.typed:
        stored = f"  # weights are {WORDS[p.stored]}" if p.mixed else ""
        file.text.line(f"COMPUTE = {TORCH[p.compute]}{stored}")
    if file.typed or p.reduced != p.stored:
        file.text.line(f"REDUCE = {TORCH[p.reduced]}  # gradients are summed in it")
    if file.staged:
        print_actions(file)


def print_train(program: Program, lowered: Lowered, *, model_flops_per_token: float) -> str:
    """train.py of the lowered program."""
    file = TrainFile(program, lowered, model_flops_per_token)
    print_trainer(file)
    file.text.blank(2)
    print_main(file)
    body, file.text = file.text, Text()  # the head needs to know what the body imports
    print_head(file)
    print_constants(file)
    file.text.blank(2)
    tail = ["", "", 'if __name__ == "__main__":', "    main()"]
    source = file.text.render() + body.render() + "\n".join(tail) + "\n"
    return formatted(source, "train.py")
