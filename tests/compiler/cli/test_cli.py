"""Every verb: what it prints, what it writes, how it exits."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from llmspec.compiler.cli.main import main
from tests.conftest import Golden

SPEC = """import llama

model m = llama(layers=2, width=64, heads=4, kv_heads=2, ffn=128, vocab=256, context=32)

cluster c { node = 2 * cpu }

train t {
    model     = m
    cluster   = c
    dataset   = synthetic()
    batch     = 8 sequences
    steps     = 3
    precision = fp32
}
"""

PYTHON = """
from torch import nn


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(64, 16)
        self.head = nn.Linear(16, 64)

    def forward(self, ids):
        return self.head(self.embed(ids))
"""


class Ran:
    def __init__(self, code: int, out: str, err: str):
        self.code, self.out, self.err = code, out, err

    def data(self) -> dict:
        return json.loads(self.out)


@pytest.fixture
def llmspec(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]):
    """Runs the command line in a folder that holds spec.llmspec."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    (tmp_path / "spec.llmspec").write_text(SPEC)

    def run(*arguments: str) -> Ran:
        capfd.readouterr()
        with pytest.raises(SystemExit) as ended:
            main(arguments)
        captured = capfd.readouterr()
        code = ended.value.code
        return Ran(0 if code is None else int(code), captured.out, captured.err)

    return run


def decisions(ran: Ran) -> dict:
    """The plan's keys; its hash depends on the spec's text too."""
    return {k: v for k, v in ran.data()["plan"].items() if k != "hash"}


def test_new_check_and_format(llmspec, tmp_path: Path) -> None:
    assert llmspec("new", "mine.llmspec").code == 0
    assert llmspec("check", "mine.llmspec").code == 0
    assert llmspec("fmt", "--check", "mine.llmspec").code == 0
    assert llmspec("new", "mine.llmspec").code == 2
    path = tmp_path / "mine.llmspec"
    path.write_text(path.read_text().replace("steps     = 250", "steps=250"))
    assert llmspec("fmt", "--check", "mine.llmspec").code == 3
    assert llmspec("fmt", "mine.llmspec").code == 0
    assert "steps     = 250" in path.read_text()


def test_check_as_data(llmspec, tmp_path: Path) -> None:
    (tmp_path / "bad.llmspec").write_text(SPEC.replace("heads=4", "heads=5"))
    ran = llmspec("check", "bad.llmspec", "--json")
    assert ran.code == 1
    assert [d["code"] for d in ran.data()["diagnostics"]] == ["E0203"]
    assert ran.err == ""


def test_explain(llmspec) -> None:
    assert "heads" in llmspec("explain", "e0203").out
    missing = llmspec("explain", "E9999")
    assert missing.code == 2 and "no error `E9999`" in missing.err


def test_plan_prints_saves_and_compares(llmspec, tmp_path: Path) -> None:
    ran = llmspec("plan", "spec.llmspec", "--save", "plan.json")
    assert ran.code == 0 and ran.out.startswith("Plan ") and "predicted" in ran.out
    assert "Searched" in ran.err
    assert llmspec("plan", "spec.llmspec", "--check", "plan.json").code == 0
    (tmp_path / "other.llmspec").write_text(SPEC + "plan { tensor = 2 }\n")
    changed = llmspec("plan", "other.llmspec", "--check", "plan.json")
    assert changed.code == 3 and "tensor" in changed.out


def test_plan_as_data(llmspec) -> None:
    data = llmspec("plan", "spec.llmspec", "--json").data()
    assert data["schema"] == 1 and data["infeasible"] is None
    predicted = data["predicted"]
    assert sum(predicted["memory_bytes"].values()) == predicted["peak_memory_bytes"]
    assert sum(predicted["time_s"].values()) == pytest.approx(predicted["step_time_s"], rel=1e-6)


def test_printed_plan_can_be_pasted_back(llmspec, tmp_path: Path) -> None:
    text = llmspec("plan", "spec.llmspec").out
    block = text[text.index("plan {") : text.index("}") + 1]
    (tmp_path / "pinned.llmspec").write_text(SPEC + block + "\n")
    assert decisions(llmspec("plan", "pinned.llmspec", "--json")) == decisions(
        llmspec("plan", "spec.llmspec", "--json")
    )


def test_explicit_spec_is_the_same_spec(llmspec, tmp_path: Path) -> None:
    (tmp_path / "all.llmspec").write_text(llmspec("plan", "spec.llmspec", "--explicit").out)
    assert decisions(llmspec("plan", "all.llmspec", "--json")) == decisions(
        llmspec("plan", "spec.llmspec", "--json")
    )


def test_compile_a_spec_and_its_plan(llmspec, tmp_path: Path) -> None:
    assert llmspec("compile", "spec.llmspec").code == 0
    emitted = tmp_path / "build" / "t"
    assert {"model.py", "train.py", "plan.json", "launch.sh"} <= {p.name for p in emitted.iterdir()}
    again = llmspec("compile", str(emitted / "plan.json"), "-o", "again")
    assert again.code == 0
    for name in ("model.py", "train.py", "plan.json"):
        assert (emitted / name).read_bytes() == (tmp_path / "again" / name).read_bytes()


