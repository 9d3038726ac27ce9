import torch
from torch.distributed.tensor import DTensor

from llmspec.runtime.mesh import Mesh
from llmspec.runtime.parameters import Group, local, parameter, traits
from tests.processes import run


def _shapes(rank: int):
    mesh = Mesh.create("cpu", tensor=2)
    whole = parameter((3, 4), mesh=mesh, init=None, partial=True)
    rows = parameter((5, 4), mesh=mesh, init=None, split={"tensor": 0}, decay=False)
    columns = parameter((5, 4), mesh=mesh, init=None, split={"tensor": 1})
    for p, shape in ((whole, (3, 4)), (rows, (5, 4)), (columns, (5, 4))):
        assert isinstance(p, DTensor) and p.is_meta and tuple(p.shape) == shape
        assert p.stride() == (4, 1)
    model = Group(a=Group(w=whole), b=Group(w=rows, tied=whole), c=columns)
    model.to_empty(device="cpu")
    found = traits(model)
    return [tuple(local(p).shape) for p in (whole, rows, columns)], sorted(found)


def test_local_shapes_follow_torch_chunk():
    (first, names), (second, _) = run(2, _shapes)
    assert first == [(3, 4), (3, 4), (5, 2)]
    assert second == [(3, 4), (2, 4), (5, 2)]
    assert names == []  # to_empty drops attributes of DTensors: hence `traits` before it


def _survive(rank: int):
    mesh = Mesh.create("cpu", tensor=2)
    p = parameter((4, 4), mesh=mesh, init="zeros", partial=True, decay=False)
    model = Group(a=Group(w=p), b=Group(w=p))
    before = traits(model)
    model.to_empty(device="cpu")
    assert traits(model) == before
    assert set(before) == {"a.w", "b.w"} and before["a.w"].partial and not before["a.w"].decay
    local(model.a.w, torch.bfloat16).sum().backward()
    gradient = model.a.w.grad
    assert isinstance(gradient, DTensor) and gradient.dtype == torch.float32
    assert gradient._local_tensor.eq(1).all(), "no sum over tensor ranks happens by itself"


def test_traits_survive_new_parameter_objects():
    run(2, _survive)
