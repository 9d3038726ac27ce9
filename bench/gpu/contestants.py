"""One model, trained one way, in a process of its own: `python -m bench.gpu.contestants JOB`.

A job is a JSON object: the case, who trains it, the emitted program's folder. The last line of the
output is what was measured.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from bench.gpu.cases import Case
from bench.gpu.measuring import synchronise
from bench.gpu.processes import Row, rows_of, say
from bench.plain_trainers import MODELS

WARM_UP, COUNTED = 4, 12
BATCHES = 4
"""Made before the clock runs, and used in turn."""
EMITTED, WITH_KERNELS = "emitted", "emitted, fused kernels"
COMPILED_KERNELS = "emitted, kernels by inductor"
Step = Callable[[int], Any]


def measured(step: Step) -> dict[str, float]:
    """Of one step, clock and memory; the first ones are not counted."""
    cuda, found, loss = torch.cuda.is_available(), [], 0.0
    for number in range(WARM_UP + COUNTED):
        if number == WARM_UP and cuda:
            torch.cuda.reset_peak_memory_stats()
        synchronise()
        start_s = time.perf_counter()
        loss = step(number)
        synchronise()
        found.append(time.perf_counter() - start_s)
    return {
        "step_s": statistics.median(found[WARM_UP:]),
        "peak_bytes": torch.cuda.max_memory_allocated() if cuda else 0,
        "loss": float(loss),
    }


# --------------------------------------------------------------------------------------------------
# Emitted programs


def emitted(folder: str) -> dict[str, float]:
    sys.path.insert(0, folder)
    train = importlib.import_module("train")
    mesh = importlib.import_module("runtime.mesh").start()
    trainer = train.Trainer(mesh)
    optimizer = importlib.import_module("runtime.optimizers").adamw(
        trainer.models, lr=3e-4, weight_decay=0.1
    )
    data = importlib.import_module("runtime.batches").synthetic(
        sequence_length=train.SEQUENCE, vocab=train.VOCABULARY, seed=train.SEED
    )
    batches = [made(data.batch(i, train.BATCH, mesh), train.MICROBATCHES) for i in range(BATCHES)]

    def step(number: int) -> Tensor:
        loss: Tensor = trainer.step(batches[number % BATCHES])
        trainer.clip(1.0)
        optimizer.step()
        return loss

    found = measured(step)
    mesh.close()
    return found


def made(batch: Any, count: int) -> Any:
    """A batch whose micro-batches lie on the device already."""
    parts = list(batch.microbatches(count))
    return SimpleNamespace(target_tokens=batch.target_tokens, microbatches=lambda count: parts)


# --------------------------------------------------------------------------------------------------
# Others


def plain(case: Case, *, compiled: bool) -> dict[str, float]:
    """As people write it by hand (bench/plain_trainers.py), float32 weights under autocast."""
    torch.manual_seed(1)
    with torch.device(_kind()):  # billions of weights take minutes on the host
        model = MODELS[case.model](case.shape)
    call: Any = model
    if compiled and case.model == "gpt":  # as nanoGPT has it
        call = torch.compile(model)
    elif compiled:  # as torchtitan has it: block by block, and the loss; the whole takes minutes
        for block in call.blocks:
            block.compile()
        call.loss = torch.compile(call.loss)
    return _trained(case, model, lambda tokens, targets: call(tokens, targets))


def hugging_face(case: Case, *, liger: bool) -> dict[str, float]:
    """The class of transformers with scaled_dot_product_attention, with Liger-Kernel's patches
    where it has some for the model."""
    import transformers

    if liger and case.model == "llama":
        importlib.import_module("liger_kernel.transformers").apply_liger_kernel_to_llama()
    torch.manual_seed(1)
    config = _config(transformers, case)
    with torch.device(_kind()):
        model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
    model.train()

    def loss(tokens: Tensor, targets: Tensor) -> Tensor:
        # the labels are shifted inside
        out: Tensor = model(input_ids=tokens, labels=tokens, use_cache=False).loss
        return out

    return _trained(case, model, loss)


def _config(transformers: Any, case: Case) -> Any:
    s = case.shape
    if case.model == "gpt":
        none = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
        return transformers.GPT2Config(
            vocab_size=s.vocab, n_positions=s.context, n_embd=s.width, n_layer=s.layers,
            n_head=s.heads, **none,
        )  # fmt: skip
    return transformers.LlamaConfig(
        vocab_size=s.vocab, hidden_size=s.width, intermediate_size=s.ffn,
        num_hidden_layers=s.layers, num_attention_heads=s.heads, num_key_value_heads=s.kv_heads,
        max_position_embeddings=s.context, tie_word_embeddings=False,
    )  # fmt: skip


def _kind() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def _trained(
    case: Case, model: nn.Module, loss_of: Callable[[Tensor, Tensor], Tensor]
) -> dict[str, float]:
    kind = _kind()
    fused = torch.optim.AdamW(
        model.parameters(), lr=3e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True
    )
    shape = (BATCHES, case.batch, case.shape.context + 1)
    ids = torch.randint(0, case.shape.vocab, shape, device=kind)

    def step(number: int) -> Tensor:
        own = ids[number % BATCHES]
        short = (
            torch.autocast("cuda", torch.bfloat16) if kind == "cuda" else contextlib.nullcontext()
        )
        with short:
            loss = loss_of(own[:, :-1].contiguous(), own[:, 1:].contiguous())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        fused.step()
        fused.zero_grad(set_to_none=True)
        return loss.detach()

    return measured(step)


# --------------------------------------------------------------------------------------------------
# Processes


def contestants(case: Case, cuda: bool) -> list[str]:
    """Who can take part here, besides emitted programs. On a CPU, where only the benchmark itself
    is tested, one model of Hugging Face's is enough."""
    found = ["plain compiled"] * cuda + ["plain"]
    if importlib.util.find_spec("transformers") and (cuda or case.model == "llama"):
        found.append("hugging face")
        if cuda and importlib.util.find_spec("liger_kernel") is not None:
            found.append("hugging face, liger")
    return found


def run(who: str, case: Case, folder: Path, timeout_s: float) -> Row:
    """What it measured, or `failed`: the last line that it said."""
    job = {"who": who, "case": asdict(case), "folder": str(folder)}
    rows = list(rows_of("bench.gpu.contestants", [json.dumps(job)], timeout_s))
    return rows[-1] if rows else {"failed": "no word"}


def main(text: str) -> None:
    job = json.loads(text)
    case = Case.of(job["case"])
    ways: dict[str, Callable[[], dict[str, float]]] = {
        EMITTED: lambda: emitted(job["folder"]),
        WITH_KERNELS: lambda: emitted(job["folder"]),
        COMPILED_KERNELS: lambda: emitted(job["folder"]),
        "plain": lambda: plain(case, compiled=False),
        "plain compiled": lambda: plain(case, compiled=True),
        "hugging face": lambda: hugging_face(case, liger=False),
        "hugging face, liger": lambda: hugging_face(case, liger=True),
    }
    say(ways[job["who"]]())


if __name__ == "__main__":
    main(sys.argv[1])
