"""What stands after `model =`: a name, a template's call, `python(…)` or `huggingface(…)`."""

from __future__ import annotations

import os

from llmspec.dsl import syntax
from llmspec.dsl.diagnostics import Fault, did_you_mean, fault, shown
from llmspec.dsl.models import Elaboration, bind_parameters
from llmspec.dsl.program import AnyModel, HuggingFaceModel, Option, PythonModel, Span
from llmspec.dsl.shapes import Bound
from llmspec.dsl.sources import Scope, Sources
from llmspec.dsl.units import Measure
from llmspec.dsl.values import Value, Word, evaluate


class ModelFinder:
    """Follows names through scopes; a model without arguments is elaborated once."""

    def __init__(self, scope: Scope, sources: Sources, folder: str) -> None:
        self.scope = scope
        self.sources = sources
        self.folder = folder
        self.models: dict[int, AnyModel | None] = {}
        self.active: list[str] = []

    def model_value(self, node: syntax.Node, scope: Scope, name: str) -> AnyModel | None:
        match node:
            case syntax.Name():
                declaration, home = self.find_model(node.text, scope, node.span)
                return self.in_scope(home).model_of(declaration, (), node.span)
            case syntax.Call(function=syntax.Name(text="python")):
                return self.python_model(node, name)
            case syntax.Call(function=syntax.Name(text="huggingface")):
                return self.huggingface_model(node, name)
            case syntax.Call():
                function = node.function
                declaration, home = self.find_model(function.text, scope, function.span)
                return self.in_scope(home).model_of(
                    declaration, node.arguments, node.span, name=name if name != "model" else None
                )
            case _:
                raise fault("E0206", "a model is expected here", node.span)

    def in_scope(self, home: Scope) -> ModelFinder:
        if home is self.scope:
            return self
        other = ModelFinder(home, self.sources, self.folder)
        other.models, other.active = self.models, self.active
        return other

    def find_model(
        self, name: str, scope: Scope, span: Span
    ) -> tuple[syntax.ModelDeclaration, Scope]:
        if name in scope.models:
            return scope.models[name]
        # not the one that is being defined by this very line
        known = [*(n for n in scope.models if n not in self.active), "python", "huggingface"]
        helps = did_you_mean(name, known)
        if not helps and name.split("_")[0].rstrip("0123456789") in ("llama", "gpt"):
            helps = ("`import llama` or `import gpt2` brings the library's models",)
        raise fault("E0201", f"no model named `{shown(name)}` is known", span, helps=helps)

    def model_of(
        self,
        declaration: syntax.ModelDeclaration,
        arguments: tuple[syntax.Argument, ...],
        span: Span,
        *,
        name: str | None = None,
    ) -> AnyModel | None:
        own = declaration.name.text
        if own in self.active:
            chain = " -> ".join([*self.active[self.active.index(own) :], own])
            raise fault("E0214", f"model `{own}` is made of itself", declaration.name.span, chain)
        if declaration.value is not None and arguments:
            raise fault("E0216", f"model `{own}` takes no values", arguments[0].span)
        if not arguments and id(declaration) in self.models:
            return self.models[id(declaration)]
        self.active.append(own)
        try:
            if declaration.value is not None:
                made = self.model_value(declaration.value, self.scope, own)
            else:
                made = self.elaborate(declaration, arguments, span, name or own)
        except Fault as error:
            self.sources.report(error.diagnostic)
            made = None
        finally:
            self.active.pop()
        if not arguments:
            self.models[id(declaration)] = made
        return made

    def elaborate(
        self,
        declaration: syntax.ModelDeclaration,
        arguments: tuple[syntax.Argument, ...],
        span: Span,
        name: str,
    ) -> AnyModel | None:
        def nothing(unknown: str) -> Value:
            raise KeyError(unknown)

        env: dict[str, Bound] = bind_parameters(declaration, arguments, nothing, span)
        assert declaration.body is not None, "a declaration has a value or a body"
        model = Elaboration(name, span, env, self.sources.report)
        return model.elaborate(declaration.body)

    def python_model(self, node: syntax.Call, name: str) -> PythonModel:
        texts = [a for a in node.arguments if a.name is None]
        values = [evaluate(a.value) for a in texts]
        if len(values) != 2 or not all(isinstance(v, str) for v in values):
            raise fault(
                "E0206",
                "`python` takes a file and a name, then options",
                node.span,
                helps=('it is written like `python("my_model.py", "MyModel", dim=512)`',),
            )
        path, attribute = str(values[0]), str(values[1])
        if not attribute.isidentifier():
            raise fault("E0206", "this is not the name of a class or function", texts[1].span)
        must_exist(self.folder, path, texts[0].span)
        named = {a.name: a for a in node.arguments if a.name is not None}
        if len(named) + 2 != len(node.arguments):
            raise fault("E0217", "an option is given twice", node.span)
        return PythonModel(
            name=name,
            path=path,
            attribute=attribute,
            arguments=tuple((k, scalar(a)) for k, a in named.items()),
            span=node.span,
        )

    def huggingface_model(self, node: syntax.Call, name: str) -> HuggingFaceModel:
        values = [evaluate(a.value) for a in node.arguments if a.name is None]
        if len(node.arguments) != 1 or len(values) != 1 or not isinstance(values[0], str):
            raise fault("E0206", "`huggingface` takes the path of a config.json", node.span)
        must_exist(self.folder, values[0], node.arguments[0].span)
        return HuggingFaceModel(name=name, path=values[0], span=node.span)


def must_exist(folder: str, path: str, span: Span) -> None:
    if "\0" not in path and os.path.isfile(os.path.join(folder, path)):
        return
    raise fault("E0006", f"there is no file `{shown(path)}`", span, "looked for beside the spec")


def scalar(argument: syntax.Argument) -> Option:
    """A value that can be handed to Python as it is."""
    value = evaluate(argument.value)
    if isinstance(value, tuple) and all(isinstance(v, bool | int | float | str) for v in value):
        return value  # type: ignore[return-value]
    if isinstance(value, Word | Measure | tuple):
        raise fault(
            "E0206",
            "an option of `python` is a number, a string, `true`, `false`, `none` or a list",
            argument.span,
        )
    return value
