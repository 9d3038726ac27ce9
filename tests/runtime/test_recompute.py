"""Values computed again: equal gradients, and live bytes as promised."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch.multiprocessing.reductions import StorageWeakRef

from llmspec.compiler.dryrun.live import LiveBytes
from llmspec.runtime.attention import attention, explicit_attention
from llmspec.runtime.norms import layer_norm, rms_norm
from llmspec.runtime.random import dropout
from llmspec.runtime.recompute import EVERYTHING, again, recomputed

B, T, D, FF, H = 2, 16, 32, 64, 4
NAMES = ("normed", "q", "mixed", "dropped", "normed_2", "up", "hidden")


def weights():
    torch.manual_seed(0)
    shapes = {"n1": (D,), "n2": (D,), "b2": (D,), "qkv": (3 * D, D), "o": (D, D)}
    shapes |= {"up": (FF, D), "down": (D, FF)}
    made = {n: torch.randn(s, dtype=torch.float64) / s[-1] ** 0.5 for n, s in shapes.items()}
    return {n: w.requires_grad_() for n, w in made.items()}


class Block:
    def __init__(self, w, attend=attention):
        self.w, self.attend = w, attend
        self.ran = []

    def _f(self, name, function):
        def counted(*args, **options):
            self.ran.append(name)
            return function(*args, **options)

        return counted

    def run(self, x):
        w = self.w
        normed = again("normed", self._f("normed", rms_norm), x, w["n1"], eps=1e-5)
        stacked = again("q", self._f("q", F.linear), normed, w["qkv"]).unflatten(-1, (3, H, -1))
        q, k, v = (stacked.select(-3, i) for i in range(3))
        mixed = again("mixed", self._f("mixed", self.attend), q, k, v, causal=True).flatten(-2)
        out = F.linear(mixed, w["o"])
        samples = torch.arange(B)
        where = {"operator": 3, "seed": 1, "start": (0, 0), "shape": (T, D), "training": True}
        x = x + again("dropped", self._f("dropped", dropout), out, 0.3, samples, **where)
        normed = again("normed_2", self._f("normed_2", layer_norm), x, w["n2"], w["b2"], eps=1e-5)
        up = again("up", self._f("up", F.linear), normed, w["up"])
        hidden = again("hidden", self._f("hidden", F.gelu), up)
        return x + F.linear(hidden, w["down"])


def gradients(dropped, attend=attention, blocks=2):
    w = weights()
    x = torch.randn(B, T, D, dtype=torch.float64, requires_grad=True)
    block = Block(w, attend)
    y = x
    for _ in range(blocks):
        y = recomputed(block.run, dropped, y)
    forward = len(block.ran)
    y.square().sum().backward()
    return {n: v.grad for n, v in (w | {"x": x}).items()}, block.ran[forward:]


@pytest.mark.parametrize("attend", [attention, explicit_attention])
def test_every_combination_has_the_same_gradients(attend):
    expected, _ = gradients((), attend)
    few = [c for n in (1, 2, len(NAMES)) for c in itertools.combinations(NAMES, n)]
    for dropped in (*few, EVERYTHING):
        found, _ = gradients(dropped, attend)
        for name, value in expected.items():
            assert torch.equal(found[name], value), (dropped, name)


def test_each_is_computed_again_once():
    for dropped in itertools.combinations(NAMES, 3):
        _, ran = gradients(dropped, blocks=1)
        assert sorted(ran) == sorted(dropped)


def test_a_value_that_nobody_asks_for_is_not_computed_again():
    w = torch.randn(4, 4, requires_grad=True)
    calls = []

    def double(x):
        calls.append(1)
        return 2 * x

    recomputed(lambda x: again("y", double, x) + 1, {"y"}, w).sum().backward()
    assert len(calls) == 1


def test_nothing_is_dropped_without_gradients():
    with torch.no_grad():
        out = recomputed(lambda x: again("y", F.gelu, x), {"y"}, torch.ones(3))
    assert out.shape == (3,)


def test_a_graph_that_is_walked_twice_computes_again_once():
    w = weights()
    x = torch.randn(B, T, D, dtype=torch.float64, requires_grad=True)
    block = Block(w)
    y = recomputed(block.run, {"normed", "hidden"}, x).square().sum()
    forward = len(block.ran)
    (one,) = torch.autograd.grad(y, x, retain_graph=True)
    (two,) = torch.autograd.grad(y, w["up"])
    assert sorted(block.ran[forward:]) == ["hidden", "normed"]
    expected, _ = gradients(())
    assert one.shape == x.shape and two.shape == expected["up"].shape


def kept_bytes(run, dropped, *inputs):
    """Bytes alive after the forward, and in the end, beyond what was there; inputs and gradients
    apart."""
    with LiveBytes(inputs) as live:
        before = live.now
        out = recomputed(run, dropped, *inputs)
        kept = live.now - before
        gradients = torch.autograd.grad(out.sum(), inputs)
        del out
        left = live.now - before - sum(g.nbytes for g in gradients)
    return kept, left


def test_bytes_are_dropped():
    x = torch.randn(8, 64, 64, requires_grad=True)
    w = torch.randn(256, 64, requires_grad=True)
    d = torch.randn(64, 256, requires_grad=True)
    n = torch.randn(64, requires_grad=True)

    def run(x, w, d, n):
        normed = again("normed", rms_norm, x, n, 1e-5)
        up = F.linear(normed, w)
        hidden = again("hidden", F.gelu, up)
        return F.linear(hidden, d)

    value, wide = x.nbytes, 4 * x.nbytes
    none, left = kept_bytes(run, (), x, w, d, n)
    some, left_1 = kept_bytes(run, {"hidden"}, x, w, d, n)
    more, left_2 = kept_bytes(run, {"hidden", "normed"}, x, w, d, n)
    assert none == 2 * wide + value + value + 4 * 8 * 64  # up, hidden, normed, the result, scales
    assert none - some == wide
    assert some - more == value + 4 * 8 * 64
    assert left == left_1 == left_2


def test_a_value_goes_as_its_last_reader_has_run():
    w = weights()
    made, there = [], []

    def gelu(x):
        out = F.gelu(x)
        made.append(StorageWeakRef(out.untyped_storage()))
        return out

    def run(x):
        up = F.linear(x, w["up"])
        up.register_hook(lambda gradient: there.append(not made[-1].expired()))
        return F.linear(again("hidden", gelu, up), w["down"])

    x = torch.randn(B, T, D, dtype=torch.float64, requires_grad=True)
    recomputed(run, {"hidden"}, x).sum().backward()
    assert len(made) == 2 and there == [False]


def test_explicit_attention_drops_its_square():
    q, k, v = (torch.randn(2, 64, 4, 8, requires_grad=True) for _ in range(3))

    def run(q, k, v):
        return again("mixed", explicit_attention, q, k, v, causal=True)

    kept_bytes(run, (), q, k, v)  # makes the mask, which stays for the next
    everything, _ = kept_bytes(run, (), q, k, v)
    out = q.nbytes
    square = 4 * 2 * 4 * 64 * 64
    assert everything == square + 4 * out  # scaled q, k, v, the result
    assert kept_bytes(run, {"mixed"}, q, k, v)[0] == out
