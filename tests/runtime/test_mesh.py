import os
import subprocess
import sys

import pytest
import torch.distributed as dist

from llmspec.runtime.errors import UserError
from llmspec.runtime.mesh import Mesh, start
from tests.processes import run


def _positions(rank: int):
    mesh = Mesh.create("cpu", pipeline=2, shards=2, tensor=2)
    names = ("pipeline", "replicas", "shards", "context", "tensor", "data", "reduction", "world")
    axes = [getattr(mesh, name) for name in names]
    ranks = {a.name: dist.get_process_group_ranks(a.group) for a in axes}
    assert mesh.devices("shards", "tensor").shape == (2, 2)
    return {a.name: (a.rank, a.size) for a in axes}, ranks


def test_rank_order_is_pipeline_outermost_and_tensor_innermost():
    for rank, (axes, ranks) in enumerate(run(8, _positions)):
        pipeline, shards, tensor = rank // 4, rank // 2 % 2, rank % 2
        assert axes["pipeline"] == (pipeline, 2)
        assert axes["shards"] == axes["data"] == axes["reduction"] == (shards, 2)
        assert axes["tensor"] == (tensor, 2)
        assert axes["replicas"] == axes["context"] == (0, 1)
        assert axes["world"] == (rank, 8)
        assert ranks["tensor"] == [rank - tensor, rank - tensor + 1]
        assert ranks["data"] == [4 * pipeline + tensor, 4 * pipeline + 2 + tensor]


def _data(rank: int):
    mesh = Mesh.create("cpu", replicas=2, shards=2)
    assert mesh.shard_devices().shape == (2, 2)
    return mesh.data.rank, mesh.data.size, mesh.replicas.rank, mesh.shards.rank


def test_data_is_replicas_times_shards():
    expected = [(0, 4, 0, 0), (1, 4, 0, 1), (2, 4, 1, 0), (3, 4, 1, 1)]
    assert run(4, _data) == expected


def _wrong(rank: int):
    try:
        Mesh.create("cpu", tensor=4)
    except UserError as error:
        return str(error)


def test_a_wrong_number_of_processes_is_the_users_error():
    expected = "the plan needs 4 processes (tensor 4), but 2 were started"
    assert run(2, _wrong) == [expected] * 2


def test_start_without_torchrun_is_one_process():
    code = "from llmspec.runtime.mesh import start; print(start().world.size)"
    env = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "MASTER_ADDR")}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert (done.returncode, done.stdout) == (0, "1\n"), done.stderr


def test_of_many_processes_one_tells_what_is_wrong(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(UserError, match="the plan needs 8 processes"):
        start(pipeline=2, tensor=4)
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(SystemExit) as silent:
        start(pipeline=2, tensor=4)
    assert silent.value.code == 1


RESTARTING = """
import os, signal, torch
from llmspec.runtime.mesh import start
mesh = start(shards=2)
x = torch.ones(1)
torch.distributed.all_reduce(x, group=mesh.data.group)
attempt = os.environ["TORCHELASTIC_RESTART_COUNT"]
if attempt == "0" and mesh.data.rank == 1:
    os.kill(os.getpid(), signal.SIGKILL)
if attempt == "0":
    torch.distributed.all_reduce(x, group=mesh.data.group)
print(f"attempt {attempt} sum {x.item()}")
mesh.close()
"""


@pytest.mark.long
def test_a_killed_process_can_be_restarted(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(RESTARTING)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += ["--max-restarts=1", str(script)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("attempt 1 sum 2.0") == 2
