"""Emitted by llmspec from quickstart.llmspec. Spec 5ca2650b624e, plan 0c4ddf.
Change the spec or the plan, then: llmspec compile quickstart.llmspec

Mesh: replicas 2 = 2 processes. ZeRO 0.
"""

from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.elastic.multiprocessing.errors import record

from model import Model
from runtime import batches, learning_rate, optimizers
from runtime.batches import Batch
from runtime.checkpoint import Checkpoints
from runtime.clip import clip_
from runtime.initialise import initialise
from runtime.interrupts import Interrupts
from runtime.mesh import Mesh, start
from runtime.metrics import Metrics, reduce_loss
from runtime.predicted import Predicted
from runtime.replicated_data_parallel import ReplicatedGradients

STEPS = 160
BATCH = 16  # sequences per step, over all processes
MICROBATCHES = 1  # of 8 sequences each
SEQUENCE = 256
VOCABULARY = 256
SEED = 1
FOLDER = Path(__file__).parent
FLOPS_PER_TOKEN = 1.09117e07  # model, not hardware
PEAK_FLOPS = 1e11  # of one device, fp32, dense
# what plan.json predicts; the run ends with what was measured beside it
STEP_S = 0.521368
MEMORY_BYTES = 460614656  # 439 MiB, of the fullest process


class Trainer:
    """The model on this process, and what one optimizer step computes."""

    def __init__(self, mesh: Mesh):
        self.mesh = mesh
        self.model = Model(mesh)
        # sums gradients over the data ranks in buckets, beside the backward
        self.gradients = ReplicatedGradients(self.model, mesh)
        initialise(self.model, mesh, seed=SEED)
        self.models = [self.model]

    def step(self, batch: Batch) -> Tensor:
        """Gradients of one batch, summed over all processes; this process's loss."""
        loss = torch.zeros((), device=self.mesh.device)
        for micro in batch.microbatches(MICROBATCHES):
            self.gradients.before_microbatch(micro)
            part = self.model(micro.tokens_BT, micro.targets_BT, micro.samples_B)
            part = part / batch.target_tokens
            part.backward()
            loss = loss + part.detach()
        self.gradients.finish()
        return loss

    def evaluate(self, batch: Batch) -> Tensor:
        """This process's part of the batch's mean loss, no gradients."""
        loss = torch.zeros((), device=self.mesh.device)
        with self.gradients.evaluation():
            for micro in batch.microbatches(MICROBATCHES):
                part = self.model(micro.tokens_BT, micro.targets_BT, micro.samples_B)
                loss = loss + part / batch.target_tokens
        return loss

    def clip(self, max_norm: float | None) -> Tensor:
        """The norm of all gradients before clipping."""
        return clip_(self.model.parameters(), self.mesh, max_norm)


@record  # torchrun shows the first failure of any process
def main() -> None:
    mesh = start(replicas=2)
    trainer = Trainer(mesh)
    optimizer = optimizers.adamw(
        trainer.models, lr=0.003, betas=(0.9, 0.95), eps=1e-08, weight_decay=0.1
    )
    rate = learning_rate.schedule(
        0.003, STEPS, learning_rate.warmup(steps=25), learning_rate.cosine(to=0.0003)
    )
    data = batches.text(
        "{stdlib}/[a-r]*.py",
        sequence_length=SEQUENCE,
        vocab=VOCABULARY,
        seed=SEED,
        tokenizer="bytes",
    )
    held_out = batches.text(
        "{stdlib}/[s-z]*.py",
        sequence_length=SEQUENCE,
        vocab=VOCABULARY,
        seed=SEED,
        tokenizer="bytes",
    )
    checkpoints = Checkpoints(str(FOLDER / "checkpoints"), mesh, keep=2)
    resumed = checkpoints.restore(trainer.models, optimizer)
    first = resumed["step"] if resumed else 0
    metrics = Metrics(
        str(FOLDER / "log.jsonl"),
        mesh,
        steps=STEPS,
        first=first,
        every=10,
        tokens_per_step=BATCH * SEQUENCE,
        flops_per_token=FLOPS_PER_TOKEN,
        peak_flops=PEAK_FLOPS,
        predicted=Predicted(step_s=STEP_S, memory_bytes=MEMORY_BYTES),
    )
    if first:
        metrics.say(f"resumed after step {first} of {STEPS}")
    with Interrupts() as interrupts:
        for step in range(first, STEPS):
            optimizers.set_learning_rate(optimizer, rate(step))
            loss = trainer.step(data.batch(step, BATCH, mesh))
            norm = trainer.clip(1.0)
            optimizer.step()
            done = step + 1
            stop = metrics.step(done, loss, norm, rate(step), stop=interrupts.asked)
            if done % 80 == 0 or done == STEPS:
                held = (held_out.batch(i, BATCH, mesh) for i in range(8))
                total = sum(reduce_loss(trainer.evaluate(batch), mesh) for batch in held)
                metrics.validation(done, total / 8)
            if stop or done % 80 == 0 or done == STEPS:
                metrics.flush()
                checkpoints.save(done, trainer.models, optimizer)
            if stop:
                metrics.say(f"stopped after step {done}; start again to go on from there")
                break
    checkpoints.wait()
    metrics.close()
    mesh.close()


if __name__ == "__main__":
    main()
