"""The constants that a fit finds are those that the measurements were made with."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from llmspec import dsl
from llmspec.compiler.calibrate import cases, fit
from llmspec.compiler.calibrate.clock import lower_quartile
from llmspec.compiler.calibrate.run import Setting, fitted, machine_and_types, spec_text
from llmspec.compiler.cost.compute import operator_cost
from llmspec.compiler.cost.network import collective_s, group
from llmspec.compiler.cost.step import optimizer_s
from llmspec.compiler.ops.registry import entry_of, shapes_of
from llmspec.compiler.placement import Collective

EFFORT = replace(
    cases.CPU, seconds=0.0, rows=64, widths=(32, 64), model=(2, 64, 4, 96, 128, 32), sequences=2
)
SETTING = Setting(
    name="made", processes=2, effort=EFFORT, gpu=False, dtypes={"fp32": "float32"}, trains="fp32"
)
TRUE = {
    "launch": 5e-6,
    "memory": 8e9,
    "peak": 1e11,
    "link": 1e9,
    "latency": 2e-4,
    "gathered": (3.0, 0.5),
}


def found_of_a_made_up_machine():
    """Each process measures what the cost model says of the machine TRUE."""
    operators = cases.operators(EFFORT, "float32")
    task = cases.task(EFFORT, gpu=False, world=2, dtypes={"fp32": "float32"}, trains="fp32")
    products = []
    for i, case in enumerate(task["products"]):
        flops = 2.0 * case["rows"] * case["columns"] * case["depth"]
        products.append({**case, "seconds": flops / (TRUE["peak"] * (1.0 if i == 0 else 0.8))})
    bare = fit.Rates(
        peaks={"fp32": TRUE["peak"]},
        matmul_efficiency=0.8,
        memory_bytes_per_s=TRUE["memory"],
        launch_s=TRUE["launch"],
    )
    result = {
        "device": {"name": "cpu", "multiprocessors": 1, "threads": 1},
        "products": products,
        "memory": [{"bytes": 2**20, "seconds": 3 * 2**20 / TRUE["memory"]}],
        "launches": [{"count": 100, "seconds": TRUE["launch"]}],
    }
    from llmspec.compiler.calibrate.run import bare as bare_hardware

    hardware = bare_hardware(SETTING, [result], bare)
    hardware = replace(hardware, attention_efficiency=0.3)
    machine, types = machine_and_types(SETTING, hardware)
    silent = replace(machine, launch_s=0.0)
    result["operators"] = []
    for key, one in operators.measured.items():
        cost = operator_cost(one.node, shapes_of(one.node), silent, 4)
        launched = 2 * TRUE["launch"]
        slower = 1.0 if entry_of(one.node).tiled else 2.0
        forward, backward = slower * cost.forward_s, slower * cost.backward_s
        if one.tiny:
            forward = backward = 0.0
        result["operators"].append(
            {"key": key, "forward_s": forward + launched, "backward_s": backward + launched}
        )
    result["updates"] = []
    for case in task["updates"]:
        elements = case["count"] * case["width"] ** 2
        worked = 4 * optimizer_s(elements, types, silent) if case["width"] > 8 else 0.0
        seconds = 40 * TRUE["launch"] + worked
        result["updates"].append({**case, "elements": elements, "seconds": seconds})
    real = replace(
        machine,
        devices_per_node=2,
        link_bytes_per_s=TRUE["link"],
        link_latency_s=TRUE["latency"],
        collectives=(("all_gather", *TRUE["gathered"]),),
    )
    result["collectives"] = [
        {
            **case,
            "seconds": collective_s(Collective(case["kind"]), case["bytes"], group(2, 1, real))
            * (2 if case["kind"] == "send" else 1),
        }
        for case in task["collectives"]
    ]
    result["weights"] = [{"width": 8, "forward_s": 30 * 5e-6, "backward_s": 90 * 5e-6}]
    result["units"] = []
    for case in task["units"]:
        size = 4 * case["width"] ** 2
        gather = collective_s(Collective.ALL_GATHER, size, group(2, 1, real))
        scatter = collective_s(Collective.REDUCE_SCATTER, size, group(2, 1, real))
        copied = 2 * size / TRUE["memory"] if case["width"] > 16 else 0.0
        forward = gather + 20 * TRUE["launch"] + 2 * copied
        backward = gather + scatter + 50 * TRUE["launch"] + 4 * copied
        result["units"].append({**case, "forward_s": forward, "backward_s": backward})
    return fitted(SETTING, [result, result], operators), operators


@pytest.fixture(scope="module")
def found():
    return found_of_a_made_up_machine()[0]


def test_rates(found):
    assert found.peaks == {"fp32": pytest.approx(TRUE["peak"])}
    assert found.matmul_efficiency == pytest.approx(0.8)
    assert found.memory_bytes_per_s == pytest.approx(TRUE["memory"])
    assert found.launch_s == TRUE["launch"]
    assert found.attention_efficiency == pytest.approx(0.3, rel=0.05)


def test_operators(found):
    assert set(found.operators) > {"linear", "rms_norm", "layer_norm", "silu", "attention", "add"}
    for name in ("linear", "rms_norm", "silu", "multiply", "gelu_tanh", "layer_norm"):
        launches, share, back_launches, back_share = found.operators[name]
        assert launches == back_launches == pytest.approx(2.0)
        assert share == pytest.approx(0.5, rel=1e-3), name
        assert back_share == pytest.approx(0.5, rel=1e-3), name
    assert found.operators["update"] == (pytest.approx(40), pytest.approx(0.25))


def test_what_stands_around_weights(found):
    assert found.operators["weight"] == pytest.approx((30, 1, 90, 1))
    assert found.operators["unit"] == pytest.approx((20, 0.5, 50, 0.25), rel=1e-2)


def test_collectives(found):
    assert found.link_bytes_per_s == pytest.approx(TRUE["link"])
    assert found.link_latency_s == pytest.approx(TRUE["latency"])
    assert found.collectives["all_gather"] == (pytest.approx(3.0), pytest.approx(0.5))
    for kind in ("all_reduce", "reduce_scatter", "all_to_all", "send"):
        assert found.collectives[kind] == (pytest.approx(1.0), pytest.approx(1.0)), kind


def test_the_file_predicts_what_was_measured(found):
    """Through text and back: an operator costs what its measurement was made to be."""
    loaded = dsl.load("made.llmspec", text=spec_text(SETTING, found, devices=2))
    device = loaded.cluster.device
    assert (loaded.cluster.name, loaded.cluster.devices_per_node) == ("made", 2)
    assert device.operators["update"] == pytest.approx((40.0, 0.25), rel=1e-3)
    assert dsl.load("again.llmspec", text=dsl.explicit(loaded)).cluster.device == device
    machine, _ = machine_and_types(SETTING, found)
    plain = replace(machine, operators={})
    graph = cases.session("llama", EFFORT.model).graph(2)
    for node in graph.units["layer"].calls():
        if entry_of(node).name == "silu":
            bare = operator_cost(node, shapes_of(node), replace(plain, launch_s=0.0), 4)
            cost = operator_cost(node, shapes_of(node), machine, 4)
            expected = 2 * bare.forward_s + 2 * TRUE["launch"]
            assert cost.forward_s == pytest.approx(expected, rel=2e-3)


def test_line_and_quartile():
    assert fit.line([(b, 3e-4 + b / 1e9) for b in (1e3, 1e5, 1e7)]) == pytest.approx((3e-4, 1e-9))
    assert fit.line([(1e3, 1.0), (1e6, 0.5)])[0] > 0  # noise: never a negative latency
    assert lower_quartile([5.0, 1.0, 2.0, 100.0]) == 2.0


def test_sustained_is_what_computing_alone_lost():
    parts = {"compute": 0.8, "optimizer": 0.1, "data": 0.0}
    assert fit.sustained(parts, 1.1) == pytest.approx(0.8)
    assert fit.sustained(parts, 0.5) == 1.0
    assert math.isfinite(fit.sustained(parts, 0.1))
