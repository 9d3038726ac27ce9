from __future__ import annotations

import json
import subprocess
import sys

import pytest

from llmspec import dsl
from llmspec.dsl import check
from llmspec.dsl.checker import check_text
from llmspec.dsl.diagnostics.render import render_human, render_json, render_line
from tests.dsl.specs import MODEL, SPEC

TIMED = """
import sys, time
start = time.perf_counter()
from llmspec.dsl import load
load("spec.llmspec", text=sys.stdin.read())
print(time.perf_counter() - start, "torch" in sys.modules, "numpy" in sys.modules)
"""


def test_loading_is_quick_and_light():
    text = "import llama\n" + SPEC.replace("model = tiny", "model = llama3_8b")
    out = [
        subprocess.run(
            [sys.executable, "-c", TIMED], input=text, capture_output=True, text=True, check=True
        ).stdout.split()
        for _ in range(3)
    ]
    assert {tuple(line[1:]) for line in out} == {("False", "False")}
    # 0.3 s on an idle machine; the bound leaves room for a busy one
    assert min(float(line[0]) for line in out) < 1.0


def test_check_raises_nothing():
    assert check("nowhere/at/all.llmspec")[0].code == "E0006"
    assert check("spec.llmspec", text=SPEC) == ()
    both = MODEL + "train a { seed = x }\ntrain b { seed = y }\n"
    assert [d.code for d in check("spec.llmspec", text=both)].count("E0201") == 2


def test_the_three_renderers():
    _, sources = check_text("spec.llmspec", SPEC.replace("heads=8", "heads=7"), None)
    (diagnostic,) = sources.diagnostics
    assert render_human([diagnostic], sources.texts) == (
        "error[E0203]: 7 heads do not divide a width of 64\n"
        "  --> spec.llmspec:4:39\n"
        "   |\n"
        " 4 |         x = x + attention(rmsnorm(x), heads=7, kv_heads=4, causal)\n"
        "   |                                       ^^^^^^^ 64 / 7 = 9.14…\n"
        "   |\n"
        "   = help: 8 heads give a head size of 8\n"
    )
    assert render_line(diagnostic) == (
        "spec.llmspec:4:39: error[E0203]: 7 heads do not divide a width of 64 (64 / 7 = 9.14…)"
    )
    (found,) = json.loads(render_json([diagnostic]))["diagnostics"]
    assert found["code"] == "E0203"
    assert found["span"] == {
        "path": "spec.llmspec",
        "line": 4,
        "column": 39,
        "end_line": 4,
        "end_column": 46,
    }


def test_long_lines_are_cut_around_the_fault():
    text = SPEC.replace("heads=8", "heads=7" + " " * 3000)
    _, sources = check_text("spec.llmspec", text, None)
    shown = render_human(sources.diagnostics, sources.texts)
    assert max(map(len, shown.split("\n"))) < 250
    assert "^^^^^^^" in shown


def test_reading_and_formatting(tmp_path):
    path = tmp_path / "spec.llmspec"
    path.write_text("budget{memory=1 GiB per gpu}")
    text = dsl.read_source(path)
    assert dsl.format_text(text, path=str(path)) == "budget { memory = 1 GiB per gpu }\n"
    with pytest.raises(dsl.SpecError, match="E0102"):
        dsl.format_text("budget {")
    with pytest.raises(dsl.SpecError, match="E0006"):
        dsl.read_source(tmp_path / "nothing")


def test_explain():
    page = dsl.explain("e0203")
    assert page is not None and page.startswith("# E0203")
    assert dsl.explain("E9999") is None
    assert dsl.nearest_codes("E0204x")
