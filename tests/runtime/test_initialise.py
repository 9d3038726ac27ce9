import math
from itertools import product

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from llmspec.runtime import initialise as init
from llmspec.runtime.initialise import Constant, Normal, Rows, Uniform, fill
from llmspec.runtime.mesh import Mesh
from llmspec.runtime.parameters import Group, Traits, parameter, traits
from tests.processes import run

INITS = [
    Normal(std=0.02),
    Normal(mean=1.0, std=0.5),
    Uniform(low=-1.0, high=3.0),
    Constant(value=2.5),
    Rows(init=Normal(std=1.0), zero_rows=(0, 4)),
]


def _whole(shape, how, seed, name, dtype=torch.float32):
    out = torch.empty(shape, dtype=dtype)
    fill(out, shape, (0,) * len(shape), how, seed, name)
    return out


@pytest.mark.parametrize("how", INITS, ids=repr)
def test_blocks_are_cut_from_the_whole(how, monkeypatch):
    whole = _whole((6, 5, 4), how, 1, "w")
    monkeypatch.setattr(init, "_CPU_CHUNK", 7)
    assert torch.equal(_whole((6, 5, 4), how, 1, "w"), whole), "chunks leave no trace"
    for a, b, c in product((0, 2), (0, 3), (0, 1)):
        part = torch.empty(6 - a, 5 - b, 4 - c)
        fill(part, (6, 5, 4), (a, b, c), how, 1, "w")
        assert torch.equal(part, whole[a:, b:, c:])


def test_values():
    normal = _whole((300, 200), Normal(mean=1.0, std=0.5), 1, "w")
    assert abs(normal.mean() - 1) < 0.01 and abs(normal.std() - 0.5) < 0.01
    uniform = _whole((300, 200), Uniform(low=-1.0, high=3.0), 1, "w")
    assert -1 <= uniform.min() < -0.99 and 2.99 < uniform.max() < 3
    rows = _whole((6, 3), Rows(init=Constant(value=1.0), zero_rows=(0, 4)), 1, "w")
    assert rows[:, 0].tolist() == [0, 1, 1, 1, 0, 1]
    base = _whole((10,), Normal(std=1.0), 1, "w")
    assert not torch.equal(_whole((10,), Normal(std=1.0), 2, "w"), base)
    assert not torch.equal(_whole((10,), Normal(std=1.0), 1, "v"), base)
    wide = _whole((10,), Normal(std=1.0), 1, "w", torch.float64)
    assert torch.equal(wide.float(), base), "narrower types are roundings of the same numbers"


class _Model(nn.Module):
    def __init__(self, mesh: Mesh):
        super().__init__()
        how = {"mesh": mesh, "init": Normal(std=1.0)}
        self.whole = Group(w=parameter((5, 3), **how))
        self.rows = Group(w=parameter((7, 3), split={"tensor": 0}, **how))
        self.columns = Group(w=parameter((5, 7), split={"tensor": 1}, **how))
        self.tiny = Group(w=parameter((1, 2), **how), b=parameter((3,), split={"tensor": 0}, **how))
        self.tied = Group(w=self.rows.w)
        self.register_buffer("scale", torch.empty(4, device="meta"))
        self.scale.traits = Traits(init=Constant(value=3.0))


def _sharded(rank: int, sizes: dict[str, int], shard: bool) -> None:
    mesh = Mesh.create("cpu", **sizes)
    model = _Model(mesh)
    traits(model)
    if shard:
        fully_shard(model, mesh=mesh.shard_devices())
    init.initialise(model, mesh, seed=9)
    assert model.tied.w is model.rows.w
    assert model.scale.tolist() == [3.0] * 4
    for name, p in model.named_parameters():
        whole = _whole(tuple(p.shape), Normal(std=1.0), 9, name)
        if not isinstance(p, DTensor):
            assert torch.equal(p, whole), name
            continue
        # torch's own idea of which part lies where
        assert torch.equal(p.full_tensor(), whole), (name, p.placements)
        own = whole
        for dim, (start, size) in enumerate(
            zip(init.block_offsets(p), p._local_tensor.shape, strict=True)
        ):
            own = own.narrow(dim, start, size)
        assert torch.equal(p._local_tensor, own), "replicas as well"


@pytest.mark.parametrize(
    ("sizes", "shard"),
    [
        ({}, False),
        ({"tensor": 2}, False),
        ({"tensor": 4}, False),
        ({"shards": 3}, True),
        ({"replicas": 2, "shards": 2}, True),
        ({"shards": 2, "tensor": 2}, True),
        ({"shards": 3, "tensor": 2}, True),
        ({"replicas": 2, "shards": 2, "tensor": 2}, True),
    ],
)
def test_every_mesh_gets_the_same_values(sizes, shard):
    run(math.prod(sizes.values()), _sharded, sizes, shard)


def _without_init(rank: int) -> None:
    model = nn.Linear(2, 2, device="meta")
    with pytest.raises(RuntimeError, match="weight has no values and no way to make them"):
        init.initialise(model, Mesh.create("cpu"), seed=1)


def test_a_parameter_without_an_init_is_refused():
    run(1, _without_init)
