"""Faults of the user's file are told in terms of that file."""

from pathlib import Path

import pytest

from llmspec.compiler.errors import Unsupported
from llmspec.compiler.raising import load_module, raise_model
from llmspec.dsl.program import PythonModel, Span

HERE = Span("spec.llmspec", 3, 1, 3, 9)
FILE = """
import torch
from torch import nn
from neighbour import WIDTH

class Good(nn.Module):
    def __init__(self, layers, sizes=(1, 2)):
        super().__init__()
        assert layers == 2 and sizes == [3, 4], "the spec's arguments"
        self.table = nn.Embedding(11, WIDTH)
        self.head = nn.Linear(WIDTH, 11)

    def forward(self, ids):
        return {result}

class Bad(nn.Module):
    def __init__(self):
        super().__init__()
        raise RuntimeError("out of luck")

number = 3

def text():
    return "no module"
"""


def model(name: str, **arguments: object) -> PythonModel:
    return PythonModel(
        name="mine",
        path="models/file.py",
        attribute=name,
        arguments=tuple(arguments.items()),  # type: ignore[arg-type]
        span=HERE,
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "neighbour.py").write_text("WIDTH = 8\n")
    write(tmp_path, "self.head(self.table(ids))")
    return tmp_path


def write(folder: Path, result: str) -> None:
    (folder / "models" / "file.py").write_text(FILE.replace("{result}", result))


def fault(folder: Path, wanted: PythonModel) -> Unsupported:
    with pytest.raises(Unsupported) as caught:
        load_module(wanted, folder)
    assert caught.value.span == HERE
    return caught.value


GOOD = {"layers": 2, "sizes": (3, 4)}


def test_a_module_without_memory(folder: Path) -> None:
    module = load_module(model("Good", **GOOD), folder)
    graph = raise_model(module, "mine", sequences=2, tokens=4)
    assert [name for name, _ in graph.parameters()] == ["table.weight", "head.weight", "head.bias"]
    assert graph.vocab == 11


def test_missing_file(folder: Path) -> None:
    (folder / "models" / "file.py").unlink()
    assert fault(folder, model("Good")).what == "no Python file `models/file.py`"


def test_missing_class(folder: Path) -> None:
    assert fault(folder, model("Gud")).what == "`models/file.py` has no class `Gud`"
    assert fault(folder, model("number")).what == "`models/file.py` has no class `number`"


def test_an_import_that_fails(folder: Path) -> None:
    (folder / "models" / "file.py").write_text("\nimport nothing_of_this_name\n")
    assert fault(folder, model("Good")).what == (
        "`models/file.py` cannot be imported: "
        "ModuleNotFoundError: No module named 'nothing_of_this_name' (line 2)"
    )


def test_a_syntax_error(folder: Path) -> None:
    (folder / "models" / "file.py").write_text("def f(:\n")
    assert fault(folder, model("Good")).what.startswith(
        "`models/file.py` cannot be imported: SyntaxError: invalid syntax"
    )


def test_an_init_that_fails(folder: Path) -> None:
    what = fault(folder, model("Bad")).what
    assert what == "`Bad` cannot be built: RuntimeError: out of luck (line 19)"


def test_what_is_no_module(folder: Path) -> None:
    assert fault(folder, model("text")).what == "`text` gives no torch.nn.Module"


def raising(folder: Path, result: str) -> str:
    write(folder, result)
    module = load_module(model("Good", **GOOD), folder)
    with pytest.raises(Unsupported) as caught:
        raise_model(module, "mine", sequences=2, tokens=4)
    return caught.value.what


def test_what_cannot_be_traced(folder: Path) -> None:
    result = "self.head(self.table(ids)) if ids.sum() > 3 else None"
    assert raising(folder, result).startswith("the model cannot be traced: ")


def test_what_are_no_logits(folder: Path) -> None:
    assert raising(folder, "self.table(ids).sum(1)") == (
        "a model whose result is [2, 8], not logits [sequences, tokens, vocabulary]"
    )


def test_a_vocabulary_that_is_too_small(folder: Path) -> None:
    module = load_module(model("Good", **GOOD), folder)
    with pytest.raises(Unsupported, match="logits for 11 tokens, of a vocabulary of 256"):
        raise_model(module, "mine", sequences=2, tokens=4, vocab=256)
