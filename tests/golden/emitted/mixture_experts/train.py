"""Emitted by llmspec from mixture_experts.llmspec. Spec 4b44ea6241b6, plan 5508b9.
Change the spec or the plan, then: llmspec compile mixture_experts.llmspec

Mesh: shards 8 = 8 processes, experts over 4 data ranks. ZeRO 3.
"""

from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.elastic.multiprocessing.errors import record

from model import Model
from runtime import auxiliary, batches, learning_rate, optimizers
from runtime.balance import balance_experts
from runtime.batches import Batch
from runtime.checkpoint import Checkpoints
from runtime.clip import clip_
from runtime.initialise import initialise
from runtime.interrupts import Interrupts
from runtime.mesh import Mesh, start
from runtime.metrics import Metrics
from runtime.predicted import Predicted
from runtime.sharded_data_parallel import ShardedGradients

STEPS = 1000
BATCH = 64  # sequences per step, over all processes
MICROBATCHES = 1  # of 8 sequences each
SEQUENCE = 1024
VOCABULARY = 32000
SEED = 1
FOLDER = Path(__file__).parent
FLOPS_PER_TOKEN = 1.368e09  # model, not hardware
PEAK_FLOPS = 9.89e14  # of one device, bf16, dense
# what plan.json predicts; the run ends with what was measured beside it
STEP_S = 0.0533245
MEMORY_BYTES = 7889206786  # 7.35 GiB, of tensors, on the fullest GPU
COMPUTE = torch.bfloat16  # weights are float32
REDUCE = torch.float32  # gradients are summed in it


class Trainer:
    """The model on this process, and what one optimizer step computes."""

    def __init__(self, mesh: Mesh):
        self.mesh = mesh
        self.model = Model(mesh)
        # FSDP2 gathers each unit's parameters for its forward and for its backward, and sums its
        # gradients over the data ranks after every backward; each rank keeps a part
        # gradients of experts: over the 2 ranks that have the same ones
        self.gradients = ShardedGradients(
            self.model, mesh, units=self.model.units(), zero=3, compute=COMPUTE, reduce=REDUCE
        )
        initialise(self.model, mesh, seed=SEED)
        self.models = [self.model]

    def step(self, batch: Batch) -> Tensor:
        """Gradients of one batch, summed over all processes; this process's loss."""
        auxiliary.begin(batch.target_tokens)
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
    mesh = start(shards=8, expert=4)
    trainer = Trainer(mesh)
    optimizer = optimizers.adamw(
        trainer.models, lr=0.0006, betas=(0.9, 0.95), eps=1e-08, weight_decay=0.1
    )
    rate = learning_rate.schedule(
        0.0006, STEPS, learning_rate.warmup(steps=100), learning_rate.cosine(to=6e-05)
    )
    data = batches.tokens("data/*.bin", sequence_length=SEQUENCE, vocab=VOCABULARY, seed=SEED)
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
            loads = balance_experts(trainer.models, mesh)
            inner = auxiliary.parts("balance_loss", device=mesh.device)
            done = step + 1
            stop = metrics.step(
                done, loss, norm, rate(step), stop=interrupts.asked, parts=inner, figures=loads
            )
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
