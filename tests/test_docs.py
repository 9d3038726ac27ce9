"""What the documentation shows is what happens: outputs, tables, links, examples.

A fence below `<!-- shown: NAME -->` is written by `pytest --update-golden`, as golden files are.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterable
from dataclasses import fields
from functools import cache
from pathlib import Path

import pytest

import llmspec
from llmspec import dsl
from llmspec.compiler import driver
from llmspec.compiler.cli.main import parser
from llmspec.compiler.ops.linear import linear
from llmspec.compiler.ops.registry import REGISTRY, choices
from llmspec.compiler.placement import CONVERSIONS, Collective
from llmspec.compiler.plan import MeshSizes, Plan
from llmspec.compiler.render_plan import face, render_found
from llmspec.compiler.search.search import Found
from llmspec.dsl.diagnostics.render import render_human

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *ROOT.glob("examples/*.md")])
EXAMPLES = sorted((ROOT / "examples").glob("*.llmspec"))
SHOWN = re.compile(r"(<!-- shown: (.+?) -->\n```\w*\n)(.*?)(```)", re.DOTALL)

WRONG = """\
import llama

model small = llama(layers=4, width=4096, heads=30, kv_heads=2, ffn=512, vocab=256, context=256)

cluster laptop { node = 2 * cpu }
train { model = small; cluster = laptop; dataset = synthetic }
"""


def page(name: str) -> str:
    return (ROOT / name).read_text()


@cache
def found(example: str) -> tuple[driver.Session, Found]:
    session = driver.open_session(str(ROOT / "examples" / f"{example}.llmspec"))
    plan = driver.find_plan(session)
    assert isinstance(plan, Found)
    return session, plan


@cache
def emitted(example: str) -> str:
    session, plan = found(example)
    return driver.emit_plan(session, plan.plan)["model.py"]


# --------------------------------------------------------------------------------------------------
# Outputs


def wrong_head_count() -> str:
    try:
        dsl.load("small.llmspec", text=WRONG)
    except dsl.SpecError as error:
        return render_human(error.diagnostics, error.sources)
    raise AssertionError("30 heads divide 4096 now")


def plan_of(example: str) -> str:
    text = render_found(found(example)[1])
    return text[: text.index("\n}") + 3]


def losers_of(example: str) -> str:
    """Next best, and the families that are not about the micro-batch."""
    text = render_found(found(example)[1])
    lines = text[text.index("Next best:") :].splitlines()
    return "".join(f"{x}\n" for x in lines if not x.startswith("  microbatch"))


def attention_of(example: str) -> str:
    """The class of a block's attention."""
    text = emitted(example)
    start = text.index("class LayerAttention")
    return text[start : text.index("\n\n\n", start) + 1]


OUTPUTS = {
    "error of a wrong head count": wrong_head_count,
    "plan of llama3_8b": lambda: plan_of("llama3_8b"),
    "losers of llama3_8b": lambda: losers_of("llama3_8b"),
    "attention of tensor_block": lambda: attention_of("tensor_block"),
    "placement of tensor_block": lambda: found("tensor_block")[1].placed[0] + "\n",
}


def shown_in(text: str) -> Iterable[tuple[str, str]]:
    return ((m[2], m[3]) for m in SHOWN.finditer(text))


