"""A spec and all it imports, read and parsed; names that its declarations may use."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass, field
from pathlib import Path

from llmspec.dsl import syntax
from llmspec.dsl.diagnostics import Diagnostic, did_you_mean, listing, shown
from llmspec.dsl.layout import lay_out
from llmspec.dsl.parse import MAX_BYTES, parse
from llmspec.dsl.program import Span

LIBRARY = Path(__file__).resolve().parent / "library"


@dataclass(eq=False)
class Scope:
    """One file and what its names mean: its own declarations and those of the files it imports."""

    path: str
    file: syntax.File
    models: dict[str, tuple[syntax.ModelDeclaration, Scope]] = field(default_factory=dict)
    sections: dict[tuple[str, str], tuple[syntax.Section, Scope]] = field(default_factory=dict)
    """Named sections by kind and name; devices by their id."""


@dataclass
class Sources:
    """Every text that was read, by the path shown to the user, and every fault on the way."""

    texts: dict[str, str] = field(default_factory=dict)
    diagnostics: list[Diagnostic] = field(default_factory=list)
    scopes: dict[str, Scope] = field(default_factory=dict)
    canonical: dict[str, str] = field(default_factory=dict)

    def report(self, diagnostic: Diagnostic) -> None:
        same = (d for d in self.diagnostics if d.code == diagnostic.code)
        if not any(d.span == diagnostic.span and d.message == diagnostic.message for d in same):
            self.diagnostics.append(diagnostic)

    def hash(self) -> str:
        """sha256 over what the texts say, in order of reading; spaces and comments do not count."""
        together = "\0".join(self.canonical.values())
        return hashlib.sha256(together.encode("utf-8", "surrogatepass")).hexdigest()[:12]

    # Reading

    def load(self, path: str, text: str | None = None) -> Scope:
        return self.open(path, os.path.realpath(path), text, (), None)

    def open(
        self,
        shown_path: str,
        real_path: str,
        text: str | None,
        chain: tuple[tuple[str, str], ...],
        where: Span | None,
    ) -> Scope:
        """chain: (real path, shown path) of the files that are being imported, outermost first."""
        if real_path in self.scopes:
            return self.scopes[real_path]
        if text is None:
            text = self.read(shown_path, real_path, where)
        self.texts[shown_path] = text
        file, faults = parse(shown_path, text)
        for diagnostic in faults:
            self.report(diagnostic)
        self.canonical[real_path] = canonical(text)
        scope = Scope(shown_path, file)
        chain = (*chain, (real_path, shown_path))
        for declaration in file.declarations:
            if isinstance(declaration, syntax.Import):
                self.follow(scope, declaration, chain)
        self.declare(scope)
        self.scopes[real_path] = scope
        return scope

    def read(self, shown_path: str, real_path: str, where: Span | None) -> str:
        """The file's text; an empty one, and a diagnostic, when it cannot be had."""
        text, problem = read_text(real_path)
        if problem is not None:
            code, message = problem
            self.report(Diagnostic(code=code, message=message.format(path=shown_path), span=where))
        return text

    def follow(
        self, scope: Scope, declaration: syntax.Import, chain: tuple[tuple[str, str], ...]
    ) -> None:
        found = self.locate(scope, declaration, chain[-1][0])
        if found is None:
            return
        real_path, shown_path = found
        reals = [real for real, _ in chain]
        if real_path in reals:
            around = [s for _, s in chain[reals.index(real_path) :]]
            self.report(
                Diagnostic(
                    code="E0007",
                    message="files import each other in a circle",
                    span=declaration.span,
                    label=" -> ".join([*around, around[0]]),
                )
            )
            return
        if len(chain) > 32:
            self.report(
                Diagnostic(
                    code="E0005", message="imports are more than 32 deep", span=declaration.span
                )
            )
            return
        other = self.open(shown_path, real_path, None, chain, declaration.span)
        for name, model in other.models.items():
            if model[1] is other:
                self.add_model(scope, name, model, declaration.span)
        for key, section in other.sections.items():
            if section[1] is other:
                self.add_section(scope, key, section, declaration.span)

    def locate(
        self, scope: Scope, declaration: syntax.Import, importer: str
    ) -> tuple[str, str] | None:
        target = declaration.target
        if isinstance(target, syntax.Name):
            path = LIBRARY / f"{target.text}.llmspec"
            if path.is_file():
                return str(path), f"library/{target.text}.llmspec"
            known = sorted(p.stem for p in LIBRARY.glob("*.llmspec"))
            self.report(
                Diagnostic(
                    code="E0008",
                    message=f"the library has no `{shown(target.text)}`",
                    span=target.span,
                    label=f"it has {listing(known)}",
                    helps=did_you_mean(
                        target.text,
                        known,
                        otherwise='a file is imported as `import "name.llmspec"`',
                    ),
                )
            )
            return None
        if "\0" in target.value:
            real_path = ""
        else:
            real_path = os.path.realpath(os.path.join(os.path.dirname(importer), target.value))
        if not os.path.isfile(real_path):
            self.report(
                Diagnostic(
                    code="E0006",
                    message=f"there is no file `{shown(target.value)}`",
                    span=target.span,
                    label="looked for beside the file that imports it",
                )
            )
            return None
        folder = os.path.dirname(scope.path)
        return real_path, os.path.normpath(os.path.join(folder, target.value))

    # Names

    def declare(self, scope: Scope) -> None:
        for declaration in scope.file.declarations:
            if isinstance(declaration, syntax.ModelDeclaration):
                entry = (declaration, scope)
                self.add_model(scope, declaration.name.text, entry, declaration.name.span)
            elif isinstance(declaration, syntax.Section):
                self.add_section(
                    scope,
                    (declaration.kind, declaration.name or ""),
                    (declaration, scope),
                    declaration.head,
                )

    def add_model(
        self,
        scope: Scope,
        name: str,
        entry: tuple[syntax.ModelDeclaration, Scope],
        span: Span,
    ) -> None:
        known = scope.models.get(name)
        if known is not None and known[0] is not entry[0] and not shadows(scope, known, entry):
            self.twice(f"model `{shown(name)}`", span, known[0].name.span)
        else:
            scope.models[name] = entry

    def add_section(
        self, scope: Scope, key: tuple[str, str], entry: tuple[syntax.Section, Scope], span: Span
    ) -> None:
        known = scope.sections.get(key)
        if known is not None and known[0] is not entry[0] and not shadows(scope, known, entry):
            self.twice(
                f"{key[0]} `{shown(key[1])}`" if key[1] else f"`{key[0]}`", span, known[0].head
            )
        else:
            scope.sections[key] = entry

    def twice(self, what: str, span: Span, first: Span) -> None:
        self.report(
            Diagnostic(
                code="E0217",
                message=f"{what} is declared twice",
                span=span,
                label="here again",
                secondary=((first, "first here"),),
            )
        )


