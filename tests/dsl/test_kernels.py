"""`kernels NAME { … }`: read, written again, and refused with words that help."""

from __future__ import annotations

import pytest

from llmspec.dsl import SpecError, explicit, format_text
from llmspec.dsl.tuned import TunedKernel, TunedPass
from tests.dsl.specs import MODEL, TRAIN, program

PASS = "{ tile: [2, 1024], warps: 4, rate: 3.9 TB/s }"
WHOLE = "{ tile: [1, 4096], warps: 8, stages: 2, rate: 3 TB/s, by_rule: 2.5 TB/s, eager: 900 GB/s }"
KERNELS = f"""
    silu_gate = {{ columns: 14336, bytes: 2, forward: {PASS}, backward: {WHOLE} }}
    rmsnorm = [
        {{ columns: 4096, bytes: 2, structure: "1f3c", use: eager, forward: {WHOLE} }},
        {{ columns: 128, bytes: 2, forward: {PASS} }},
    ]
"""


def tuned(body: str, named: str = "lab"):
    text = f"kernels lab {{\n{body}\n}}\n"
    text += f"cluster pod {{ node = 2 * cpu; kernels = {named} }}\n"
    return program(MODEL + text + TRAIN)


def one(record: str):
    return tuned(f"rmsnorm = {record}")


def test_what_is_read() -> None:
    found = tuned(KERNELS).cluster.kernels
    fast = TunedPass(rows=2, columns=1024, warps=4, rate=3.9e12)
    whole = TunedPass(
        rows=1, columns=4096, warps=8, stages=2, rate=3e12, by_rule=2.5e12, eager=9e11
    )
    assert found.name == "lab" and found.kernels == (
        TunedKernel(name="silu_gate", columns=14336, width=2, forward=fast, backward=whole),
        TunedKernel(
            name="rmsnorm", columns=4096, width=2, structure="1f3c", fused=False, forward=whole
        ),
        TunedKernel(name="rmsnorm", columns=128, width=2, forward=fast),
    )


def test_written_out_it_reads_the_same() -> None:
    first = tuned(KERNELS)
    text = explicit(first)
    assert program(text).cluster.kernels == first.cluster.kernels
    assert format_text(text) == text


RECORD = f"columns: 64, bytes: 2, forward: {PASS}"


@pytest.mark.parametrize(
    ("record", "code", "words"),
    [
        ("3", "E0302", "`rmsnorm` is not a record"),
        (f"{{ bytes: 2, forward: {PASS} }}", "E0503", "needs `columns`"),
        (f"{{ {RECORD}, size: 3 }}", "E0502", "`size` is not a key"),
        (f"{{ {RECORD}, bytes: 4 }}", "E0217", "`bytes` is given twice"),
        (f"{{ {RECORD}, use: cuda }}", "E0504", "`triton` or `eager`"),
        (f"{{ {RECORD}, structure: 3 }}", "E0206", "as `llmspec tune` writes it"),
        (f"[{{ {RECORD} }}, {{ {RECORD} }}]", "E0217", "64 columns is given twice"),
        (f"{{ {RECORD.replace('[2, 1024]', '[2, 1000]')} }}", "E0303", "power of two"),
        (f"{{ {RECORD.replace('[2, 1024]', '[512, 1024]')} }}", "E0303", "262144 numbers"),
        (f"{{ {RECORD.replace('[2, 1024]', '2048')} }}", "E0302", "rows and columns"),
        (f"{{ {RECORD.replace('warps: 4', 'warps: 64')} }}", "E0303", "at most 32"),
        (f"{{ {RECORD.replace('3.9 TB/s', '3.9 TB')} }}", "E0302", "rate"),
        (f"{{ {RECORD.replace('3.9 TB/s', '0 TB/s')} }}", "E0303", "more than 0"),
    ],
)
def test_faults(record: str, code: str, words: str) -> None:
    with pytest.raises(SpecError, match=words) as error:
        one(record)
    assert error.value.diagnostics[0].code == code


def test_a_cluster_names_kernels_that_are_there() -> None:
    with pytest.raises(SpecError, match="no kernels named `labs`") as error:
        tuned(KERNELS, named="labs")
    assert error.value.diagnostics[0].code == "E0201"
    with pytest.raises(SpecError, match="a list of `name"):
        tuned("rmsnorm <= 3")


def test_kernels_that_nothing_names_are_checked() -> None:
    with pytest.raises(SpecError, match="not a record"):
        program(MODEL + TRAIN + "cluster pod { node = cpu }\nkernels lab { rmsnorm = 3 }\n")
