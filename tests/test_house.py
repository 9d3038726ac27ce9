"""The house rules that a machine can hold: which folder may import which, sizes, words, and the
surface that grows only on purpose."""

from __future__ import annotations

import argparse
import ast
import re
import statistics
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import fields
from functools import cache
from pathlib import Path

import pytest

import llmspec
from llmspec.compiler import ops
from llmspec.compiler.cli.main import parser
from llmspec.compiler.ops.registry import BY_NAME
from llmspec.compiler.plan import MeshSizes, Plan, UnitPlacement
from llmspec.compiler.schedules import Schedule
from llmspec.dsl import options
from llmspec.dsl.diagnostics.codes import CODES
from llmspec.dsl.goals import BUDGET_KEYS
from llmspec.dsl.hardware import ALL_DEVICE_KEYS, CLUSTER_KEYS
from llmspec.dsl.parse import DECLARATIONS
from llmspec.dsl.program import Prefer

ROOT = Path(__file__).resolve().parents[1]
ROOMS = ("dsl", "compiler", "runtime")
MAY_IMPORT = {"dsl": {"dsl"}, "compiler": {"compiler", "dsl"}, "runtime": {"runtime"}}
assert ops, "importing the package fills the registry"


@cache
def sources() -> dict[Path, ast.Module]:
    """Every module of the three rooms, by its path from the root."""
    found = sorted(p for room in ROOMS for p in (ROOT / room).rglob("*.py"))
    return {p.relative_to(ROOT): ast.parse(p.read_text()) for p in found}


def imported(path: Path, tree: ast.AST) -> Iterator[tuple[str, ...]]:
    """Modules of the rooms that a file imports, anywhere in it: ("dsl", "program")."""
    for node in ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [a.name for a in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level:
            here = path.parts[: len(path.parts) - node.level]
            names = [".".join((*here, node.module or ""))]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{a.name}" for a in node.names]
        for name in names:
            parts = tuple(p for p in name.split(".") if p)
            parts = parts[1:] if parts[:1] == ("llmspec",) else parts
            if parts and parts[0] in ROOMS:
                yield parts


# --------------------------------------------------------------------------------------------------
# Who imports whom


@pytest.mark.parametrize("room", ROOMS)
def test_imports_go_one_way(room: str) -> None:
    wrong = {
        f"{path} imports {'.'.join(name)}"
        for path, tree in sources().items()
        if path.parts[0] == room
        for name in imported(path, tree)
        if name[0] not in MAY_IMPORT[room]
    }
    assert not wrong


def folder_of(name: tuple[str, ...]) -> Path:
    """The folder that holds a module, or the package itself."""
    path = Path(*name)
    while not (ROOT / path).is_dir():
        path = path.parent
    return path


def folder_edges() -> dict[Path, set[Path]]:
    """Only between sibling or unrelated folders: a package's own modules may see what is in it."""
    edges: dict[Path, set[Path]] = {}
    for path, tree in sources().items():
        own = path.parent
        if own.parts == (own.parts[0],):
            continue  # modules beside the folders tie them together: that is what they are for
        for name in imported(path, tree):
            other = folder_of(name)
            if other != own and len(other.parts) > 1 and own not in other.parents:
                edges.setdefault(own, set()).add(other)
    return edges


def test_no_folder_cycle() -> None:
    edges = folder_edges()

    def reached(start: Path) -> set[Path]:
        seen: set[Path] = set()
        todo = [start]
        while todo:
            for following in edges.get(todo.pop(), set()) - seen:
                seen.add(following)
                todo.append(following)
        return seen

    assert not [str(folder) for folder in edges if folder in reached(folder)]


def test_importing_the_face_is_cheap() -> None:
    """`import llmspec` and the language itself load no torch."""
    code = "import sys, llmspec, llmspec.dsl; print('torch' in sys.modules, 'lark' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]


# --------------------------------------------------------------------------------------------------
# Sizes


def functions_of(tree: ast.AST) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    """Outermost functions and methods."""
    for child in ast.iter_child_nodes(tree):
        if isinstance(child, ast.ClassDef):
            yield from functions_of(child)
        elif isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
            yield child


def percentile(values: list[int], share: float) -> int:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def test_files_are_short() -> None:
    lengths = [len((ROOT / path).read_text().splitlines()) for path in sources()]
    assert statistics.median(lengths) < 200
    assert percentile(lengths, 0.95) < 700


def test_functions_are_short() -> None:
    lengths = [
        (f.end_lineno or f.lineno) - f.lineno + 1
        for tree in sources().values()
        for f in functions_of(tree)
    ]
    assert statistics.median(lengths) <= 10
    assert percentile(lengths, 0.95) < 55
    assert sum(n > 100 for n in lengths) < 0.01 * len(lengths)


def test_lines_are_short() -> None:
    """100 columns; what a type checker must be told at the end of a line is not counted."""
    wide = [
        f"{path}:{number}"
        for path in sources()
        for number, line in enumerate((ROOT / path).read_text().splitlines(), 1)
        if len(line.partition("  # type:")[0]) > 100 and "https://" not in line
    ]
    assert not wide


def test_packages_are_packages() -> None:
    """Every folder with modules has an __init__.py, so that an installed copy has it too."""
    bare = {p.parent for p in sources() if not (ROOT / p.parent / "__init__.py").is_file()}
    assert not bare


# --------------------------------------------------------------------------------------------------
# Words


TEXT = (".py", ".md", ".llmspec", ".toml", ".jinja", ".txt", ".lark", ".sh", ".yaml", ".json", "")


@cache
def tracked() -> tuple[Path, ...]:
    """Files of the project: git's list where there is one, else every file but the unpacked."""
    done = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True
    )
    if done.returncode:
        pytest.skip("not a git checkout")
    paths = [ROOT / line for line in done.stdout.splitlines()]
    return tuple(p for p in paths if p.is_file() and not p.is_symlink() and p.suffix in TEXT)