def shadows(scope: Scope, known: tuple[object, Scope], entry: tuple[object, Scope]) -> bool:
    """A file's own declaration takes the place of an imported one."""
    return entry[1] is scope and known[1] is not scope


def read_text(path: str) -> tuple[str, tuple[str, str] | None]:
    """The text of a file, or an empty one and (code, message) with `{path}` in it."""
    try:
        if os.path.isdir(path):
            return "", ("E0001", "`{path}` is a folder, not a file")
        if os.path.getsize(path) > MAX_BYTES:
            return "", ("E0004", f"`{{path}}` is larger than {MAX_BYTES // 1024} KiB")
        raw = Path(path).read_bytes()
    except FileNotFoundError:
        return "", ("E0006", "there is no file `{path}`")
    except (OSError, ValueError) as error:
        return "", ("E0001", "`{path}` cannot be read: " + clean(error))
    if b"\0" in raw:
        return "", ("E0003", "`{path}` is a binary file, not a spec")
    try:
        return raw.decode("utf-8-sig"), None
    except UnicodeDecodeError as error:
        return "", ("E0003", f"`{{path}}` is not UTF-8 text (byte {error.start})")


def clean(error: Exception) -> str:
    reason = getattr(error, "strerror", None) or str(error)
    return reason.lower().replace("{", "(").replace("}", ")")


def canonical(text: str) -> str:
    """The words of a text, one space apart, one statement a line."""
    layout, _ = lay_out("", text)
    words: list[str] = []
    for token in layout.tokens:
        if token.kind == "newline" or token.text == ";":
            if words and words[-1] != "\n" and layout.blanked[token.start] in "\n;":
                words.append("\n")
        elif token.kind not in ("space", "comment"):
            words.append(token.text)
    return " ".join(words).strip()
