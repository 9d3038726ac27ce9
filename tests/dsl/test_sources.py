from __future__ import annotations

import os

import pytest

from llmspec.dsl import SpecError, check, load
from tests.dsl.specs import CLUSTER, MODEL, SPEC, TRAIN, program


def codes(path) -> list[str]:
    found = [d.code for d in check(path)]
    with pytest.raises(SpecError):
        load(path)
    return found


def test_files_that_are_no_specs(tmp_path):
    binary = tmp_path / "binary.llmspec"
    binary.write_bytes(bytes(range(256)) * 10)
    latin = tmp_path / "latin.llmspec"
    latin.write_bytes("# größer\n".encode("latin-1"))
    empty = tmp_path / "empty.llmspec"
    empty.write_text("\n  \n")
    large = tmp_path / "large.llmspec"
    large.write_bytes(b"# x\n" * (10 * 2**20 // 4))
    assert codes(binary) == ["E0003"]
    assert codes(latin) == ["E0003"]
    assert codes(empty) == ["E0002"]
    assert codes(large) == ["E0004"]
    assert codes(tmp_path) == ["E0001"]
    assert codes(tmp_path / "nothing.llmspec") == ["E0006"]


def test_a_byte_order_mark_is_no_fault(tmp_path):
    path = tmp_path / "bom.llmspec"
    path.write_bytes(b"\xef\xbb\xbf" + SPEC.encode())
    assert check(path) == ()


def test_windows_line_ends():
    assert program(SPEC.replace("\n", "\r\n")).model.name == "tiny"


def test_relative_imports(tmp_path):
    parts = tmp_path / "parts"
    parts.mkdir()
    (parts / "model.llmspec").write_text(MODEL)
    (parts / "pod.llmspec").write_text('import "model.llmspec"\n' + CLUSTER)
    main = tmp_path / "main.llmspec"
    main.write_text('import "parts/pod.llmspec"\nimport "parts/model.llmspec"\n' + TRAIN)
    assert load(main).model.name == "tiny"
    main.write_text('import "parts/pod.llmspec"\n' + TRAIN)
    assert codes(main) == ["E0201"], "what an imported file imports stays its own"


def test_a_cycle_is_shown_whole(tmp_path):
    for name, other in (("a", "b"), ("b", "c"), ("c", "a")):
        (tmp_path / f"{name}.llmspec").write_text(f'import "{other}.llmspec"\n')
    (diagnostic,) = check(tmp_path / "a.llmspec")
    assert diagnostic.code == "E0007"
    assert [os.path.basename(p) for p in diagnostic.label.split(" -> ")] == [
        f"{n}.llmspec" for n in "abca"
    ]


def test_own_declarations_hide_imported_ones():
    text = "import llama\n" + MODEL.replace("model tiny", "model llama3_8b") + CLUSTER
    assert program(text + TRAIN.replace("tiny", "llama3_8b")).model.width == 64  # type: ignore[union-attr]


def test_the_hash_follows_meaning():
    plain = program(SPEC).source_hash
    assert len(plain) == 12
    assert program("# a comment\n\n" + SPEC.replace("x + mlp", "x  +  mlp")).source_hash == plain
    assert program(SPEC.replace("steps = 10", "steps = 11")).source_hash != plain
    imported = "import llama\n" + SPEC
    assert program(imported).source_hash != plain
