"""Emitted by llmspec from offload_last.llmspec. Spec 8a16ceb6971e, plan b4d5d1.
Change the spec or the plan, then: llmspec compile offload_last.llmspec

Mesh: shards 2 = 2 processes. ZeRO 3. In host memory: activations and parameters and the optimizer.
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
from runtime.predicted import Predicted
from runtime.sharded_data_parallel import ShardedGradients

STEPS = 100
BATCH = 32  # sequences per step, over all processes
MICROBATCHES = 1  # of 16 sequences each
SEQUENCE = 1024
VOCABULARY = 32000
SEED = 1
FOLDER = Path(__file__).parent
FLOPS_PER_TOKEN = 1.12145e09  # model, not hardware
PEAK_FLOPS = 1.652e14  # of one device, bf16, dense
# what plan.json predicts; the run ends with what was measured beside it
STEP_S = 0.369983
MEMORY_BYTES = 1250443264  # 1.16 GiB, of tensors, on the fullest GPU
COMPUTE = torch.bfloat16  # weights are float32
REDUCE = torch.float32  # gradients are summed in it


class Trainer:
    """The model on this process, and what one optimizer step computes."""

    def __init__(self, mesh: Mesh):
        self.mesh = mesh
        self.model = Model(mesh)
        # FSDP2 gathers each unit's parameters for its forward and for its backward, and sums its
        # gradients over the data ranks after every backward; each rank keeps a part
        # the parts are in host memory, and with them the optimizer's state
        self.gradients = ShardedGradients(
            self.model,
            mesh,
            units=self.model.units(),
            zero=3,
            compute=COMPUTE,
            reduce=REDUCE,
            on_host=True,
        )
        initialise(self.model, mesh, seed=SEED, on_host=True)
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

    def clip(self, max_norm: float | None) -> Tensor:
        """The norm of all gradients before clipping."""
        return clip_(self.model.parameters(), self.mesh, max_norm)


@record  # torchrun shows the first failure of any process
def main() -> None:
    mesh = start(shards=2)
    trainer = Trainer(mesh)
    # 3.67 GiB of host memory a process, 62.4 ms an update predicted,
    # 34.9 ms of a step's copies not hidden
    optimizer = optimizers.adamw(
        trainer.models, lr=0.0003, betas=(0.9, 0.95), eps=1e-08, weight_decay=0.1
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
