import json
import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from llmspec.runtime import tokenise
from llmspec.runtime.errors import UserError
from llmspec.runtime.tokenise import find_files, memory_map
from tests.processes import run


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, content in {
        "b.txt": b"two\n",
        "a.txt": b"one\xff",
        "c.py": b"",
        "d/e.txt": b"x",
    }.items():
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)
    return tmp_path


def names(files: list[str], folder: Path) -> list[str]:
    return [os.path.relpath(path, folder) for path in files]


def test_files_in_a_fixed_order_each_once(folder: Path):
    root = str(folder)
    assert names(find_files(["*.txt", "a.*"], root=root), folder) == ["a.txt", "b.txt"]
    assert names(find_files("**/*.txt", "b.*", root), folder) == ["a.txt", "d/e.txt"]
    assert names(find_files("*", root=root), folder) == ["a.txt", "b.txt", "c.py"]
    stdlib = find_files("{stdlib}/[a-c]*.py", exclude="{stdlib}/b*.py")
    assert any(path.endswith("/ast.py") for path in stdlib)
    assert not any(path.endswith("/bisect.py") for path in stdlib)


def test_files_that_are_not_there(folder: Path):
    with pytest.raises(UserError, match=r"no file matches `\*\.md` \(looked for .*/\*\.md\)"):
        find_files("*.md", root=str(folder))
    with pytest.raises(UserError, match=r"every file of `\*\.txt` is excluded by `\*`"):
        find_files("*.txt", "*", str(folder))
    with pytest.raises(UserError, match=r"cannot read .*gone.txt: No such file"):
        memory_map([str(folder / "gone.txt")], "bytes", str(folder / "cache"))


def test_bytes_are_tokens_as_they_are(folder: Path, capsys):
    files, cache = find_files("*.txt", root=str(folder)), str(folder / "cache")
    made = memory_map(files, "bytes", cache)
    assert (
        bytes(made.open().tolist()) == b"one\xfftwo\n"
        and made.vocab == 256
        and made.dtype == "uint8"
    )
    assert "tokenising 2 files" in capsys.readouterr().err
    assert memory_map(files, "bytes", cache) == made
    assert capsys.readouterr().err == ""  # found, not made
    (folder / "a.txt").write_bytes(b"changed")
    assert bytes(memory_map(files, "bytes", cache).open().tolist()) == b"changedtwo\n"
    assert not list(Path(cache).glob("*.tmp"))


def make_tokenizer(path: Path, end: str | None = None) -> dict[str, int]:
    vocab = {"hello": 0, "world": 1, "ü": 2, "[UNK]": 3} | ({end: 4} if end else {})
    model = {"type": "WordLevel", "vocab": vocab, "unk_token": "[UNK]"}
    path.write_text(
        json.dumps(
            {
                "version": "1.0",
                "added_tokens": [],
                "normalizer": None,
                "pre_tokenizer": {"type": "WhitespaceSplit"},
                "post_processor": None,
                "decoder": None,
                "truncation": None,
                "padding": None,
                "model": model,
            }
        )
    )
    return vocab


@pytest.mark.parametrize("end", [None, "<|endoftext|>"])
def test_tokenizer_file(tmp_path: Path, monkeypatch, end):
    monkeypatch.setattr(tokenise, "PIECE_BYTES", 8)  # many pieces, cut at line ends
    (tmp_path / "1.txt").write_text("hello world\nworld\n\nhello ü\n")
    (tmp_path / "2.txt").write_text("world")
    make_tokenizer(tmp_path / "tokenizer.json", end)
    files = find_files("*.txt", root=str(tmp_path))
    made = memory_map(files, str(tmp_path / "tokenizer.json"), str(tmp_path / "cache"))
    marker = [4] if end else []
    assert made.open().tolist() == [0, 1, 1, 0, 2, *marker, 1, *marker]
    assert made.vocab == 4 + len(marker) and made.dtype == "uint16"


def test_pieces_never_cut_a_character(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(tokenise, "PIECE_BYTES", 5)
    text = "日本語のテキスト、改行なし🙂" * 3
    (tmp_path / "x").write_text(text, encoding="utf-8")
    pieces = list(tokenise._pieces(str(tmp_path / "x")))
    assert len(pieces) > 5 and "".join(p.decode() for p in pieces) == text


def test_what_is_no_text_and_no_tokenizer(tmp_path: Path):
    make_tokenizer(tmp_path / "tokenizer.json")
    (tmp_path / "x.bin").write_bytes(b"ab\n" * 3 + b"\x80\x81")
    files, cache = [str(tmp_path / "x.bin")], str(tmp_path / "cache")
    with pytest.raises(UserError, match=r"x\.bin is not UTF-8 text: byte 9 is 0x80"):
        memory_map(files, str(tmp_path / "tokenizer.json"), cache)
    assert not list(Path(cache).glob("*.tmp"))
    (tmp_path / "bad.json").write_text("{}")
    with pytest.raises(UserError, match=r"bad\.json is not a tokenizer"):
        memory_map(files, str(tmp_path / "bad.json"), cache)
    with pytest.raises(UserError, match=r"cannot read .*none.json"):
        memory_map(files, str(tmp_path / "none.json"), cache)


def test_a_cache_that_cannot_be_written(folder: Path):
    (folder / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot keep tokens in .*/file/x.*LLMSPEC_CACHE"):
        memory_map(find_files("a.txt", root=str(folder)), "bytes", str(folder / "file" / "x"))


def test_one_process_makes_the_map(folder: Path):
    files, cache = find_files("*.txt", root=str(folder)), str(folder / "cache")

    def build(rank: int) -> tuple[bool, bytes]:
        calls = []
        make = tokenise._make
        tokenise._make = lambda *a: (calls.append(a), make(*a))  # type: ignore[assignment]
        content = bytes(memory_map(files, "bytes", cache).open().tolist())
        dist.barrier()  # none leaves while another still connects
        return bool(calls), content

    results = run(4, build)
    assert sum(made for made, _ in results) == 1
    assert {content for _, content in results} == {b"one\xfftwo\n"}


def test_empty_files_make_an_empty_map(folder: Path):
    made = memory_map([str(folder / "c.py")], "bytes", str(folder / "cache"))
    assert made.tokens == 0 and made.open().dtype == torch.uint8 and len(made.open()) == 0