# Written in pieces, so that this file is not its own first finding.
FORBIDDEN = {
    "an absolute path": re.compile(r"(?<![\w.~/:{}])/(?:" + "home|root|work|Users" + r")/\w"),
    "a number of an issue": re.compile(r"\b(?:iss" + r"ue|ticket) #?\d+\b", re.IGNORECASE),
    "a word of the workshop": re.compile(r"\bwork" + r"place\b|\bhel" + r"per session\b"),
    "a note left behind": re.compile(r"\b(?:FIX" + r"ME|XX" + r"X|HA" + r"CK)\b"),
}


def test_pages_speak_of_the_project_only() -> None:
    """Who wrote it, when and where is not what a reader of the documentation came for."""
    words = re.compile(r"\b(?:ses" + r"sion|assis" + r"tant|chat" + r"bot)s?\b", re.IGNORECASE)
    pages = [p for p in tracked() if p.suffix == ".md"]
    found = [str(p.relative_to(ROOT)) for p in pages if words.search(p.read_text())]
    assert not found


@pytest.mark.parametrize("what", FORBIDDEN)
def test_no_traces(what: str) -> None:
    found = []
    for path in tracked():
        text = path.read_text(errors="replace")
        hit = FORBIDDEN[what].search(text)
        if hit:
            found.append(f"{path.relative_to(ROOT)}: {hit[0]}")
    assert not found


def test_no_todo_without_a_reason() -> None:
    marks = [
        f"{path}:{number}"
        for path in sources()
        for number, line in enumerate((ROOT / path).read_text().splitlines(), 1)
        if re.search(r"\bTODO\b(?!\([^)]+\): \S)", line)
    ]
    assert not marks


# --------------------------------------------------------------------------------------------------
# Everything is tested, everything golden is used


@cache
def test_texts() -> str:
    folder = ROOT / "tests"
    return "\n".join(
        p.read_text() for p in sorted(folder.rglob("*.py")) if p != Path(__file__).resolve()
    )


test_texts.__test__ = False  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", sorted(BY_NAME))
def test_every_operator_has_a_test(name: str) -> None:
    """By its name in quotes or its function: a test of the registry's entry or of its meaning."""
    text = test_texts()
    assert re.search(rf"""["']{name}["']|\b{name}\(|\b{name}\b\s*,""", text), (
        f"no test names the operator {name}"
    )