def test_stale_plan(llmspec, tmp_path: Path, golden: Golden) -> None:
    llmspec("plan", "spec.llmspec", "--save", "plan.json")
    (tmp_path / "spec.llmspec").write_text(SPEC.replace("steps     = 3", "steps     = 4"))
    ran = llmspec("compile", "plan.json")
    assert ran.code == 1 and "error[E0802]: plan `plan.json` is stale" in ran.err


@pytest.mark.parametrize("text", ["", "{}", "[1]", '{"schema": 9}', "not json", '{"schema": 1}'])
def test_not_a_plan(llmspec, tmp_path: Path, text: str) -> None:
    (tmp_path / "plan.json").write_text(text)
    ran = llmspec("compile", "plan.json")
    assert ran.code == 1 and ran.err.startswith("error[E0801]: `plan.json` cannot be read")


def test_diff(llmspec, tmp_path: Path) -> None:
    llmspec("plan", "spec.llmspec", "--save", "plan.json")
    same = llmspec("diff", "plan.json", "spec.llmspec")
    assert same.code == 0 and "no changes" in same.out
    # saved plans stand for themselves: their spec may be gone
    (tmp_path / "other.llmspec").write_text(SPEC + "plan { microbatch = 1; data = 2 }\n")
    other = llmspec("diff", "plan.json", "other.llmspec", "--json")
    assert other.code == 3
    changed = {one["key"]: one for one in other.data()["decisions"]}
    assert changed["microbatch"]["after"] == "1"
    assert llmspec("diff", "plan.json", "nowhere.json").code == 1


def test_simulate(llmspec, tmp_path: Path) -> None:
    llmspec("plan", "spec.llmspec", "--save", "plan.json")
    ran = llmspec("simulate", "plan.json", "--json")
    data = ran.data()
    assert ran.code == 0 and (tmp_path / data["trace"]).name == "trace.json"
    predicted = json.loads((tmp_path / "plan.json").read_text())["predicted"]["predicted"]
    assert data["step_time_s"] == pytest.approx(predicted["step_time_s"], rel=1e-8)
    trace = json.loads((tmp_path / data["trace"]).read_text())
    assert trace["traceEvents"] and trace["otherData"]["plan"] == data["plan"]
    assert llmspec("simulate", "plan.json", "-o", "nowhere/step.json").code == 2


def test_verify(llmspec) -> None:
    ran = llmspec("verify", "spec.llmspec", "--json")
    assert ran.code == 0 and ran.data()["ok"] is True and ran.data()["compared"] > 20


def test_train(llmspec, tmp_path: Path) -> None:
    ran = llmspec("train", "spec.llmspec", "--json")
    data = ran.data()
    assert ran.code == 0 and data["exit_status"] == 0
    assert (tmp_path / data["checkpoint"]).is_dir() and "step 3/3" in ran.err


def test_python_model_needs_trust(llmspec, tmp_path: Path, golden: Golden) -> None:
    (tmp_path / "mine.py").write_text(PYTHON)
    head = 'model m = python("mine.py", "Model")\n'
    body = SPEC[SPEC.index("cluster") :].replace("steps", "sequence_length = 16\n    steps")
    (tmp_path / "py.llmspec").write_text(head + body)
    ran = llmspec("plan", "py.llmspec")
    assert ran.code == 1
    golden.check("cli/untrusted.txt", ran.err)
    assert llmspec("plan", "py.llmspec", "--trust").code == 0


def test_more_gpus_than_here(llmspec, tmp_path: Path, golden: Golden) -> None:
    text = SPEC.replace("2 * cpu", '8 * gpu("H100-SXM")')
    (tmp_path / "pod.llmspec").write_text(text)
    ran = llmspec("train", "pod.llmspec")
    assert ran.code == 2
    golden.check("cli/no_gpus.txt", ran.err[ran.err.index("error") :])


EIGHT_GPUS = """import llama

cluster pod {
    node  = 8 * gpu("H100-SXM")
    nodes = 1
}
train t {
    model     = llama3_8b
    cluster   = pod
    dataset   = synthetic()
    batch     = 64 sequences
    steps     = 5
    precision = bf16
}
"""
SMALL = EIGHT_GPUS.replace(
    "llama3_8b",
    "llama(layers=2, width=1024, heads=8, kv_heads=4, ffn=2048, vocab=8192, context=512)",
)

TIGHT = {
    "nothing_fits": SMALL + "budget { memory = 1500 MiB per gpu }\n",
    "wrong_pins": SMALL
    + "budget { memory = 1700 MiB per gpu }\nplan { zero <= 1; tensor = 1; offload = none }\n",
    "nothing_fits_20": EIGHT_GPUS
    + "budget { memory = 20 GiB per gpu }\n"
    + "plan { zero <= 1; tensor = 1; pipeline = 1; offload = none }\n",
    "too_late": SMALL.replace("steps     = 5", "steps     = 100_000")
    + "budget { deadline = 2 minutes }\n",
    "too_dear": SMALL.replace("nodes = 1", "nodes <= 2; price = 2 per gpu hour").replace(
        "steps     = 5", "steps     = 100_000"
    )
    + "budget { cost = 1 }\n",
}


