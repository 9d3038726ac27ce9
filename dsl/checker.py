"""A spec and all it imports in; a `Program`, or every fault, out."""

from __future__ import annotations

import os
from collections.abc import Iterable

from llmspec.dsl import syntax
from llmspec.dsl.diagnostics import Diagnostic, Fault, did_you_mean, fault, listing, shown
from llmspec.dsl.goals import budget_of, check_goals, prefer_of
from llmspec.dsl.hardware import cluster_of, device_of
from llmspec.dsl.kernels import kernels_of
from llmspec.dsl.legality import check_pins
from llmspec.dsl.model_values import ModelFinder, must_exist
from llmspec.dsl.pins import Pins
from llmspec.dsl.plans import constraints_of
from llmspec.dsl.program import (
    AnyModel,
    Cluster,
    Constraint,
    Program,
    Span,
    Train,
)
from llmspec.dsl.sources import Scope, Sources
from llmspec.dsl.training import Context, read_trains, train_keys


class Checker:
    """Holds what one check has found so far; faults go to `sources`."""

    def __init__(self, scope: Scope, sources: Sources, folder: str) -> None:
        self.scope = scope
        self.sources = sources
        self.folder = folder
        self.finder = ModelFinder(scope, sources, folder)

    # Sections

    def own(self, kind: str) -> list[syntax.Section]:
        return [
            d
            for d in self.scope.file.declarations
            if isinstance(d, syntax.Section) and d.kind == kind
        ]

    def program(self, train_name: str | None) -> Program | None:
        self.check_unused()
        section = self.attempt(lambda: self.pick_train(train_name))
        if section is None:
            return None
        nodes, choices, faults = train_keys(section)
        self.collect(faults)
        model = self.attempt(lambda: self.train_model(section, nodes))
        cluster = self.attempt(lambda: self.train_cluster(section, nodes))
        context = Context(nodes=nodes, section=section, model=model, cluster=cluster)
        trains, faults = read_trains(context, choices)
        self.collect(faults)
        train = trains[0] if trains else None
        self.check_files(train)
        budget = self.attempt(lambda: budget_of(self.own("budget"), cluster))
        lines = [d for d in self.scope.file.declarations if isinstance(d, syntax.Prefer)]
        prefer = self.attempt(lambda: prefer_of(lines))
        plan = self.plan(nodes, model, cluster, train)
        if prefer and budget and cluster and train:
            self.attempt(lambda: check_goals(lines, budget, cluster, train))
        if self.sources.diagnostics or not (model and cluster and train and budget and prefer):
            return None
        return Program(
            path=self.scope.path,
            folder=self.folder,
            source_hash=self.sources.hash(),
            model=model,
            cluster=cluster,
            train=train,
            budget=budget,
            plan=plan,
            prefer=prefer,
            trains=trains if len(trains) > 1 else (),
        )

    def attempt(self, read):  # type: ignore[no-untyped-def]
        try:
            return read()
        except Fault as error:
            self.sources.report(error.diagnostic)
            return None

    def collect(self, faults: Iterable[Fault]) -> None:
        for error in faults:
            self.sources.report(error.diagnostic)

    def check_unused(self) -> None:
        """Whole models, clusters and devices that no train block uses are checked all the same."""
        for declaration in self.scope.file.declarations:
            if isinstance(declaration, syntax.ModelDeclaration):
                if all(p.default is not None for p in declaration.parameters):
                    self.attempt(lambda d=declaration: self.finder.model_of(d, (), d.name.span))
            elif isinstance(declaration, syntax.Section):
                if declaration.kind == "cluster":
                    self.attempt(lambda d=declaration: cluster_of(d, self.scope, self.sources))
                elif declaration.kind in ("gpu", "cpu"):
                    self.attempt(lambda d=declaration: device_of(d))
                elif declaration.kind == "kernels":
                    self.attempt(lambda d=declaration: kernels_of(d))

    def pick_train(self, name: str | None) -> syntax.Section:
        blocks = self.own("train")
        names = [b.name or "train" for b in blocks]
        if not blocks:
            raise fault(
                "E0701",
                "the spec has no train block",
                self.whole(),
                helps=("write `train { model = …; cluster = …; dataset = … }`",),
            )
        if name is not None:
            if name not in names:
                raise fault(
                    "E0702",
                    f"there is no train block named `{shown(name)}`",
                    blocks[0].head,
                    f"there is {listing(names)}",
                    helps=did_you_mean(name, names),
                )
            return blocks[names.index(name)]
        if len(blocks) > 1:
            raise fault(
                "E0702",
                f"the spec has {len(blocks)} train blocks",
                blocks[1].head,
                "the second one",
                secondary=((blocks[0].head, "the first one"),),
                helps=("pick one with " + listing(f"--train {n}" for n in names),),
            )
        return blocks[0]

    def whole(self) -> Span:
        return Span(self.scope.path, 1, 1, 1, 2)

    # What a train block names

    def train_model(
        self, section: syntax.Section, nodes: dict[str, syntax.Node]
    ) -> AnyModel | None:
        if "model" not in nodes:
            raise fault("E0503", "a train block needs `model`", section.head, "not given")
        return self.finder.model_value(nodes["model"], self.scope, "model")

    def train_cluster(self, section: syntax.Section, nodes: dict[str, syntax.Node]) -> Cluster:
        if "cluster" not in nodes:
            raise fault("E0503", "a train block needs `cluster`", section.head, "not given")
        node = nodes["cluster"]
        known = {
            name: entry for (kind, name), entry in self.scope.sections.items() if kind == "cluster"
        }
        if isinstance(node, syntax.Name) and node.text in known:
            declaration, home = known[node.text]
            return cluster_of(declaration, home, self.sources)
        text = node.text if isinstance(node, syntax.Name) else ""
        raise fault(
            "E0201",
            f"no cluster named `{shown(text)}` is known"
            if text
            else "`cluster` is the name of one",
            node.span,
            helps=did_you_mean(
                text, known, otherwise='write `cluster pod { node = 8 * gpu("H100-SXM") }`'
            ),
        )

    def check_files(self, train: Train | None) -> None:
        """Tokenizer files must be here; data may live on the cluster."""
        if train is None:
            return
        calls = [train.dataset]
        if train.validate is not None:
            calls += [c for _, c in train.validate.options if hasattr(c, "arguments")]  # type: ignore[misc]
        for call in calls:
            tokenizer = dict(call.options).get("tokenizer")
            if isinstance(tokenizer, str) and tokenizer != "bytes":
                self.attempt(lambda t=tokenizer, c=call: must_exist(self.folder, t, c.span))

    def plan(
        self,
        nodes: dict[str, syntax.Node],
        model: AnyModel | None,
        cluster: Cluster | None,
        train: Train | None,
    ) -> tuple[Constraint, ...]:
        sections = self.own("plan")
        chosen = self.attempt(lambda: self.pick_plan(sections, nodes.get("plan")))
        picked: tuple[Constraint, ...] = ()
        for section in sections:
            found, faults = constraints_of(section)
            self.collect(faults)
            if section is chosen:
                picked = tuple(found)
        pins = Pins(constraints=picked, model=model, cluster=cluster, train=train)
        self.collect(check_pins(pins))
        return picked

    def pick_plan(
        self, sections: list[syntax.Section], node: syntax.Node | None
    ) -> syntax.Section | None:
        """The one the train block names; else the one without a name; else the only one."""
        names = [s.name or "" for s in sections]
        if node is not None:
            text = node.text if isinstance(node, syntax.Name) else ""
            if text not in names or not text:
                raise fault(
                    "E0201",
                    f"no plan named `{shown(text)}` is known",
                    node.span,
                    helps=did_you_mean(text, names),
                )
            return sections[names.index(text)]
        if "" in names:
            return sections[names.index("")]
        if len(sections) > 1:
            raise fault(
                "E0703",
                f"the spec has {len(sections)} plans, and none is chosen",
                sections[1].head,
                helps=("write in the train block " + listing(f"plan = {n}" for n in names),),
            )
        return sections[0] if sections else None


