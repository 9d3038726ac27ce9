"""A model from the user's own Python file. Runs that file: only when the user said so."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import nn

from llmspec.compiler.errors import Unsupported
from llmspec.compiler.raising.recording import NotAModule, record
from llmspec.dsl.program import PythonModel


@contextmanager
def _importable(folder: Path) -> Iterator[None]:
    """The file may import its neighbours."""
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path.remove(str(folder))


def _where(error: BaseException, path: Path) -> str:
    """The innermost line of the user's file that an error came through."""
    line, trace = None, error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code.co_filename == str(path):
            line = trace.tb_lineno
        trace = trace.tb_next
    return f" (line {line})" if line is not None else ""


def _reason(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0]}" if text else type(error).__name__


def _imported(model: PythonModel, path: Path) -> ModuleType:
    name = f"llmspec_user_{model.name}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None or not path.is_file():
        raise Unsupported(f"no Python file `{model.path}`", model.span)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        with _importable(path.parent):
            spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        what = f"`{model.path}` cannot be imported: {_reason(error)}{_where(error, path)}"
        raise Unsupported(what, model.span) from error
    return module


def _plain(value: Any) -> Any:
    return [_plain(v) for v in value] if isinstance(value, tuple) else value


def load_module(model: PythonModel, folder: str | Path) -> nn.Module:
    """The module that the spec names, without memory, its initialisation recorded.

    Errors: Unsupported, in terms of the user's file.
    """
    path = (Path(folder) / model.path).resolve()
    factory = getattr(_imported(model, path), model.attribute, None)
    if not callable(factory):
        raise Unsupported(f"`{model.path}` has no class `{model.attribute}`", model.span)
    arguments = {name: _plain(value) for name, value in model.arguments}
    try:
        with _importable(path.parent):
            module = record(lambda: factory(**arguments))
    except Unsupported as error:
        raise Unsupported(error.what, model.span) from error
    except NotAModule:
        raise Unsupported(f"`{model.attribute}` gives no torch.nn.Module", model.span) from None
    except Exception as error:
        what = f"`{model.attribute}` cannot be built: {_reason(error)}{_where(error, path)}"
        raise Unsupported(what, model.span) from error
    return module
