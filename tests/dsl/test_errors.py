"""Every fault has a golden spec and the text that a user reads."""

from __future__ import annotations

from pathlib import Path

import pytest

from llmspec.dsl.checker import check_text
from llmspec.dsl.diagnostics.codes import CODES
from llmspec.dsl.diagnostics.render import render_human

FOLDER = Path(__file__).resolve().parents[1] / "golden" / "errors"
NAMES = sorted(path.stem for path in FOLDER.glob("*.llmspec"))

ELSEWHERE = {
    *("E0001", "E0003", "E0004", "E0412", "E0415", "E0602", "E0603", "E0801", "E0802"),
    *("E0803", "E0804"),
}
"""Codes of faults that no text file can show (test_sources.py), and of what follows the check."""


def faults_of(name: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(FOLDER)
    program, sources = check_text(f"{name}.llmspec", None, None)
    assert program is None
    return sources


@pytest.mark.parametrize("name", NAMES)
def test_error_reads_as_reviewed(name, golden, monkeypatch):
    sources = faults_of(name, monkeypatch)
    golden.check(f"errors/{name}.txt", render_human(sources.diagnostics, sources.texts))


def test_no_orphans():
    assert {p.stem for p in FOLDER.glob("*.txt")} == set(NAMES)


def test_every_code_is_shown(monkeypatch):
    shown = {d.code for name in NAMES for d in faults_of(name, monkeypatch).diagnostics}
    assert shown | ELSEWHERE == set(CODES)


@pytest.mark.parametrize("name", NAMES)
def test_headlines_are_facts(name, monkeypatch):
    for diagnostic in faults_of(name, monkeypatch).diagnostics:
        assert not diagnostic.message.endswith("."), diagnostic.message
        assert (
            diagnostic.message[0] in "`'"
            or not diagnostic.message[:2].istitle()
            or (diagnostic.message[0] == "A")
        ), diagnostic.message
        assert len(diagnostic.helps) <= 2
