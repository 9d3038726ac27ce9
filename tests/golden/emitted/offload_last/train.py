"""Emitted by llmspec from offload_last.llmspec. Spec 874f5af2295b, plan 2a1fc2.
Change the spec or the plan, then: llmspec compile offload_last.llmspec

Mesh: pipeline 2 = 2 processes. ZeRO 0. In host memory: the optimizer.
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
from runtime.host_optimizer import on_host
from runtime.initialise import initialise
from runtime.interrupts import Interrupts
from runtime.mesh import Mesh, start
from runtime.metrics import Metrics
from runtime.pipeline import Executor
from runtime.predicted import Predicted
from runtime.replicated_data_parallel import ReplicatedGradients

STEPS = 100
BATCH = 32  # sequences per step, over all processes
MICROBATCHES = 16  # of 2 sequences each
SEQUENCE = 1024
VOCABULARY = 32000
SEED = 1
FOLDER = Path(__file__).parent
FLOPS_PER_TOKEN = 1.12145e09  # model, not hardware
PEAK_FLOPS = 1.652e14  # of one device, bf16, dense
# what plan.json predicts; the run ends with what was measured beside it
STEP_S = 0.452521
MEMORY_BYTES = 1519763456  # 1.42 GiB, of tensors, on the fullest GPU
COMPUTE = torch.bfloat16  # weights are float32

# what each pipeline rank does in a step: stage, action, micro-batch
ACTIONS = {
    0: (
        "0F0 0SEND_F0 2RECV_F0 0F1 0SEND_F1 2RECV_F1 2F0 2SEND_F0 2F1 2SEND_F1 2RECV_B0 0F2 "
        "0SEND_F2 2B0 2SEND_B0 2RECV_B1 0F3 0SEND_F3 2RECV_F2 2B1 2SEND_B1 0RECV_B0 2F2 "
        "2SEND_F2 2RECV_F3 0B0 0RECV_B1 2F3 2SEND_F3 0B1 2RECV_B2 0F4 0SEND_F4 2B2 2SEND_B2 "
        "2RECV_B3 0F5 0SEND_F5 2RECV_F4 2B3 2SEND_B3 0RECV_B2 2F4 2SEND_F4 2RECV_F5 0B2 "
        "0RECV_B3 2F5 2SEND_F5 0B3 2RECV_B4 0F6 0SEND_F6 2B4 2SEND_B4 2RECV_B5 0F7 0SEND_F7 "
        "2RECV_F6 2B5 2SEND_B5 0RECV_B4 2F6 2SEND_F6 2RECV_F7 0B4 0RECV_B5 2F7 2SEND_F7 0B5 "
        "2RECV_B6 0F8 0SEND_F8 2B6 2SEND_B6 2RECV_B7 0F9 0SEND_F9 2RECV_F8 2B7 2SEND_B7 "
        "0RECV_B6 2F8 2SEND_F8 2RECV_F9 0B6 0RECV_B7 2F9 2SEND_F9 0B7 2RECV_B8 0F10 0SEND_F10 "
        "2B8 2SEND_B8 2RECV_B9 0F11 0SEND_F11 2RECV_F10 2B9 2SEND_B9 0RECV_B8 2F10 2SEND_F10 "
        "2RECV_F11 0B8 0RECV_B9 2F11 2SEND_F11 0B9 2RECV_B10 0F12 0SEND_F12 2B10 2SEND_B10 "
        "2RECV_B11 0F13 0SEND_F13 2RECV_F12 2B11 2SEND_B11 0RECV_B10 2F12 2SEND_F12 2RECV_F13 "
        "0B10 0RECV_B11 2F13 2SEND_F13 0B11 2RECV_B12 0F14 0SEND_F14 2B12 2SEND_B12 2RECV_B13 "
        "0F15 0SEND_F15 2RECV_F14 2B13 2SEND_B13 0RECV_B12 2F14 2SEND_F14 2RECV_F15 0B12 "
        "0RECV_B13 2F15 2SEND_F15 0B13 2RECV_B14 2B14 2SEND_B14 2RECV_B15 2B15 2REDUCE_GRAD "
        "2SEND_B15 0RECV_B14 0B14 0RECV_B15 0B15 0REDUCE_GRAD"
    ).split(),
    1: (
        "1RECV_F0 1F0 1SEND_F0 1RECV_F1 1F1 1SEND_F1 3RECV_F0 3F0 3RECV_F1 3B0 3SEND_B0 "
        "1RECV_F2 3F1 1RECV_B0 3B1 3SEND_B1 1RECV_F3 1F2 1SEND_F2 1RECV_B1 1B0 1SEND_B0 "
        "3RECV_F2 1F3 1SEND_F3 1B1 1SEND_B1 3RECV_F3 3F2 3B2 3SEND_B2 1RECV_F4 3F3 1RECV_B2 "
        "3B3 3SEND_B3 1RECV_F5 1F4 1SEND_F4 1RECV_B3 1B2 1SEND_B2 3RECV_F4 1F5 1SEND_F5 1B3 "
        "1SEND_B3 3RECV_F5 3F4 3B4 3SEND_B4 1RECV_F6 3F5 1RECV_B4 3B5 3SEND_B5 1RECV_F7 1F6 "
        "1SEND_F6 1RECV_B5 1B4 1SEND_B4 3RECV_F6 1F7 1SEND_F7 1B5 1SEND_B5 3RECV_F7 3F6 3B6 "
        "3SEND_B6 1RECV_F8 3F7 1RECV_B6 3B7 3SEND_B7 1RECV_F9 1F8 1SEND_F8 1RECV_B7 1B6 "
        "1SEND_B6 3RECV_F8 1F9 1SEND_F9 1B7 1SEND_B7 3RECV_F9 3F8 3B8 3SEND_B8 1RECV_F10 3F9 "
        "1RECV_B8 3B9 3SEND_B9 1RECV_F11 1F10 1SEND_F10 1RECV_B9 1B8 1SEND_B8 3RECV_F10 1F11 "
        "1SEND_F11 1B9 1SEND_B9 3RECV_F11 3F10 3B10 3SEND_B10 1RECV_F12 3F11 1RECV_B10 3B11 "
        "3SEND_B11 1RECV_F13 1F12 1SEND_F12 1RECV_B11 1B10 1SEND_B10 3RECV_F12 1F13 1SEND_F13 "
        "1B11 1SEND_B11 3RECV_F13 3F12 3B12 3SEND_B12 1RECV_F14 3F13 1RECV_B12 3B13 3SEND_B13 "
        "1RECV_F15 1F14 1SEND_F14 1RECV_B13 1B12 1SEND_B12 3RECV_F14 1F15 1SEND_F15 1B13 "
        "1SEND_B13 3RECV_F15 3F14 3B14 3SEND_B14 1RECV_B14 3F15 3B15 3REDUCE_GRAD 3SEND_B15 "
        "1RECV_B15 1B14 1SEND_B14 1B15 1REDUCE_GRAD 1SEND_B15"
    ).split(),
}


class Trainer:
    """The model on this process, and what one optimizer step computes."""

    def __init__(self, mesh: Mesh):
        self.mesh = mesh
        stages = range(mesh.pipeline.rank, 4, mesh.pipeline.size)
        models = {stage: Model(mesh, stage) for stage in stages}
        gradients = {stage: ReplicatedGradients(m, mesh) for stage, m in models.items()}
        for model in models.values():
            initialise(model, mesh, seed=SEED)
        self.models = list(models.values())
        self.executor = Executor(
            stages=models,
            gradients=gradients,
            actions=ACTIONS,
            mesh=mesh,
            microbatches=MICROBATCHES,
            boundary=((2, 1024, 1024), COMPUTE),
        )

    def step(self, batch: Batch) -> Tensor:
        """Gradients of one batch, summed over all processes; this process's loss."""
        return self.executor.step(batch)

    def evaluate(self, batch: Batch) -> Tensor:
        """This process's part of the batch's mean loss, no gradients."""
        return self.executor.evaluate(batch)

    def clip(self, max_norm: float | None) -> Tensor:
        """The norm of all gradients before clipping."""
        own = [p for model in self.models for p in model.parameters()]
        copies = self.executor.copies()
        return clip_(own, self.mesh, max_norm, counted_elsewhere=copies)


@record  # torchrun shows the first failure of any process
def main() -> None:
    mesh = start(pipeline=2)
    trainer = Trainer(mesh)
    # its state and a copy of the weights are in host memory, updated by the CPU:
    # gradients go there and weights come back, bucket by bucket
    # 1.48 GiB of host memory a process, 70 ms an update predicted,
    # 5.28 ms of a step's copies not hidden
    optimizer = on_host(
        optimizers.adamw(trainer.models, lr=0.0003, betas=(0.9, 0.95), eps=1e-08, weight_decay=0.1),
        mesh,
    )
    rate = learning_rate.schedule(
        0.0003, STEPS, learning_rate.warmup(steps=10), learning_rate.cosine(to=3e-05)
    )
    data = batches.synthetic(sequence_length=SEQUENCE, vocab=VOCABULARY, seed=SEED)
    checkpoints = Checkpoints(str(FOLDER / "checkpoints"), mesh, keep=3)
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
            if stop or done % 1000 == 0 or done == STEPS:
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
