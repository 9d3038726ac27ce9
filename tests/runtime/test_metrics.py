import contextlib
import io
import json
import math
import re
import statistics
import sys
import types
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from llmspec.runtime import metrics
from llmspec.runtime.errors import UserError
from llmspec.runtime.mesh import Mesh
from llmspec.runtime.metrics import Metrics, _duration, _short, reduce_loss
from llmspec.runtime.predicted import Predicted, peak_memory_bytes
from tests.processes import run


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def play(path: Path, steps: range, total: int, **options) -> str:
    """The progress lines of one process."""

    def go(rank: int) -> str:
        said = io.StringIO()
        with contextlib.redirect_stdout(said):
            log = Metrics(
                str(path),
                Mesh.create("cpu"),
                steps=total,
                tokens_per_step=1000,
                first=steps.start,
                every_s=0,
                **options,
            )
            for step in steps:
                loss = torch.tensor(5.0 - step / 10, dtype=torch.float32)
                assert not log.step(step + 1, loss, torch.tensor(0.5), 1e-3 * (step + 1))
                if step % 3 == 2:
                    log.validation(step + 1, 4.0)
            log.close()
        return said.getvalue()

    return run(1, go)[0]


def test_progress_lines(tmp_path: Path):
    said = play(tmp_path / "log.jsonl", range(12), 12, flops_per_token=6e6, peak_flops=1e12)
    printed = said.splitlines()
    assert len(printed) == 12 + 4
    assert re.fullmatch(
        r"step  5/12  loss 4\.6000  norm 0\.5  lr 5\.00e-03  [\d.]+[kMG]? tokens/s"
        r"  mfu [\d.]+ %  memory \d\.\d\d GiB  \d+ s left",
        printed[5],
    ), printed[5]
    assert printed[3] == "step  3/12  validation loss 4.0000"
    assert "left" not in printed[-2] and "12/12" in printed[-2]


def test_the_end_stands_beside_its_prediction(tmp_path: Path):
    predicted = Predicted(step_s=2.5, memory_bytes=2**30)
    said = play(tmp_path / "log.jsonl", range(12), 12, predicted=predicted).splitlines()
    head, step, memory = said[-3:]
    assert head.split() == ["predicted", "measured"]
    last = lines(tmp_path / "log.jsonl")[-1]
    seconds = [line["seconds"] for line in lines(tmp_path / "log.jsonl") if "seconds" in line]
    assert last["step"] == 12 and last["predicted_step_s"] == 2.5
    assert last["measured_step_s"] == statistics.median(seconds[1:])  # the first warms up
    assert re.fullmatch(r"step +2\.5 s +[\d.]+ ms +-(100\.0|9\d\.\d) %", step), step
    size = last["measured_memory_bytes"]
    assert last["predicted_memory_bytes"] == 2**30
    assert 2**20 < size <= peak_memory_bytes(torch.device("cpu")) < 2**36
    off = f"{100 * (size / 2**30 - 1):+.1f} %"
    assert re.fullmatch(
        rf"peak memory +1\.00 GiB +{size / 2**20:.0f} MiB +{re.escape(off)}", memory
    )


def measured_on(rank: int, path: Path) -> None:
    log = Metrics(
        str(path),
        Mesh.create("cpu", shards=2),
        steps=2,
        tokens_per_step=8,
        predicted=Predicted(step_s=1.0, memory_bytes=1),
    )
    with contextlib.redirect_stdout(io.StringIO()):
        for step in (1, 2):
            log.step(step, torch.tensor(1.0), torch.tensor(1.0), 0.1)
        log.flush()
        assert log.comparison is not None
        peak = 7_000_000 + rank
        log.comparison.own_peak_bytes = peak
        log.flush()  # a second checkpoint takes memory that steps do not
        assert log.comparison.own_peak_bytes == peak
        log.close()
    dist.barrier()
    assert lines(path)[-1]["measured_memory_bytes"] == 7_000_001


