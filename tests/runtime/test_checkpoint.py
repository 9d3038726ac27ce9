import copy
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
import torch._dynamo  # optimizers import it: once here, not in every forked rank
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from llmspec.runtime import checkpoint
from llmspec.runtime.checkpoint import Checkpoints, latest
from llmspec.runtime.errors import UserError
from llmspec.runtime.initialise import Constant, Normal, initialise
from llmspec.runtime.mesh import Mesh
from llmspec.runtime.optimizers import adamw, as_modules, sgd
from llmspec.runtime.parameters import Group, parameter, traits
from tests.processes import run

WIDTHS = {"embed": 7, "layer": 5, "head": 11}


def build(mesh: Mesh, parts: tuple[str, ...] = ("embed", "layer", "head"), width: int = 6):
    """Uneven cuts on purpose; `head` holds a copy of the embedding, as a last stage does."""
    model = nn.Module()
    init = Normal(std=1.0)
    for part in parts:
        split = parameter((WIDTHS[part], width), mesh=mesh, init=init, split={"tensor": 0})
        across = parameter((width, WIDTHS[part]), mesh=mesh, init=init, split={"tensor": 1})
        norm = parameter((width,), mesh=mesh, init=Constant(value=1.0), partial=True)
        model.add_module(part, Group(split=split, across=across, norm=norm))
    if "head" in parts and "embed" not in parts:
        model.add_module(
            "embed", Group(split=parameter((7, width), mesh=mesh, init=init, split={"tensor": 0}))
        )
    model.register_buffer("table", torch.arange(3.0))
    model.register_buffer("scratch", torch.arange(4.0), persistent=False)
    traits(model)  # kept before parameters are replaced
    if mesh.data.size > 1:
        fully_shard(model, mesh=mesh.shard_devices())
    return model


def step(model, optimizer) -> None:
    """The gradient is a function of the parameter: every mesh makes the same step."""
    for module in as_modules(model):
        for p in module.parameters():
            p.grad = (p.detach() * 0.3).sin()
    optimizer.step()


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def snapshot(model, optimizer) -> dict[str, Tensor]:
    out = {}
    for module in as_modules(model):
        for name, tensor in module.state_dict().items():
            out[name] = whole(tensor).clone()
        for name, p in module.named_parameters():
            for key, value in optimizer.state[p].items():
                out[f"{name}/{key}"] = whole(value).clone()
    return out


def as_arrays(tensors: dict[str, Tensor]) -> dict[str, np.ndarray]:
    """Pickled by value: a tensor's memory ends with its process."""
    return {name: tensor.detach().numpy() for name, tensor in tensors.items()}


def trained(rank: int, sizes: dict[str, int], seed: int, folder: Path, steps: int):
    mesh = Mesh.create("cpu", **sizes)
    if mesh.pipeline.size == 2:
        parts = (("embed",), ("layer", "head"))[mesh.pipeline.rank]
        model = build(mesh, parts)
    elif "stages" in os.environ.get("SHAPE", ""):
        model = [build(mesh, ("embed",)), build(mesh, ("layer", "head"))]
    else:
        model = build(mesh)
    for module in as_modules(model):
        initialise(module, mesh, seed)
    optimizer = adamw(model, lr=0.1, weight_decay=0.1)
    for _ in range(steps):
        step(model, optimizer)
    return model, optimizer, Checkpoints(str(folder), mesh)


MESHES: list[dict[str, int]] = [
    {},
    {"tensor": 2},
    {"shards": 3},
    {"shards": 2, "tensor": 2},
    {"replicas": 2, "shards": 2},
    {"pipeline": 2, "tensor": 2},
]


READERS: list[dict[str, int]] = [{}, {"pipeline": 2, "shards": 2}]


def world(sizes: dict[str, int]) -> int:
    total = 1
    for size in sizes.values():
        total *= size
    return total


@pytest.mark.parametrize("sizes", MESHES, ids=lambda s: "x".join(s) or "one")
def test_any_plan_writes_and_any_plan_reads(tmp_path: Path, sizes: dict[str, int]):
    def state(model, optimizer) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
        """After the restored step, and after the next: both must be equal."""
        now = as_arrays(snapshot(model, optimizer))
        step(model, optimizer)
        return now, as_arrays(snapshot(model, optimizer))

    def write(rank: int) -> tuple[dict[str, np.ndarray], ...]:
        model, optimizer, checkpoints = trained(rank, sizes, 1, tmp_path, 2)
        checkpoints.save(2, model, optimizer, {"samples": 64}, wait=True)
        return state(model, optimizer)

    def read(rank: int, sizes: dict[str, int]) -> tuple[dict[str, np.ndarray], ...]:
        model, optimizer, checkpoints = trained(rank, sizes, 9, tmp_path, 0)
        assert checkpoints.restore(model, optimizer) == {"samples": 64, "step": 2}
        return state(model, optimizer)

    wanted: tuple[dict[str, np.ndarray], ...] = ({}, {})
    for part in run(world(sizes), write):
        for all_of_them, own in zip(wanted, part, strict=True):
            all_of_them |= own
    assert len(wanted[0]) == 9 * 4 + 1
    readers = [sizes] + [other for other in READERS if other != sizes]
    for other in readers:
        for now, after in run(world(other), read, other):
            for name, value in now.items():
                np.testing.assert_array_equal(value, wanted[0][name], err_msg=name)
            for name, value in after.items():
                # vector instructions round by an element's place in the local tensor
                rtol = 0 if other == sizes else 1e-5
                np.testing.assert_allclose(value, wanted[1][name], rtol=rtol, err_msg=name)


