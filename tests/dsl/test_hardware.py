from __future__ import annotations

import pytest

from llmspec.dsl import SpecError, cluster_from_words
from llmspec.dsl.hardware import CONSTANTS, HARDWARE, catalogue, device_names, normal
from llmspec.dsl.layout import lay_out
from llmspec.dsl.program import DeviceKind
from tests.dsl.specs import MODEL, TRAIN, program

GPUS = [name for name in device_names() if name != "cpu"]


def test_the_catalogue_is_whole():
    assert len(GPUS) == 32
    vendors = {"v100", "a100", "h100", "h200", "b200", "gb200", "mi300x", "tpuv5p", "t4", "l4"}
    assert vendors <= {name.split("-")[0] for name in GPUS}


@pytest.mark.parametrize("name", GPUS)
def test_every_device_loads(name):
    device = cluster_from_words(f"8x{name}").device
    assert device.name == name
    assert device.memory_bytes >= device.usable_bytes > 0.9 * device.memory_bytes
    assert device.peak_flops
    assert set(CONSTANTS.values()) <= set(device.constants)
    assert all(0 < v <= 1 for k, v in device.constants.items() if k.endswith("efficiency"))


@pytest.mark.parametrize(
    ("words", "name", "devices", "nodes"),
    [
        ("8xH100", "h100-80-sxm5", 8, 1),
        ("H100-SXM", "h100-80-sxm5", 1, 1),
        ("h100 sxm5", "h100-80-sxm5", 1, 1),
        ("4x8xA100-40GB", "a100-40-sxm4", 8, 4),
        ("8 x A100-80GB", "a100-80-sxm4", 8, 1),
        ("2xRTX_4090", "rtx4090-24", 2, 1),
        ("2xcpu", "cpu", 2, 1),
    ],
)
def test_names_that_people_use(words, name, devices, nodes):
    cluster = cluster_from_words(words)
    assert (cluster.device.name, cluster.devices_per_node, cluster.nodes) == (name, devices, nodes)


@pytest.mark.parametrize("words", ["A100", "8xV100", "A100-SXM"])
def test_ambiguous_names_list_the_choices(words):
    with pytest.raises(SpecError) as error:
        cluster_from_words(words)
    (diagnostic,) = error.value.diagnostics
    assert diagnostic.code == "E0305"
    assert diagnostic.helps[0].count("`") >= 4


@pytest.mark.parametrize("words", ["", "8x", "0xH100", "8xH999", "99999999xH100", "8xx"])
def test_nonsense_is_refused(words):
    with pytest.raises(SpecError):
        cluster_from_words(words)


def test_an_id_is_never_ambiguous():
    for name in GPUS:
        ids = [device for device, _ in catalogue()[normal(name)] if normal(device) == normal(name)]
        assert ids == [name]


def test_every_value_has_its_source():
    for path in HARDWARE.glob("*.llmspec"):
        layout, _ = lay_out(path.name, path.read_text(encoding="utf-8"))
        lines = layout.text.split("\n")
        for number, line in enumerate(lines):
            if " = " in line and not line.lstrip().startswith("#"):
                above = lines[number - 1].lstrip()
                assert "#" in line or above.startswith("#"), f"{path.name}: {line}"


def test_h100_as_published():
    device = cluster_from_words("H100").device
    assert device.peak_flops["bf16"] == 989e12
    assert device.memory_bytes == 80 * 2**30
    assert device.memory_bytes_per_s == 3.35e12
    assert device.link_bytes_per_s == 450e9
    assert device.kind == DeviceKind.GPU


def test_a_spec_may_bring_its_own():
    text = (
        MODEL
        + TRAIN
        + (
            'gpu "mine" { memory = 10 GiB at 1 TB/s; peak = { fp32: 1 TFLOP/s }; also = ["card"]\n'
            "             launch = 7 us; price = 2.5 per hour }\n"
            'cluster pod { node = 2 * gpu("Card"); nodes = 3; network = 80 Gb/s per node }\n'
        )
    )
    cluster = program(text).cluster
    assert cluster.world_size == 6
    assert cluster.network_bytes_per_s == 5e9
    assert cluster.device.constants["launch_s"] == 7e-6
    assert cluster.device.price_per_hour == 2.5
    assert program(text).train.precision.name == "fp32"


def test_the_cpu_may_be_replaced():
    own = "cpu { memory = 30 GiB at 20 GB/s; peak = { fp32: 100 GFLOP/s } }\n"
    text = MODEL + TRAIN + "cluster pod { node = 2 * cpu }\n"
    assert program(text).cluster.device.memory_bytes == 12 * 2**30
    assert program(text + own).cluster.device.memory_bytes == 30 * 2**30


CPU = 'cpu "mine" {{ memory = 8 GiB at 10 GB/s; peak = {{ fp32: 100 GFLOP/s }}; {more} }}\n'


def of_mine(more: str):
    clusters = CPU.format(more=more) + 'cluster pod { node = 2 * cpu("mine") }\n'
    return program(MODEL + clusters + TRAIN).cluster.device


def test_tables_of_what_was_measured():
    device = of_mine(
        "operators = { silu: [1.5, 0.5, 2, 0.25], update: [40, 0.5] }; sustained = 0.9; "
        "collectives = { all_gather: [2, 0.4] }; host_link_efficiency = 1.0"
    )
    assert device.operators == {"silu": (1.5, 0.5, 2.0, 0.25), "update": (40.0, 0.5)}
    assert device.collectives == {"all_gather": (2.0, 0.4)}
    assert device.constants["sustained"] == 0.9
    assert of_mine("").operators == {} and "sustained" not in of_mine("").constants


@pytest.mark.parametrize(
    ("more", "code", "words"),
    [
        ("operators = 3", "E0302", "`operators` gives numbers to names"),
        ("operators = { silu: [1, 2, 3] }", "E0302", "has 2 or 4 numbers"),
        ("collectives = { send: 1 }", "E0302", "`send` of `collectives` has 2 numbers"),
        ("operators = { silu: [1, 0] }", "E0303", "numbers above 0"),
        ("operators = { silu: [1, fast] }", "E0303", "numbers above 0"),
        ("operators = { silu: [1, 1], silu: [1, 2] }", "E0217", "`silu` is given twice"),
        ("sustained = 2", "E0303", "at most 1"),
    ],
)
def test_faults_of_tables(more, code, words):
    with pytest.raises(SpecError, match=words) as error:
        of_mine(more)
    assert error.value.diagnostics[0].code == code