def check_text(path: str, text: str | None, train: str | None) -> tuple[Program | None, Sources]:
    """Everything that is wrong is in the sources' diagnostics, in the order of the file."""
    sources = Sources()
    scope = sources.load(path, text)
    folder = os.path.dirname(os.path.abspath(path))
    program = None
    if not sources.diagnostics and not scope.file.declarations:
        sources.report(
            Diagnostic(
                code="E0002",
                message=f"`{path}` is empty",
                helps=("`llmspec new` writes a first spec",),
            )
        )
    elif not any(d.code.startswith("E00") for d in sources.diagnostics) and scope.file.declarations:
        syntax_faults = len(sources.diagnostics)
        program = Checker(scope, sources, folder).program(train)
        if syntax_faults:
            drop_consequences(sources)
    sources.diagnostics.sort(key=lambda d: order(d, path))
    return program, sources


def check_everything(path: str, text: str | None = None) -> tuple[Diagnostic, ...]:
    """The faults of every train block of the file (of the file without them, when it has none)."""
    _, sources = check_text(path, text, None)
    names = train_names(sources, path)
    if len(names) < 2:
        return tuple(sources.diagnostics)
    found: dict[Diagnostic, None] = {}
    for name in names:
        _, sources = check_text(path, text, name)
        found.update(dict.fromkeys(sources.diagnostics))
    return tuple(sorted(found, key=lambda d: order(d, path)))


def train_names(sources: Sources, path: str) -> list[str]:
    scope = sources.scopes.get(os.path.realpath(path))
    declarations = scope.file.declarations if scope else ()
    sections = (d for d in declarations if isinstance(d, syntax.Section) and d.kind == "train")
    return list(dict.fromkeys(s.name or "train" for s in sections))


def drop_consequences(sources: Sources) -> None:
    """After a syntax fault, what is missing may only be what could not be read."""
    consequences = ("E0503", "E0201", "E0205", "E0212", "E0218", "E0701", "E0208", "E0210")
    sources.diagnostics[:] = [d for d in sources.diagnostics if d.code not in consequences]


def order(diagnostic: Diagnostic, path: str) -> tuple[bool, str, int, int]:
    span = diagnostic.span
    if span is None:
        return (False, "", 0, 0)
    return (span.path != path, span.path, span.line, span.column)