def test_no_golden_orphans() -> None:
    """A golden file that no test names is never compared."""
    golden = ROOT / "tests" / "golden"
    text = test_texts() + Path(__file__).read_text()
    orphans = [
        str(path.relative_to(golden))
        for path in sorted(golden.rglob("*"))
        if path.is_file()
        and path.stem not in text
        and path.parent.name not in text
        and path.relative_to(golden).parts[0] not in text
    ]
    assert not orphans


@pytest.mark.parametrize("code", sorted(CODES))
def test_every_error_has_a_page(code: str) -> None:
    page = ROOT / "dsl" / "diagnostics" / "pages" / f"{code}.md"
    assert page.is_file(), f"write {page.relative_to(ROOT)}"
    assert len(page.read_text().split()) > 20, "a page tells more than the headline"
    assert code in (ROOT / "docs" / "errors.md").read_text()


def codes_in(room: str) -> set[str]:
    """Codes that a room's code raises, from its string constants."""
    found = set()
    for path, tree in sources().items():
        if path.parts[0] == room and path.name != "codes.py":
            for node in ast.walk(tree):
                if isinstance(node, ast.Constant) and isinstance(node.value, str):
                    found |= set(re.findall(r"\bE\d{4}\b", node.value))
    return found


def test_every_code_that_is_raised_is_known() -> None:
    examples = {"E0203"}  # the command line's own example
    assert codes_in("dsl") | codes_in("compiler") <= set(CODES) | examples
    assert set(CODES) <= codes_in("dsl") | codes_in("compiler"), "nobody raises these"


# --------------------------------------------------------------------------------------------------
# The surface


def flags() -> Iterator[str]:
    top = parser()
    verbs = next(a for a in top._actions if isinstance(a, argparse._SubParsersAction))
    for name, verb in sorted(verbs.choices.items()):
        for action in verb._actions:
            words = action.option_strings or [action.dest]
            if "--help" not in words:
                yield f"llmspec {name} {' '.join(words)}"


def rows_of(kind: str, table: object) -> Iterator[str]:
    rows = table.values() if isinstance(table, dict) else table
    for row in rows:  # type: ignore[attr-defined]
        later = "" if getattr(row, "meaning", True) else "  (later)"  # plan keys all have one
        inner = [o.name for o in getattr(row, "options", ()) if not getattr(o, "derived", False)]
        shown = f"({', '.join(inner)})" if inner else ""
        yield f"{kind} {row.name}{shown}{later}"


def spec_keys() -> Iterator[str]:
    yield from (f"declaration {word}" for word in DECLARATIONS)
    yield from (f"gpu {key}" for key in ALL_DEVICE_KEYS)
    yield from (f"cluster {key}" for key in CLUSTER_KEYS)
    yield from (f"budget {key}" for key in BUDGET_KEYS)
    yield from (f"prefer {word}" for word in Prefer)
    yield from rows_of("operator", options.OPERATORS)
    yield from (f"train {key}" for key in options.TRAIN_KEYS)
    yield from (f"train {key}  (later)" for key in options.TRAIN_KEYS_LATER)
    yield from rows_of("dataset", options.DATASETS)
    yield from rows_of("optimizer", options.OPTIMIZERS)
    yield from rows_of("learning_rate", options.PHASES)
    yield from rows_of("precision", options.PRECISIONS)
    yield from rows_of("objective", options.OBJECTIVES)
    yield from rows_of("plan", options.PLAN)
    yield from (f"schedule {word}" for word in Schedule)


def plan_fields() -> Iterator[str]:
    for kind in (Plan, MeshSizes, UnitPlacement):
        yield from (f"{kind.__name__}.{field.name}" for field in fields(kind))


def test_the_surface_grows_on_purpose(golden) -> None:  # type: ignore[no-untyped-def]
    sections = {
        "Command line": flags(),
        "Language": spec_keys(),
        "plan.json": plan_fields(),
        "Python": [f"llmspec.{name}" for name in llmspec.__all__],
    }
    lines = [f"{title}\n" + "".join(f"  {x}\n" for x in xs) for title, xs in sections.items()]
    golden.check("surface.txt", "\n".join(lines))