@pytest.mark.parametrize("path", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_outputs(path: Path, golden) -> None:  # type: ignore[no-untyped-def]
    text = path.read_text()
    fresh = SHOWN.sub(lambda m: m[1] + OUTPUTS[m[2]]() + m[4], text)
    if golden.update and fresh != text:
        path.write_text(fresh)
        return
    assert dict(shown_in(text)) == dict(shown_in(fresh))


def test_every_output_is_shown() -> None:
    assert {name for p in PAGES for name, _ in shown_in(p.read_text())} == set(OUTPUTS)


# --------------------------------------------------------------------------------------------------
# Pages


@pytest.mark.parametrize("path", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_lead_somewhere(path: Path) -> None:
    links = re.findall(r"\]\(([^)#\s]+)[^)]*\)", path.read_text())
    dead = [x for x in links if "://" not in x and not (path.parent / x).exists()]
    assert not dead


@pytest.mark.parametrize("path", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_named_files_exist(path: Path) -> None:
    """Paths in backticks that start in a folder of ours."""
    named = re.findall(
        r"`((?:dsl|compiler|runtime|tests|docs|examples|llmspec)/[\w/.]*)`", path.read_text()
    )
    made = ("examples/build",)  # by commands on the page
    missing = [x for x in named if not x.startswith(made) and not (ROOT / x).exists()]
    assert not missing


def test_every_page_is_reached() -> None:
    """From the README, in one step or more."""
    todo, seen = [ROOT / "README.md"], set()
    while todo:
        path = todo.pop()
        if path in seen or path.suffix != ".md" or not path.exists():
            continue
        seen.add(path)
        links = re.findall(r"\]\(([^)#\s]+)[^)]*\)", path.read_text())
        todo += [(path.parent / x).resolve() for x in links if "://" not in x]
    assert set(PAGES) <= seen


COMMAND = re.compile(r"^(?:    )?llmspec (.+?)(?:\s{2,}.*|\s+#.*)?$", re.MULTILINE)


@pytest.mark.parametrize("path", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_commands_parse(path: Path) -> None:
    text = path.read_text()
    commands = COMMAND.findall(text) + re.findall(r"`llmspec ([a-z]+ [^`]+)`", text)
    for command in commands:
        words = shlex.split(command.replace("SPEC…", "SPEC"))
        try:
            parser().parse_args(words)
        except SystemExit:  # a sentence may leave the file out
            parser().parse_args([*words, "SPEC"])


def test_specs_check(tmp_path: Path) -> None:
    path = tmp_path / "readme.llmspec"
    for spec in re.findall(r"^```llmspec\n(.*?)^```", page("README.md"), re.DOTALL | re.MULTILINE):
        path.write_text(spec)
        assert llmspec.check(path) == ()


def test_the_flow_is_the_printed_one() -> None:
    """Every printed line of docs/flow.md stands in the emitted program, comments aside."""
    lines = [x for x in emitted("tensor_block").splitlines() if not x.lstrip().startswith("#")]
    text = "\n".join(lines) + "\n"
    fences = re.findall(r"^```python\n(.*?)^```", page("docs/flow.md"), re.DOTALL | re.MULTILINE)
    inline = re.findall(r"^`(.+)`$", page("docs/flow.md"), re.MULTILINE)
    assert len(fences) >= 3 and inline
    for piece in (*fences, *inline):
        assert piece in text


def rows_of(text: str, heading: str) -> list[list[str]]:
    """The cells of the first table below a heading, head and rule left out."""
    below = text[text.index(f"\n{heading}\n") :].splitlines()[2:]
    first = next(i for i, line in enumerate(below) if line.startswith("|"))
    rows = []
    for line in below[first + 2 :]:
        if not line.startswith("|"):
            break
        rows.append([cell.strip().replace("`", "") for cell in line.strip("|").split("|")])
    return rows


def test_the_flow_has_every_conversion() -> None:
    words = {Collective.NONE: "", Collective.SLICE: ""}
    expected = {
        (str(a), str(b)): (
            step.function,
            words.get(step.forward, str(step.forward).replace("_", "-")),
            words.get(step.backward, str(step.backward).replace("_", "-")),
        )
        for (a, b), step in CONVERSIONS.items()
    }
    rows = rows_of(page("docs/flow.md"), "## Conversions are the only communication")
    assert {(r[0], r[1]): (r[2], r[3], r[4]) for r in rows} == expected


def test_the_flow_has_the_choices_of_a_linear() -> None:
    session, _ = found("tensor_block")
    unit = session.graph(1).units["layer"]
    node = next(n for n in unit.calls() if n.target is linear)
    legal = choices(REGISTRY[linear].rule(node), 2)
    assert legal[2].factor == "b", "docs/flow.md calls it t, as the second letter of three"
    expected = {
        (c.name.replace("split b", "split t"), *map(str, c.operands), str(c.result)) for c in legal
    }
    rows = rows_of(page("docs/flow.md"), "## A rule")
    assert {tuple(r) for r in rows} == expected


def test_plan_fields_are_documented() -> None:
    text = page("docs/plan.md")
    named = {name for row in rows_of(text, "## Fields") for name in row[0].split(", ")}
    assert named == {field.name for field in fields(Plan)}
    for field in fields(MeshSizes):
        assert f"`{field.name}`" in text


def keys_of(value: object) -> Iterable[str]:
    if isinstance(value, dict):
        for key, inner in value.items():
            yield key
            yield from keys_of(inner)
    elif isinstance(value, list):
        for inner in value[:1]:
            yield from keys_of(inner)


def test_json_keys_are_documented() -> None:
    """Every key that `llmspec plan --json` prints, but for the plan's own and names of units."""
    made = json.loads(json.dumps(face(found("tensor_block")[1])))
    own = set(keys_of(made.pop("plan")))
    text = page("docs/json.md")
    missing = {key for key in keys_of(made) if f'"{key}"' not in text and f"`{key}`" not in text}
    assert not missing - own


def test_every_command_is_in_the_tables() -> None:
    verbs = parser()._subparsers._group_actions[0].choices  # type: ignore[union-attr]
    for verb in verbs:  # type: ignore[union-attr]
        assert re.search(rf"`(?:llmspec )?{verb}\b", page("README.md")), verb
        assert re.search(rf"\| `{verb}\b", page("docs/json.md")), verb


# --------------------------------------------------------------------------------------------------
# Examples


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda p: p.stem)
def test_examples_check(path: Path) -> None:
    assert llmspec.check(path) == ()
    assert dsl.format_text(path.read_text(), path=path.name) == path.read_text()
    assert path.read_text().startswith("# "), "its first line says what it is"


def test_examples_are_listed() -> None:
    listed = set(re.findall(r"\]\((\w+\.llmspec)\)", page("examples/README.md")))
    assert listed == {p.name for p in EXAMPLES}


def test_the_python_face(tmp_path: Path) -> None:
    spec = ROOT / "examples" / "quickstart.llmspec"
    made = llmspec.plan(spec)
    assert made["plan"]["world_size"] == 2
    files = llmspec.compile(spec, tmp_path / "out")
    assert (tmp_path / "out" / "train.py").read_text() == files["train.py"]
    plan = json.loads(files["plan.json"])
    plan["spec"] = spec.name  # as if made where the spec stands
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    (tmp_path / spec.name).write_text(spec.read_text())
    again = llmspec.compile(tmp_path / "plan.json", tmp_path / "again")
    assert again["train.py"].count("\n") == files["train.py"].count("\n")


def test_nothing_fits_is_said(tmp_path: Path) -> None:
    spec = tmp_path / "large.llmspec"
    spec.write_text(page("examples/gpt2_small.llmspec").replace("gpt2_small", "gpt2_xl"))
    text = spec.read_text() + "budget { memory = 8 GiB per gpu }\n"
    spec.write_text(text)
    assert llmspec.plan(spec)["infeasible"]["missing_bytes"] > 0
    with pytest.raises(llmspec.NoPlan):
        llmspec.compile(spec, tmp_path / "out")
    assert not (tmp_path / "out").exists()
