"""Emitted by llmspec from llama_tensor_sequence_pipeline.llmspec. Spec 7b55b9315bd5, plan 1545f5.
Change the spec or the plan, then: llmspec compile llama_tensor_sequence_pipeline.llmspec

Mesh: pipeline 2 x tensor 4 = 8 processes. ZeRO 0.
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
from runtime.metrics import Metrics
from runtime.pipeline import Executor
from runtime.predicted import Predicted
from runtime.replicated_data_parallel import ReplicatedGradients

STEPS = 1000
BATCH = 16  # sequences per step, over all processes
MICROBATCHES = 8  # of 2 sequences each
SEQUENCE = 4096
VOCABULARY = 128256
SEED = 1
FOLDER = Path(__file__).parent
FLOPS_PER_TOKEN = 1.44263e10  # model, not hardware
PEAK_FLOPS = 9.89e14  # of one device, bf16, dense
# what plan.json predicts; the run ends with what was measured beside it
STEP_S = 0.377019
MEMORY_BYTES = 12208865280  # 11.4 GiB, of tensors, on the fullest GPU
COMPUTE = torch.bfloat16  # weights are float32

# what each pipeline rank does in a step: stage, action, micro-batch
ACTIONS = {
    0: (
        "0F0 0SEND_F0 0F1 0SEND_F1 0RECV_B0 0B0 0F2 0SEND_F2 0RECV_B1 0B1 0F3 0SEND_F3 "
        "0RECV_B2 0B2 0F4 0SEND_F4 0RECV_B3 0B3 0F5 0SEND_F5 0RECV_B4 0B4 0F6 0SEND_F6 "
        "0RECV_B5 0B5 0F7 0SEND_F7 0RECV_B6 0B6 0RECV_B7 0B7 0REDUCE_GRAD"
    ).split(),
    1: (
        "1RECV_F0 1F0 1RECV_F1 1B0 1SEND_B0 1F1 1RECV_F2 1B1 1SEND_B1 1F2 1RECV_F3 1B2 "
        "1SEND_B2 1F3 1RECV_F4 1B3 1SEND_B3 1F4 1RECV_F5 1B4 1SEND_B4 1F5 1RECV_F6 1B5 "
        "1SEND_B5 1F6 1RECV_F7 1B6 1SEND_B6 1F7 1B7 1REDUCE_GRAD 1SEND_B7"
    ).split(),
}


class Trainer:
    """The model on this process, and what one optimizer step computes."""

    def __init__(self, mesh: Mesh):
        self.mesh = mesh
        stages = [mesh.pipeline.rank]
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
            boundary=((2, 1024, 4096), COMPUTE),
        )

    def step(self, batch: Batch) -> Tensor:
        """Gradients of one batch, summed over all processes; this process's loss."""
        return self.executor.step(batch)

    def clip(self, max_norm: float | None) -> Tensor:
        """The norm of all gradients before clipping."""
        own = [p for model in self.models for p in model.parameters()]
        copies = self.executor.copies()
        return clip_(own, self.mesh, max_norm, counted_elsewhere=copies)


@record  # torchrun shows the first failure of any process
def main() -> None:
    mesh = start(pipeline=2, tensor=4)
    trainer = Trainer(mesh)
    optimizer = optimizers.adamw(
        trainer.models, lr=0.0003, betas=(0.9, 0.95), eps=1e-08, weight_decay=0.1
    )
    rate = learning_rate.schedule(
        0.0003, STEPS, learning_rate.warmup(steps=100), learning_rate.cosine(to=3e-05)
    )
    data = batches.tokens("data/*.bin", sequence_length=SEQUENCE, vocab=VOCABULARY, seed=SEED)
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
            if stop or done % 500 == 0 or done == STEPS:
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