def test_the_fullest_rank_counts(tmp_path: Path):
    run(2, measured_on, tmp_path / "log.jsonl")


def test_a_run_without_a_warm_step_compares_nothing(tmp_path: Path):
    path = tmp_path / "log.jsonl"
    said = play(path, range(1), 5, predicted=Predicted(step_s=1.0, memory_bytes=1))
    assert "predicted" not in said and "predicted" not in path.read_text()


def test_log_of_a_resumed_run(tmp_path: Path):
    path = tmp_path / "log.jsonl"
    play(path, range(8), 12)
    with open(path, "a") as file:
        file.write('{"step": 9, "lo')  # killed while writing
    play(path, range(4, 12), 12)
    steps = [line for line in lines(path) if "loss" in line]
    assert [line["step"] for line in steps] == list(range(1, 13))
    assert [line["step"] for line in lines(path) if "validation_loss" in line] == [3, 6, 9, 12]
    one = steps[6]
    assert math.isclose(one["loss"], 4.4, rel_tol=1e-6) and one["tokens"] == 7000
    assert one["gradient_norm"] == 0.5 and one["learning_rate"] == 1e-3 * 7
    assert not list(tmp_path.glob("*.tmp"))


def reduce_on(rank: int, path: Path, sizes: dict[str, int]) -> None:
    mesh = Mesh.create("cpu", **sizes)
    last_stage = mesh.pipeline.rank == mesh.pipeline.size - 1
    part = torch.tensor(1.5 + mesh.data.rank) if last_stage else None
    expected = sum(1.5 + r for r in range(mesh.data.size))
    assert reduce_loss(part, mesh) == expected
    log = Metrics(str(path), mesh, steps=3, tokens_per_step=8, every_s=1e9)
    with contextlib.redirect_stdout(io.StringIO()):
        assert not log.step(1, part, torch.tensor(1.0), 0.1)
        # one rank is asked to stop, all stop
        assert log.step(2, part, torch.tensor(1.0), 0.1, stop=rank == mesh.world.size - 1)
    with pytest.raises(UserError, match="the loss of step 3 is nan"):
        log.step(3, torch.tensor(math.nan), torch.tensor(1.0), 0.1)
    log.close()
    dist.barrier()
    assert [line["loss"] for line in lines(path)] == [expected, expected]


def test_reduction_on_meshes(tmp_path: Path):
    for number, sizes in enumerate(
        [{"tensor": 2}, {"pipeline": 2, "shards": 2}, {"replicas": 2, "tensor": 2}]
    ):
        world = math.prod(sizes.values())
        run(world, reduce_on, tmp_path / f"{number}.jsonl", sizes)


def test_words_for_numbers():
    assert [_short(n) for n in (12.3, 1234, 56_789, 3.2e6, 7e9)] == [
        "12",
        "1.23k",
        "56.8k",
        "3.2M",
        "7G",
    ]
    assert [_duration(s) for s in (3.2, 75, 660, 3600 * 5 + 120, 86400 * 3 + 3600)] == [
        "3 s",
        "1 min 15 s",
        "11 min",
        "5 h 2 min",
        "3 d 1 h",
    ]


def test_tensorboard_if_it_is_there(tmp_path: Path, monkeypatch):
    scalars: list[tuple] = []

    class SummaryWriter:
        def __init__(self, folder: Path, purge_step: int):
            scalars.append((folder.name, purge_step))

        def add_scalar(self, name: str, value: float, step: int) -> None:
            scalars.append((name, value, step))

        def close(self) -> None:
            scalars.append(())

    board = types.ModuleType("torch.utils.tensorboard")
    board.SummaryWriter = SummaryWriter  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", board)
    monkeypatch.setattr(metrics.importlib.util, "find_spec", lambda name: name)
    log = metrics._Log(tmp_path / "log.jsonl", 4)
    log.write({"step": 5, "loss": 2.5})
    log.close()
    assert scalars == [("tensorboard", 5), ("loss", 2.5, 5), ()]
