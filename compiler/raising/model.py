"""A PyTorch module into the two-level graph of the dialect."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

from torch import nn

from llmspec.compiler.errors import Unsupported
from llmspec.compiler.graph import (
    Init,
    Instance,
    ModelGraph,
    Unit,
    input_shapes,
    propagate_shapes,
)
from llmspec.compiler.ops.loss import cross_entropy
from llmspec.compiler.ops.opaque import opaque
from llmspec.compiler.raising.blocks import Segment, find_chain, fingerprint
from llmspec.compiler.raising.emitter import Boundary
from llmspec.compiler.raising.operators import TABLE
from llmspec.compiler.raising.trace import Trace, shape_of, trace
from llmspec.compiler.raising.unit import UnitRaiser

TRACED_SEQUENCES = 2
"""Sequences of the traced micro-batch: several, so that no axis of 1 is taken for another."""


@contextmanager
def _deep() -> Iterator[None]:
    """Values are raised from the result backwards, as deep as the longest unit is long."""
    before = sys.getrecursionlimit()
    sys.setrecursionlimit(max(before, 50_000))
    try:
        yield
    finally:
        sys.setrecursionlimit(before)


def _snake(name: str) -> str:
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", name).lower().strip("_")


@dataclass(eq=False)
class _ModelRaiser:
    trace: Trace
    units: dict[str, Unit] = field(default_factory=dict)
    instances: list[Instance] = field(default_factory=list)
    owners: dict[str, None] = field(default_factory=dict)
    inits: dict[str, Init] = field(default_factory=dict)
    known: dict[tuple[object, ...], str] = field(default_factory=dict)
    replicated: dict[tuple[str, str], None] = field(default_factory=dict)
    dropout: bool = False

    def run(self) -> None:
        module = self.trace.module
        for node, name in self.trace.parameters.items():
            del node
            self.inits[name] = self.trace.recording.init(name, module.get_parameter(name))
        segments = find_chain(self.trace)
        if len(segments) == 1:
            only = segments[0]
            segments = [only, Segment("", only.stop, only.stop)]
        for position, segment in enumerate(segments):
            last = position == len(segments) - 1
            if segment.path:
                self._block(segment)
            else:
                name = "last" if last else "first" if position == 0 else f"between_{position}"
                self._unit(name, segment, "", last=last)

    def _block(self, segment: Segment) -> None:
        owners = frozenset(self.owners)
        key = fingerprint(self.trace, segment, self.inits, owners)
        if key in self.known:
            self.instances.append(Instance(unit=self.known[key], prefix=segment.path))
            unit = self.units[self.known[key]]
            self._own(unit, segment.path)
            return
        kind = _snake(type(self.trace.module.get_submodule(segment.path)).__name__)
        taken = sum(re.fullmatch(rf"{kind}(_\d+)?", name) is not None for name in self.units)
        name = f"{kind}_{taken + 1}" if taken else kind
        shared = self._unit(name, segment, segment.path, last=False)
        if not shared:
            self.known[key] = name

    def _own(self, unit: Unit, prefix: str) -> None:
        for weight in unit.parameters.values():
            if weight.tied is None:
                path = re.sub(r"_rows_\d+_\d+$", "", weight.path)
                self.owners[f"{prefix}.{path}" if prefix else path] = None

    def _unit(self, name: str, segment: Segment, prefix: str, *, last: bool) -> bool:
        """Raises one unit; True when it owns parameters of others: no other block equals it."""
        parted: frozenset[str] = frozenset()
        unsplit: frozenset[str] = frozenset()
        while True:
            boundary = self._boundary(segment, prefix)
            boundary = replace(boundary, parted=parted, unsplit=unsplit)
            raiser = self._raised(name, segment, boundary, last=last)
            contested = raiser.contested() - unsplit
            if not contested:
                break
            parted, unsplit = parted | contested, unsplit | (contested & parted)
        unit = raiser.builder.unit
        foreign = [
            n
            for n, _ in raiser.names.values()
            if prefix and not n.startswith(f"{prefix}.") and n not in self.owners
        ]
        if foreign:
            self._unit(name, segment, "", last=last)
            return True
        self.units[name] = unit
        self.instances.append(Instance(unit=name, prefix=prefix))
        self.dropout |= raiser.dropout
        self.replicated |= dict.fromkeys(
            (".".join(filter(None, (name, where))), what) for where, what in raiser.replicated()
        )
        self._own(unit, prefix)
        return bool(segment.path) and not prefix

    def _boundary(self, segment: Segment, prefix: str) -> Boundary:
        return Boundary(
            prefix=prefix,
            input=segment.start,
            output=segment.stop,
            input_name="tokens" if segment.start is self.trace.ids else "x",
            owners=frozenset(self.owners),
            sequences=shape_of(self.trace.ids)[0],
        )

    def _raised(self, name: str, segment: Segment, boundary: Boundary, *, last: bool) -> UnitRaiser:
        width = shape_of(segment.stop)[-1] if not last else shape_of(segment.start)[-1]
        raiser = UnitRaiser(self.trace, name, boundary, TABLE, width)
        result = raiser.exact(raiser.value(segment.stop))
        if last:
            targets = raiser.another_input("targets", shape_of(self.trace.ids), "BT")
            result = raiser.emit(cross_entropy, result, targets, label="loss", dims="")
        raiser.finish(result)
        return raiser

    def graph(self, name: str, sequences: int, tokens: int) -> ModelGraph:
        return ModelGraph(
            name=name,
            units=self.units,
            instances=tuple(self.instances),
            sequences=sequences,
            tokens=tokens,
            vocab=shape_of(self.trace.output)[-1],
            dropout=self.dropout,
            replicated=tuple(self.replicated),
        )


def _has_opaque(graph: ModelGraph) -> bool:
    return any(n.target is opaque for unit in graph.units.values() for n in unit.calls())


def _resized(graph: ModelGraph, sequences: int) -> ModelGraph:
    for unit in graph.units.values():
        propagate_shapes(unit, input_shapes(unit, sequences, graph.tokens))
    return replace(graph, sequences=sequences)


def _check_logits(traced: Trace, vocab: int | None) -> None:
    shape = shape_of(traced.output)
    ids = shape_of(traced.ids)
    if len(shape) != 3 or shape[:2] != ids:
        raise Unsupported(
            f"a model whose result is {list(shape)}, not logits [sequences, tokens, vocabulary]"
        )
    if vocab is not None and shape[2] < vocab:
        raise Unsupported(f"a model with logits for {shape[2]} tokens, of a vocabulary of {vocab}")


def raise_model(
    module: nn.Module, name: str, *, sequences: int, tokens: int, vocab: int | None = None
) -> ModelGraph:
    """The graph of a recorded module for micro-batches of `sequences` × `tokens`.

    Errors: Unsupported for what cannot be traced, or started again elsewhere.
    """
    for traced_sequences in dict.fromkeys((TRACED_SEQUENCES, sequences)):
        traced = trace(module, traced_sequences, tokens)
        _check_logits(traced, vocab)
        raiser = _ModelRaiser(traced)
        with _deep():
            raiser.run()
        graph = raiser.graph(name, traced_sequences, tokens)
        if traced_sequences == sequences or not _has_opaque(graph):
            break
    return graph if graph.sequences == sequences else _resized(graph, sequences)
