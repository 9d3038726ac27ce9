"""What the documentation shows is true."""

from __future__ import annotations

import re

import pytest

from llmspec.dsl import check
from llmspec.dsl.diagnostics.codes import CODES, explain
from llmspec.dsl.hardware import CONSTANTS, DEVICE_KEYS
from llmspec.dsl.options import (
    DATASETS,
    OBJECTIVES,
    OPERATORS,
    OPTIMIZERS,
    PHASES,
    PLAN,
    PRECISIONS,
    TRAIN_KEYS,
)
from tests.dsl.specs import ROOT

LANGUAGE = (ROOT / "docs" / "language.md").read_text(encoding="utf-8")
FENCES = re.findall(r"^```llmspec\n(.*?)^```", LANGUAGE, re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("number", range(len(FENCES)))
def test_every_spec_checks(number, tmp_path):
    path = tmp_path / "spec.llmspec"
    path.write_text(FENCES[number], encoding="utf-8")
    assert check(path) == ()


def test_there_are_specs():
    assert len(FENCES) >= 6


def test_every_word_is_documented():
    words = {f"`{key}`" for key in (*TRAIN_KEYS, *PLAN) if key != "context_style"}
    words |= {f"`{key}`" for key in (*DEVICE_KEYS, *CONSTANTS)}
    for word in sorted(words):
        assert word in LANGUAGE, word
    for name, row in OPERATORS.items():
        assert f"`{name}" in LANGUAGE, name
        if row.meaning:
            for option in row.options:
                assert option.derived or option.name in LANGUAGE, (name, option.name)
    for rows in (DATASETS, OPTIMIZERS, PHASES, PRECISIONS, OBJECTIVES):
        for call in rows:
            assert not call.meaning or call.name in LANGUAGE, call.name


def test_every_code_has_its_page():
    for code, headline in CODES.items():
        page = explain(code)
        assert page is not None and page.startswith(f"# {code}: {headline}\n\n")
        assert len(page.splitlines()) >= 3
    assert explain("e0203") == explain("E0203")
    assert explain("E9999") is None


def test_no_page_without_a_code():
    pages = {p.stem for p in (ROOT / "dsl" / "diagnostics" / "pages").glob("*.md")}
    assert pages == set(CODES)


def test_the_list_of_errors():
    listed = re.findall(r"^\| (E\d{4}) \| (.*) \|$", (ROOT / "docs/errors.md").read_text(), re.M)
    assert dict(listed) == CODES