def test_two_stages_of_one_rank_share_a_weight(tmp_path: Path, monkeypatch):
    monkeypatch.setenv("SHAPE", "stages")

    def go(rank: int) -> None:
        model, optimizer, checkpoints = trained(rank, {}, 1, tmp_path, 2)
        checkpoints.save(2, model, optimizer, wait=True)
        wanted = snapshot(model, optimizer)
        other, optimizer, checkpoints = trained(rank, {}, 9, tmp_path, 0)
        checkpoints.restore(other, optimizer)
        for stage, module in enumerate(other):
            assert torch.equal(module.embed.split, wanted["embed.split"]), stage
            moment = optimizer.state[module.embed.split]["exp_avg"]
            assert torch.equal(moment, wanted["embed.split/exp_avg"])

    run(1, go)


def test_training_goes_on_while_a_checkpoint_is_written(tmp_path: Path, monkeypatch):
    def go(rank: int) -> None:
        model, optimizer, checkpoints = trained(rank, {"shards": 2}, 1, tmp_path, 1)
        wanted = snapshot(model, optimizer)
        checkpoints.save(1, model, optimizer)
        step(model, optimizer)
        checkpoints.save(2, model, optimizer)  # waits for the first
        dist.barrier()
        assert (tmp_path / "step_000001").is_dir()
        checkpoints.wait()
        os.rename(tmp_path / "step_000002", tmp_path / "moved") if rank == 0 else None
        dist.barrier()
        assert checkpoints.restore(model, optimizer) == {"step": 1}
        for name, value in snapshot(model, optimizer).items():
            assert torch.equal(value, wanted[name]), name

    run(2, go)


def test_the_newest_are_kept_and_drafts_are_none(tmp_path: Path):
    def go(rank: int) -> None:
        model, optimizer, checkpoints = trained(rank, {}, 1, tmp_path, 1)
        assert checkpoints.restore(model, optimizer) is None and latest(str(tmp_path)) is None
        (tmp_path / "step_000900.tmp").mkdir(parents=True)
        for done in range(1, 6):
            checkpoints.save(done, model, optimizer, wait=True)
        names = sorted(path.name for path in tmp_path.iterdir())
        assert names == ["step_000003", "step_000004", "step_000005"]
        assert latest(str(tmp_path)) == 5

    run(1, go)


def damage_shorter(path: Path) -> None:
    file = next(path.glob("*.distcp"))
    file.write_bytes(file.read_bytes()[:-100])


def damage_bit(path: Path) -> None:
    file = next(path.glob("*.distcp"))
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(bytes(data))


def damage_file_gone(path: Path) -> None:
    next(path.glob("*.distcp")).unlink()


def damage_metadata(path: Path) -> None:
    (path / ".metadata").write_bytes(b"no pickle")


def damage_manifest(path: Path) -> None:
    (path / "manifest.json").write_text('{"step": 2')


def damage_no_manifest(path: Path) -> None:
    (path / "manifest.json").unlink()


DAMAGES = {
    damage_shorter: "__._0.distcp is not as it was written",
    damage_bit: "__._0.distcp is not as it was written",
    damage_file_gone: "__._0.distcp is missing",
    damage_metadata: ".metadata is not as it was written",
    damage_manifest: "manifest.json is not as it was written",
    damage_no_manifest: "manifest.json is missing",
}


