"""report.html says what plan.json says, and loads nothing."""

from __future__ import annotations

from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

from llmspec.compiler import driver
from llmspec.compiler.emit.report import print_report
from llmspec.compiler.forecast import forecast
from llmspec.compiler.plan import EVERYTHING, Plan, Stretch
from llmspec.compiler.search.search import Found
from llmspec.dsl import load

SPEC = """\
import llama
model tiny = llama(layers=5, width=64, heads=4, kv_heads=2, ffn=128, vocab=256, context=64)
cluster here {{ node = {ranks} * cpu }}
train run {{
    model = tiny; cluster = here; dataset = synthetic; batch = 8 sequences; steps = 10; seed = 1
    precision = fp32
}}
plan {{ {pins} }}
"""


class Page(HTMLParser):
    """The numbers of the page by table, and everything it would load."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.numbers: dict[str, dict[str, float]] = {}
        self.texts: dict[str, dict[str, str]] = {}
        self.rows: dict[str, list[dict[str, str]]] = {}
        self.drawn: list[float] = []
        self.loads: list[str] = []
        self.opened: list[str] = []
        self.table = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {k: v or "" for k, v in attrs}
        self.loads += [f"{tag} {k}" for k in values if k in ("src", "href", "xlink:href")]
        self.loads += [tag] if tag in ("script", "link", "iframe", "object", "img") else []
        if tag != "meta":
            self.opened.append(tag)
        if tag == "table":
            self.table = values.get("id", "")
        if tag == "tr" and self.table:
            self.rows.setdefault(self.table, []).append(values)
            if "data-value" in values and "data-name" in values:
                found = self.numbers.setdefault(self.table, {})
                found[values["data-name"]] = float(values["data-value"])
        if tag == "svg" and values.get("class") == "memory":
            self.drawn.append(float(values["data-value"]))

    def handle_endtag(self, tag: str) -> None:
        assert self.opened.pop() == tag, f"</{tag}> closes nothing"


def planned(tmp_path: Path, ranks: int, pins: str) -> tuple[driver.Session, Plan]:
    path = tmp_path / "run.llmspec"
    path.write_text(SPEC.format(ranks=ranks, pins=pins))
    session = driver.open_session(str(path))
    found = driver.find_plan(session)
    assert isinstance(found, Found)
    return session, found.plan


PLANS = (
    (1, "microbatch = 2"),
    (4, "tensor = 2; data = 2; zero = 3; recompute = full"),
    (4, "pipeline = 4; schedule = 1f1b; microbatch = 1"),
    (4, "pipeline = 2; data = 2; zero = 1; schedule = gpipe; microbatch = 1"),
)


@pytest.mark.parametrize(("ranks", "pins"), PLANS)
def test_numbers_are_the_plans(tmp_path: Path, ranks: int, pins: str) -> None:
    session, plan = planned(tmp_path, ranks, pins)
    text = print_report(session.program, driver.lower_plan(session, plan))
    page, predicted = Page(text), plan.predicted["predicted"]
    assert page.loads == [] and page.opened == []
    assert "http" not in text
    assert page.numbers["memory"] == predicted["memory_bytes"]
    assert max(page.drawn) == predicted["peak_memory_bytes"]
    assert len(page.drawn) == len(plan.stages)
    times = page.numbers["time"]
    assert times.pop("total") == pytest.approx(predicted["step_time_s"])
    assert times == {k: v for k, v in predicted["time_s"].items() if v}
    for name in ("step_time_s", "tokens_per_s", "mfu", "hfu", "peak_memory_bytes"):
        assert page.numbers["predicted"][name] == predicted[name]
    sent = [(int(r["data-value"]), int(r["data-count"])) for r in page.rows["collectives"][1:] if r]
    assert sent == [(c["bytes"], c["count"]) for c in predicted["collectives"]]


@pytest.mark.parametrize(("ranks", "pins"), PLANS)
def test_timeline_is_the_predicted_step(tmp_path: Path, ranks: int, pins: str) -> None:
    session, plan = planned(tmp_path, ranks, pins)
    known = forecast(session.program, plan, session.graph(plan.microbatch))
    end = max(e.stop_s for e in known.events)
    assert end == pytest.approx(plan.predicted["predicted"]["step_time_s"], rel=1e-8)


def test_an_edited_plan_is_priced_as_it_stands(tmp_path: Path) -> None:
    session, plan = planned(tmp_path, *PLANS[2])
    blocks = sum(s.blocks for s in plan.recompute["layer"])
    again = (Stretch(blocks=blocks, again=EVERYTHING),)
    edited = replace(plan, recompute={**plan.recompute, "layer": again})
    page = Page(print_report(session.program, driver.lower_plan(session, edited)))
    before = plan.predicted["predicted"]
    assert page.numbers["time"]["compute"] > before["time_s"]["compute"]
    assert page.numbers["memory"]["activations"] < before["memory_bytes"]["activations"]


def test_same_plan_same_bytes(tmp_path: Path) -> None:
    session, plan = planned(tmp_path, *PLANS[2])
    first = print_report(session.program, driver.lower_plan(session, plan))
    again = driver.open_session(str(tmp_path / "run.llmspec"))
    assert print_report(again.program, driver.lower_plan(again, plan)) == first


def test_emitted_beside_the_plan(tmp_path: Path) -> None:
    session, plan = planned(tmp_path, *PLANS[0])
    driver.compile_plan(session, plan, tmp_path / "out")
    assert plan.plan_hash in (tmp_path / "out" / "report.html").read_text()


def test_names_of_a_spec_are_escaped(tmp_path: Path) -> None:
    name = "<script>alert(1)</script>&.llmspec"
    text = SPEC.format(ranks=1, pins="zero = 0")
    program = load(str(tmp_path / name.replace("/", "_")), text=text)
    session = driver.Session(program)
    found = driver.find_plan(session)
    assert isinstance(found, Found)
    page = print_report(program, driver.lower_plan(session, found.plan))
    assert "<script" not in page
    assert "&lt;script&gt;" in page