@pytest.mark.parametrize(
    "name",
    [
        *("nothing_fits", "wrong_pins", "too_late", "too_dear"),
        pytest.param("nothing_fits_20", marks=pytest.mark.long),
    ],
)
def test_nothing_fits(name: str, llmspec, tmp_path: Path, golden: Golden) -> None:
    (tmp_path / "tight.llmspec").write_text(TIGHT[name])
    ran = llmspec("plan", "tight.llmspec")
    assert ran.code == 1
    golden.check(f"cli/{name}.txt", ran.err[ran.err.index("error") :])


@pytest.mark.parametrize("kind, name", [("unknown", "nonsense"), ("misspelt", "atention")])
def test_an_operator_that_no_block_has(
    kind: str, name: str, llmspec, tmp_path: Path, golden: Golden
) -> None:
    (tmp_path / "m.llmspec").write_text(SMALL + f"plan {{ recompute = [swiglu, {name}] }}\n")
    ran = llmspec("plan", "m.llmspec")
    assert ran.code == 1
    golden.check(f"cli/recompute_{kind}.txt", ran.err[ran.err.index("error") :])


WHY_NOT = {
    "slower": "tensor = 4, pipeline = 2",
    "too_large": "zero = 0, recompute = none, offload = none, tensor = 1, pipeline = 1",
    "illegal": "tensor = 3, zero = 1",
    "chosen": "pipeline = 1",
}


@pytest.mark.parametrize("name", WHY_NOT)
def test_why_not(name: str, llmspec, tmp_path: Path, golden: Golden) -> None:
    (tmp_path / "small.llmspec").write_text(SMALL + "budget { memory = 1900 MiB per gpu }\n")
    ran = llmspec("plan", "small.llmspec", "--why-not", WHY_NOT[name])
    text = ran.out if ran.code == 0 else ran.err[ran.err.index("error") :]
    golden.check(f"cli/why_not_{name}.txt", text)
    if name == "slower":
        assert text.startswith("Why not `tensor = 4, pipeline = 2`?")
        data = llmspec("plan", "small.llmspec", "--why-not", WHY_NOT[name], "--json").data()
        assert data["best"]["plan"]["tensor"] == 4 and not data["same"]
        assert data["best"]["words"] in text and data["chosen"]["words"] in text


@pytest.mark.long
def test_five_gib_are_enough(llmspec, tmp_path: Path, golden: Golden) -> None:
    """For 8 billion parameters on 8 GPUs: in host memory is what does not fit."""
    text = EIGHT_GPUS + "budget { memory = 5 GiB per gpu }\n"
    (tmp_path / "tight.llmspec").write_text(text)
    ran = llmspec("plan", "tight.llmspec")
    assert ran.code == 0
    golden.check("cli/fits_5.txt", ran.out[ran.out.index("Plan ") :])


@pytest.mark.long
def test_three_gib_are_not(llmspec, tmp_path: Path, golden: Golden) -> None:
    text = EIGHT_GPUS + "budget { memory = 3 GiB per gpu }\n"
    (tmp_path / "impossible.llmspec").write_text(text)
    ran = llmspec("plan", "impossible.llmspec")
    assert ran.code == 1
    golden.check("cli/nothing_fits_3.txt", ran.err[ran.err.index("error") :])


@pytest.mark.long
def test_pareto(llmspec, tmp_path: Path, golden: Golden) -> None:
    (tmp_path / "small.llmspec").write_text(SMALL + "budget { memory = 3 GiB per gpu }\n")
    ran = llmspec("plan", "small.llmspec", "--pareto")
    assert ran.code == 0
    golden.check("cli/pareto.txt", ran.out)
    data = llmspec("plan", "small.llmspec", "--pareto", "--json").data()
    assert all(f"{p['peak_memory_bytes'] / 2**30:.2f}" in ran.out for p in data["pareto"])
    assert len(data["pareto"]) == ran.out.count(" microbatch ")
    assert llmspec("plan", "small.llmspec", "--pareto", "--why-not", "zero = 1").code == 2


def test_fit(llmspec) -> None:
    ran = llmspec("fit", "llama3_8b", "--on", "8xH100", "--seq", "8192")
    assert ran.code == 0 and "llama3_8b on 8 x" in ran.out
    assert llmspec("fit", "llama3_8c", "--on", "8xH100").code == 1
    assert llmspec("fit", "llama3_8b", "--on", "many").code == 1


def test_missing_spec(llmspec) -> None:
    for verb in ("check", "plan", "compile", "verify", "train"):
        ran = llmspec(verb, "nowhere.llmspec")
        assert ran.code == 1 and "error[E0" in ran.err and "Traceback" not in ran.err


def test_usage(llmspec) -> None:
    assert llmspec("plan").code == 2
    assert llmspec("dance").code == 2