def test_damaged_checkpoints_are_refused(tmp_path: Path):
    def go(rank: int) -> None:
        model, optimizer, checkpoints = trained(rank, {"shards": 2}, 1, tmp_path / "all", 1)
        checkpoints.save(1, model, optimizer, wait=True)
        checkpoints.save(2, model, optimizer, wait=True)
        before = snapshot(model, optimizer)
        for number, (damage, words) in enumerate(DAMAGES.items()):
            folder = tmp_path / str(number)
            if rank == 0:
                os.makedirs(folder)
                for name in ("step_000001", "step_000002"):
                    os.system(f"cp -r {tmp_path}/all/{name} {folder}")
                damage(folder / "step_000002")
            dist.barrier()
            with pytest.raises(SystemExit) as raised:
                Checkpoints(str(folder), checkpoints.mesh).restore(model, optimizer)
            if rank == 0:
                assert isinstance(raised.value, UserError)
                words = words.replace("_._", "_X_")
                expected = (
                    f"the checkpoint {folder}/step_000002 is damaged: {words};"
                    f" {folder}/step_000001 is whole: remove the damaged one to go on from there"
                )
                said = str(raised.value).replace("__0_", "__X_").replace("__1_", "__X_")
                assert said == expected
        for name, value in snapshot(model, optimizer).items():
            assert torch.equal(value, before[name]), name

    run(2, go)


def test_checkpoints_of_something_else_are_refused(tmp_path: Path):
    def go(rank: int) -> None:
        model, optimizer, checkpoints = trained(rank, {}, 1, tmp_path, 1)
        checkpoints.save(1, model, optimizer, wait=True)
        path = tmp_path / "step_000001"
        other = build(checkpoints.mesh, width=8)
        initialise(other, checkpoints.mesh, 1)
        with pytest.raises(UserError) as raised:
            checkpoints.restore(other, adamw(other, lr=0.1))
        assert str(raised.value) == (
            f"{path} is of another model: embed.across is [6, 7] there and [8, 7] here;"
            " embed.norm is [6] there and [8] here; embed.split is [7, 6] there and [7, 8] here,"
            " and 6 more differ"
        )
        smaller = build(checkpoints.mesh, ("embed", "layer"))
        initialise(smaller, checkpoints.mesh, 1)
        with pytest.raises(UserError, match=r"head.across is \[6, 11\] there and absent here"):
            checkpoints.restore(smaller)
        with pytest.raises(UserError, match="with the optimizer AdamW, not SGD"):
            checkpoints.restore(model, sgd(model, lr=0.1, momentum=0.9))

    run(1, go)


def test_momentum_and_weights_alone(tmp_path: Path):
    def go(rank: int) -> None:
        mesh = Mesh.create("cpu")
        model = build(mesh)
        initialise(model, mesh, 1)
        optimizer = sgd(model, lr=0.1, momentum=0.9)
        step(model, optimizer)
        checkpoints = Checkpoints(str(tmp_path), mesh)
        checkpoints.save(1, model, optimizer, wait=True)
        other = build(mesh)
        initialise(other, mesh, 2)
        resumed = sgd(other, lr=0.1, momentum=0.9)
        checkpoints.restore(other, resumed)
        for _ in range(2):
            step(model, optimizer)
            step(other, resumed)
        for a, b in zip(model.parameters(), other.parameters(), strict=True):
            assert torch.equal(a, b)
        initialise_again = copy.deepcopy(other)
        checkpoints.restore(initialise_again)
        assert not torch.equal(initialise_again.embed.split, other.embed.split)

    run(1, go)


def test_what_cannot_be_written_says_so(tmp_path: Path, monkeypatch):
    def go(rank: int) -> None:
        model, optimizer, _ = trained(rank, {"shards": 2}, 1, tmp_path, 1)
        mesh = Mesh.create("cpu", shards=2)
        (tmp_path / "file").write_text("")
        checkpoints = Checkpoints(str(tmp_path / "file" / "x"), mesh)
        with pytest.raises(
            UserError, match=r"no checkpoint could be written to .*: Not a directory"
        ):
            checkpoints.save(1, model, optimizer, wait=True)

        def full(*args, **kwargs):
            raise OSError(28, "No space left on device")

        checkpoints = Checkpoints(str(tmp_path / "good"), mesh)
        checkpoints.save(1, model, optimizer, wait=True)
        monkeypatch.setattr(checkpoint.dcp.FileSystemWriter, "write_data", full)
        checkpoints.save(2, model, optimizer)
        with pytest.raises(UserError, match=r"written to .*good: No space left on device"):
            checkpoints.save(3, model, optimizer)
        assert checkpoints.restore(model, optimizer) == {"step": 1}

    run(2, go)


def test_the_manifest_lists_every_file(tmp_path: Path):
    def go(rank: int) -> None:
        model, optimizer, checkpoints = trained(rank, {"shards": 2}, 1, tmp_path, 1)
        checkpoints.save(7, model, optimizer, {"a": [1]}, wait=True)
        dist.barrier()

    run(2, go)
    folder = tmp_path / "step_000007"
    manifest = json.loads((folder / "manifest.json").read_text())
    files = {p.name for p in folder.iterdir()} - {"manifest.json"}
    assert set(manifest["files"]) == files and len(files) == 3
    assert (manifest["step"], manifest["extra"], manifest["optimizer"]) == (7, {"a": [1]}, "AdamW")
