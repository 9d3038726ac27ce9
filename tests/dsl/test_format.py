from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmspec.dsl.format import format_text
from llmspec.dsl.layout import scan
from llmspec.dsl.parse import parse
from llmspec.dsl.sources import canonical
from tests.dsl.specs import ROOT, whole_specs

GOLDEN = sorted((ROOT / "tests" / "golden" / "errors").glob("*.llmspec"))
LIBRARY = sorted((ROOT / "dsl" / "library").rglob("*.llmspec"))

UGLY = """
train   pretrain{
model=m   ;cluster = pod  # two on a line


  batch =4Mi   tokens #size
      sequence_length= 8192          # default
  learning_rate = warmup( 2000 )then cosine( to = -3e-5 )
      optimizer = adamw(lr = 3e-4,
   betas=( 0.9,0.95 ))
}
model m{
block layer(x){ x=x+attention(rmsnorm(x),heads = 8)
# about y
 y=- x*2
}
tokens->embed
->layer*12 # twelve
  -> unembed
}
plan{ tensor<=8; zero in[1,3] }"""

NEAT = """train pretrain {
    model = m; cluster = pod  # two on a line

    batch           = 4Mi tokens  #size
    sequence_length = 8192        # default
    learning_rate   = warmup(2000) then cosine(to=-3e-5)
    optimizer = adamw(lr=3e-4,
                      betas=(0.9, 0.95))
}
model m {
    block layer(x) { x = x + attention(rmsnorm(x), heads=8)
        # about y
        y = -x * 2
    }
    tokens -> embed
        -> layer * 12  # twelve
        -> unembed
}
plan { tensor <= 8; zero in [1, 3] }
"""


def comments(text: str) -> list[str]:
    return [t.text.rstrip() for t in scan(text) if t.kind == "comment"]


def holds(text: str) -> None:
    neat = format_text(text)
    assert format_text(neat) == neat
    assert canonical(neat) == canonical(text)
    assert comments(neat) == comments(text)


def test_layout():
    assert format_text(UGLY) == NEAT


@pytest.mark.parametrize("path", [*GOLDEN, *LIBRARY], ids=lambda p: p.name)
def test_files_keep_their_meaning(path: Path):
    holds(path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("path", LIBRARY, ids=lambda p: p.name)
def test_the_library_is_formatted(path: Path):
    text = path.read_text(encoding="utf-8")
    assert format_text(text) == text


PIECES = st.sampled_from(
    [
        *sorted({t.text for text in whole_specs().values() for t in scan(text)}),
        *("\n", "\n", "  ", "# note\n", "-", "->", "(", ")", "{", "}", "[", "]", ",", ";", "\t"),
    ]
)


@settings(max_examples=150, deadline=None)
@given(st.lists(PIECES, max_size=60).map("".join))
def test_any_words_keep_their_meaning(text):
    holds(text)


SPACES = st.sampled_from(["", " ", "   "])


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(sorted(whole_specs().values())), st.randoms(use_true_random=False))
def test_spaces_do_not_matter(text, random):
    loose = "".join(
        t.text * random.randint(1, 3) if t.kind == "space" else t.text for t in scan(text)
    )
    assert format_text(loose) == format_text(text)
    assert parse("a", format_text(text))[1] == []
