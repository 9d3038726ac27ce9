"""Initialisation read off a tape: distributions of parameters, values of buffers."""

import math

import pytest
import torch
from torch import Tensor, nn

from llmspec.compiler.errors import Unsupported
from llmspec.compiler.graph import Init
from llmspec.compiler.raising.recording import record, recording_of


class Holder(nn.Module):
    """A module with one parameter `p`, made by a function."""

    def __init__(self, make):  # type: ignore[no-untyped-def]
        super().__init__()
        self.p = make()


def init_of(make) -> Init:  # type: ignore[no-untyped-def]
    module = record(lambda: Holder(make))
    return recording_of(module).init("p", module.get_parameter("p"))


def drawn(draw):  # type: ignore[no-untyped-def]
    """A parameter [8, 4] that a function of torch.nn.init fills."""

    def make() -> nn.Parameter:
        p = nn.Parameter(torch.empty(8, 4))
        draw(p)
        return p

    return make


def embedding_with_rows() -> nn.Parameter:
    table = nn.Embedding(8, 4, padding_idx=2)
    with torch.no_grad():
        table.weight[5:7].zero_()
    return table.weight


def scaled() -> nn.Parameter:
    return nn.Parameter(torch.randn(8, 4) * 0.02 + 1)


CASES = {
    "normal": (drawn(lambda p: nn.init.normal_(p, 1.0, 0.5)), Init("normal", 1.0, 0.5)),
    "uniform": (drawn(lambda p: nn.init.uniform_(p, -2.0, 3.0)), Init("uniform", -2.0, 3.0)),
    "ones": (drawn(nn.init.ones_), Init("constant", 1.0)),
    "zeros": (lambda: nn.Parameter(torch.zeros(3)), Init("constant", 0.0)),
    "full": (lambda: nn.Parameter(torch.full((3,), 0.25)), Init("constant", 0.25)),
    "twice": (
        drawn(lambda p: (nn.init.ones_(p), nn.init.normal_(p, std=0.1))),
        Init("normal", 0.0, 0.1),
    ),
    "arithmetic": (scaled, Init("normal", 1.0, 0.02)),
    "copied": (
        drawn(lambda p: p.data.copy_(torch.rand(8, 4) - 0.5)),
        Init("uniform", -0.5, 0.5),
    ),
    "rows": (embedding_with_rows, Init("normal", 0.0, 1.0, (2, 5, 6))),
    "whole normal": (
        drawn(lambda p: nn.init.trunc_normal_(p, std=0.02)),
        Init("normal", 0.0, 0.02),
    ),
    "xavier": (drawn(nn.init.xavier_normal_), Init("normal", 0.0, math.sqrt(2 / 12))),
}


@pytest.mark.parametrize("name", CASES)
def test_distributions(name: str) -> None:
    make, wanted = CASES[name]
    found = init_of(make)
    assert (found.kind, found.zero_rows) == (wanted.kind, wanted.zero_rows)
    assert (found.a, found.b) == pytest.approx((wanted.a, wanted.b))


def test_kaiming_reduces_to_bounds() -> None:
    found = init_of(lambda: nn.Linear(16, 8).weight)
    assert (found.kind, found.a, found.b) == ("uniform", pytest.approx(-0.25), pytest.approx(0.25))


REFUSED = {
    "data": (lambda: nn.Parameter(torch.arange(4.0)), "computed from data"),
    "empty": (lambda: nn.Parameter(torch.empty(4)), "never initialised"),
    "truncated": (drawn(lambda p: nn.init.trunc_normal_(p, std=1.5)), "truncated"),
    "a corner": (drawn(lambda p: (nn.init.zeros_(p), p.data[:2, :2].fill_(1))), "from data"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_drawn_again(name: str) -> None:
    make, why = REFUSED[name]
    with pytest.raises(Unsupported, match=rf"parameter `p` .*{why}"):
        init_of(make)


class Buffers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.register_buffer("mask", torch.tril(torch.ones(5, 5)).view(1, 5, 5))
        table = torch.zeros(6, 4)
        table[:, 0::2] = torch.arange(6.0)[:, None].sin()
        table[:, 1::2] = torch.arange(6.0)[:, None].cos()
        self.register_buffer("table", table)
        self.plain = torch.linspace(0, 1, 3)
        self.register_buffer("noise", torch.randn(3))


def value_of(name: str) -> Tensor:
    module = record(Buffers)
    return recording_of(module).value(name, getattr(module, name))


def test_buffers_are_computed_again_in_float64() -> None:
    assert torch.equal(value_of("mask"), torch.ones(5, 5, dtype=torch.float64).tril()[None])
    steps = torch.arange(6, dtype=torch.float64)
    wanted = torch.stack([steps.sin(), steps.cos()], 1).repeat(1, 2)
    assert torch.equal(value_of("table"), wanted)
    assert torch.equal(value_of("plain"), torch.linspace(0, 1, 3, dtype=torch.float64))


def test_random_buffers_are_refused() -> None:
    with pytest.raises(Unsupported, match="buffer `noise` holds random numbers"):
        value_of("noise")


def test_equal_buffers_have_equal_signatures() -> None:
    first, second = record(Buffers), record(Buffers)
    signs = [recording_of(m).signature(m.get_buffer("table")) for m in (first, second)]
    assert signs[0] == signs[1]
    assert signs[0] != recording_of(first).signature(first.get_buffer("mask"))


class Counted(nn.Module):
    """Reads a number back, as stochastic depth does."""

    def __init__(self, start: float = 0.0) -> None:
        super().__init__()
        share = [x.item() for x in torch.linspace(start, 0.5, 3)]
        self.weight = nn.Parameter(torch.full((2,), share[1]))


def test_numbers_that_are_read_back() -> None:
    module = record(Counted)
    init = recording_of(module).init("weight", module.get_parameter("weight"))
    assert init == Init("constant", 0.25)
    with pytest.raises(Unsupported, match="random numbers"):
        record(lambda: nn.Parameter(torch.full((2,), torch.rand(1).item())))  # type: ignore[arg-type, return-value]


def test_recording_takes_no_memory() -> None:
    module = record(lambda: nn.Linear(100_000, 1_000_000))
    assert module.get_parameter("weight").shape == (1_000_000, 100_000)
