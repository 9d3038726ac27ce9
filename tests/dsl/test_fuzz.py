"""Mutated specs get diagnostics: never a traceback, never a hang."""

from __future__ import annotations

import random
import time

import pytest

from llmspec.dsl import explicit
from llmspec.dsl.checker import check_text
from llmspec.dsl.diagnostics.render import render_human, render_json, render_line
from llmspec.dsl.format import format_text
from llmspec.dsl.layout import scan
from tests.dsl.specs import ROOT, meaning, program, whole_specs

ODD = [
    "-1",
    "0",
    "1e30",
    "9" * 30,
    "1e-400",
    "0.5",
    "\0",
    "é",
    '"',
    "\\",
    "1f1b",
    "true",
    "none",
    "}",
]


def seeds() -> list[str]:
    valid = list(whole_specs().values())
    valid += [explicit(program(text)) for text in valid]
    faulty = [p.read_text() for p in sorted((ROOT / "tests/golden/errors").glob("*.llmspec"))]
    return valid * 20 + faulty


def mutate(dice: random.Random, text: str, words: list[str]) -> str:
    tokens = [t.text for t in scan(text)]
    for _ in range(dice.choice([1, 1, 1, 2, 4])):
        if not tokens:
            break
        at = dice.randrange(len(tokens))
        match dice.randrange(8):
            case 0:
                del tokens[at : at + dice.randint(1, 4)]
            case 1 | 2:
                tokens[at] = dice.choice(words)
            case 3:
                tokens.insert(at, dice.choice(words))
            case 4:
                other = dice.randrange(len(tokens))
                tokens[at], tokens[other] = tokens[other], tokens[at]
            case 5:
                tokens[at:at] = tokens[at : at + dice.randint(1, 30)]
            case 6:
                tokens[at] = dice.choice(ODD)
            case _:
                cut = dice.randint(0, len(tokens[at]))
                tokens[at] = tokens[at][:cut] + chr(dice.randrange(32, 300))
    return "".join(tokens)


def holds(text: str) -> bool:
    start = time.perf_counter()
    made, sources = check_text("spec.llmspec", text, None)
    assert (made is None) == bool(sources.diagnostics), "a program, or diagnostics"
    assert time.perf_counter() - start < 30
    render_human(sources.diagnostics, sources.texts)
    render_json(sources.diagnostics)
    for diagnostic in sources.diagnostics:
        assert "\n" not in render_line(diagnostic)
    neat = format_text(text)
    assert format_text(neat) == neat
    if made is not None:
        assert meaning(program(explicit(made))) == meaning(made)
    return made is not None


def run(seed: int, seconds: float) -> tuple[int, int]:
    """(specs tried, specs that were still legal)."""
    dice = random.Random(seed)
    texts = seeds()
    words = sorted({t.text for text in texts for t in scan(text) if t.kind != "space"})
    end = time.perf_counter() + seconds
    tried = legal = 0
    while time.perf_counter() < end and tried < 200_000:
        text = mutate(dice, dice.choice(texts), words)
        try:
            legal += holds(text)
        except Exception as error:
            raise AssertionError(f"this spec failed:\n{text}") from error
        tried += 1
    return tried, legal


def test_mutated_specs():
    tried, legal = run(seed=1, seconds=12)
    assert tried > 100
    assert legal < tried / 2


@pytest.mark.long
def test_many_mutated_specs():
    tried, _ = run(seed=time.time_ns(), seconds=180)
    assert tried > 2000


@pytest.mark.parametrize("dice", [random.Random(7)])
def test_noise(dice):
    for _ in range(200):
        alphabet = [chr(dice.randrange(1, 0x2FF)) for _ in range(40)] + list('(){}[]\n"#=->*')
        holds("".join(dice.choice(alphabet) for _ in range(dice.randrange(200))))
