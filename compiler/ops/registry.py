"""The operator registry: what the compiler must know of an operator of the dialect, in one entry
each.

An entry is complete or it is not accepted: `register` refuses one that lacks its placement rule,
    its
operation count, what autograd saves, or how it is printed, and names what is missing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from torch import fx

from llmspec.compiler.ops.formula import Formula
from llmspec.compiler.placement import (
    PARTIAL,
    SHADOW,
    WHOLE,
    Collective,
    Split,
    State,
)

Shape = tuple[int, ...]
Factors = tuple[str, ...]


# --------------------------------------------------------------------------------------------------
# Placement rules


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """An operator as an index expression over factors, for one node with its shapes.

    operands, result: per dimension, the factors it is made of, major first: a fused dimension of
        heads ×
        head size is `("h", "e")`. Only a dimension's major factor can be split.
    sizes: of each factor.
    whole: factors that every rank needs whole (a norm's width, attention's tokens).
    uneven: factors that may be split into chunks of different size.
    linear: groups of operands in which the operator is jointly linear, so that partial sums pass
        through.
    completed: contracted factors over which the local operator sums by itself (a sharded loss); its
        result is whole then, not partial.
    integer: operands without a gradient (token ids).
    chooses: the result is of integers: whole on every rank, whatever it is made of.
    injects: the backward adds to the gradient by itself: ranks with a term each would add it
        several times, so it is never in shadow.
    """

    operands: tuple[tuple[Factors, ...], ...]
    result: tuple[Factors, ...]
    sizes: dict[str, int]
    whole: frozenset[str] = frozenset()
    uneven: frozenset[str] = frozenset()
    linear: tuple[tuple[int, ...], ...] = ()
    completed: frozenset[str] = frozenset()
    integer: frozenset[int] = frozenset()
    chooses: bool = False
    injects: bool = False


@dataclass(frozen=True, slots=True)
class Choice:
    """One legal placement of one node on one axis. `name` is what a plan file says."""

    name: str
    operands: tuple[State, ...]
    result: State

    @property
    def factor(self) -> str | None:
        return self.name.removeprefix("split ") if self.name.startswith("split ") else None


def _find(dims: tuple[Factors, ...], factor: str) -> int | None:
    """The dimension whose major factor is `factor`; -1 when it stands inside one; None when
    absent.
    """
    for i, factors in enumerate(dims):
        if factor in factors:
            return i if factors[0] == factor else -1
    return None


def _split_choice(rule: Rule, factor: str) -> Choice | None:
    places = [_find(dims, factor) for dims in rule.operands]
    target = _find(rule.result, factor)
    if -1 in places or target == -1 or all(p is None for p in places):
        return None
    absent = [WHOLE if i in rule.integer else SHADOW for i in range(len(places))]
    operands = tuple(a if p is None else Split(p) for p, a in zip(places, absent, strict=True))
    if target is not None:
        return Choice(f"split {factor}", operands, Split(target))
    return Choice(f"split {factor}", operands, WHOLE if factor in rule.completed else PARTIAL)


def choices(rule: Rule, ranks: int) -> tuple[Choice, ...]:
    """Every legal placement of an operator with this rule on an axis of `ranks`."""
    names = ["whole", "shadow", *(f"split {factor}" for factor in rule.sizes)]
    names += [f"partial {i}" if i else "partial" for i in range(len(rule.linear))]
    made = (choice_named(name, rule, ranks) for name in names)
    return tuple(choice for choice in made if choice is not None)


def choice_named(name: str, rule: Rule, ranks: int) -> Choice | None:
    """One of `choices`; None when it is not legal."""
    kind, _, what = name.partition(" ")
    count = len(rule.operands)
    match kind:
        case "whole":
            return Choice(name, (WHOLE,) * count, WHOLE)
        case "shadow" if not rule.injects:
            operands = tuple(WHOLE if i in rule.integer else SHADOW for i in range(count))
            return Choice(name, operands, WHOLE if rule.chooses else SHADOW)
        case "split" if what in rule.sizes and what not in rule.whole:
            size = rule.sizes[what]
            fits = size % ranks == 0 or (what in rule.uneven and size >= ranks)
            return _split_choice(rule, what) if fits and size > 1 else None
        case "partial" if int(what or 0) < len(rule.linear):
            group = rule.linear[int(what or 0)]
            operands = tuple(
                PARTIAL if k in group else WHOLE if k in rule.integer else SHADOW
                for k in range(count)
            )
            return Choice(name, operands, PARTIAL)
    return None


# --------------------------------------------------------------------------------------------------
# Entries


@dataclass(frozen=True, slots=True)
class Shapes:
    """What a cost sees of one node: shapes on one rank, of the tensor operands in order and of
    the result.
    """

    operands: tuple[Shape, ...]
    result: Shape


@dataclass(frozen=True, slots=True)
class Saved:
    """What autograd keeps of one node until its backward.

    operands, result: which values are kept as they are (a value kept twice counts once).
    extra_elements, extra_bytes: kept besides (statistics in float32, a mask in bytes).
    weight_elements: of weights' sizes, kept besides: as many whatever the micro-batch.
    """

    operands: tuple[int, ...] = ()
    result: bool = False
    extra_bytes: int = 0
    extra_elements: int = 0
    weight_elements: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Kernel:
    """One of the things that an operator runs, `count` times.

    moved: bytes read and written. rows, columns, depth: of a matrix product; 0: it is none.
    """

    moved: int
    rows: int = 0
    columns: int = 0
    depth: int = 0
    count: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Sends:
    """What an operator itself sends over an axis other than `tensor`, on one rank.

    elements_forward, elements_backward: of one collective, counted as `cost.network.collective_s`
        counts its bytes; 0: that direction sends nothing. count: how many of them.
    hidden: they travel while this operator computes. wide: in float32, whatever the operator
        computes in. what: the values, for people.
    """

    axis: str
    kind: Collective
    elements_forward: int
    elements_backward: int
    count: int = 1
    hidden: bool = False
    wide: bool = False
    what: str = ""


@dataclass(frozen=True, slots=True)
class Numbers:
    """What an operator sends in its forward besides: a few numbers of each row or expert, too few
    to take time, but a collective like any other. size_bytes: of the whole value."""

    axis: str
    kind: Collective
    size_bytes: int
    count: int = 1


@dataclass(frozen=True, slots=True)
class Tiled:
    """A product inside one kernel of its own, such as attention's: `blocks` of work that may run
    side by side, each over `depth` keys.
    """

    blocks: float
    depth: float


Moved = Callable[[fx.Node, Shapes, int, frozenset[str]], tuple[float, float]]
"""(node, shapes, bytes of an element, names of the fused kernels) -> bytes forward and backward."""


@dataclass(frozen=True, slots=True)
class Printed:
    """How a node is printed: an expression, and the names that the emitted module must import.

    imports: (module, name) pairs; module "" is torch itself (`F` and `torch` are always there).
    """

    text: str
    imports: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One operator of the dialect.

    function: its meaning in plain PyTorch on whole tensors: the fx target, and the reference.
    rule: placement rule of a node (shapes are in `node.meta["shape"]`).
    flops: floating-point operations of the forward pass, a multiply-add counted as two; the
        backward
        of a contraction is twice that (`backward_flops`), of anything else once.
    saved: what autograd keeps.
    render: the printed call. It gets the names of the node's arguments, already rendered, and the
        choice.
    contraction: True for what runs on matrix units.
    alias: the result shares its operand's storage.
    """

    name: str
    function: Callable[..., Any]
    rule: Callable[[fx.Node], Rule]
    flops: Callable[[fx.Node, Shapes], float]
    saved: Callable[[fx.Node, Shapes], Saved]
    render: Callable[[fx.Node, Sequence[str], Localised], Printed]
    contraction: bool = False
    backward_factor: Callable[[fx.Node], float] = lambda node: 2.0
    """Of a contraction: what the backward executes for each operation of the forward."""
    alias: bool = False
    passes: bool = False
    """Its result is its first operand, in the same memory."""
    looks_up: bool = False
    """Of its operands it reads no more than it gives: a table's rows."""
    groups: Callable[[Shapes], int] | None = None
    """Of a contraction: into how many products its rows are divided."""
    model_flops: Callable[[fx.Node, Shapes], float] | None = None
    """What `model_flops` counts where that differs from what is executed (causal attention's
    half).
    """
    moved: Moved | None = None
    """Bytes between device and memory, where several kernels make more than operands and result."""
    hands_on: bool = False
    """The gradient of its result is that of each operand, and no other tensor."""
    joins: Callable[[fx.Node], bool] | None = None
    """Whether the kernel that makes its first operand does it too: its backward sums the gradient
    of the other."""
    tiled: Callable[[fx.Node, Shapes], Tiled | None] | None = None
    """Of a contraction that has a kernel of its own: it runs at the device's rate of attention."""
    sends: Callable[[fx.Node, Shapes], tuple[Sends, ...]] | None = None
    """What it sends over the context or expert axis; None: nothing."""
    numbers: Callable[[fx.Node, Shapes, int], tuple[Numbers, ...]] | None = None
    """Likewise, in a compute type of so many bytes, what takes no time."""
    buffers: Callable[[fx.Node, Shapes, int], int] | None = None
    """Bytes that its backward has alive besides its result and the gradients of its operands, in a
    compute type of so many bytes; None: nothing."""
    forward_buffers: Callable[[fx.Node, Shapes, int], int] | None = None
    """Likewise of its forward, besides its operands, what it keeps and its result."""
    rates: tuple[float | None, float | None] = (None, None)
    """Bytes/s that were measured of it, forward and backward; None: the memory's are predicted."""
    lean: tuple[str, Callable[[fx.Node, Shapes], Saved]] | None = None
    """A fused kernel, and what autograd keeps where software has it."""
    overwrites: str | None = None
    """The fused kernel, where software has it, that needs no buffers and leaves the gradient where
    the operand was."""
    formula: Formula | None = None
    """How it is computed inside a kernel, together with others; None: it stands alone."""
    kernels: Callable[[fx.Node, Shapes, int], tuple[Sequence[Kernel], Sequence[Kernel]]] | None = (
        None
    )
    """What forward and backward run in a compute type of so many bytes, where that is neither one
    product nor one pass over operands and result."""
    makes_gradients: bool = False
    """Its forward makes the gradients of its operands, which is what it keeps."""
    remark: Callable[[fx.Node, Shapes, int], tuple[str, ...]] | None = None
    """Lines above the printed call, for a compute type of so many bytes; None: none."""
    late: bool = False
    """A product of its first operand and a weight, whose gradient a split backward may leave for
    later: `render` prints the runtime's `linear` where the node is marked so."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Localised:
    """How one node was placed on the tensor axis, for printing.

    factor: the split factor, or None. axis: the expression of the mesh axis (`self.tensor`), of
        so many ranks.
    whole: the node's shapes before placing, operands then result.
    """

    factor: str | None = None
    axis: str = "self.tensor"
    ranks: int = 1
    whole_operands: tuple[Shape, ...] = ()
    whole_result: Shape = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class ContextForm:
    """What takes an operator's place on a rank that has a part of the tokens.

    function: an operator of the dialect. arguments: those that it takes after the operator's own.
    operands, result: where it has them on the context axis.
    """

    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    operands: tuple[State, ...]
    result: State


MakeForm = Callable[[fx.Node, tuple[State, ...], int, str], ContextForm | None]
"""(node on whole sequences, where its operands are, context ranks, style) -> the form, or None
where the rule alone says what to do."""

REGISTRY: dict[Callable[..., Any], Entry] = {}
CONTEXT_FORMS: dict[Callable[..., Any], MakeForm] = {}
"""For operators that need to know where their tokens stand, or others' tokens."""
BY_NAME: dict[str, Entry] = {}


def register(entry: Entry) -> Entry:
    """Add an operator.

    Errors: ValueError when a part is missing or the name is taken.
    """
    for part in ("function", "rule", "flops", "saved", "render"):
        if getattr(entry, part) is None:
            raise ValueError(f"operator {entry.name} has no {part}")
    if entry.name in BY_NAME:
        raise ValueError(f"operator {entry.name} is registered twice")
    REGISTRY[entry.function] = BY_NAME[entry.name] = entry
    return entry


def entry_of(node: fx.Node) -> Entry:
    """A kernel of several operators carries its own."""
    own = getattr(node.target, "entry", None)
    return own if isinstance(own, Entry) else REGISTRY[node.target]  # type: ignore[index]


def tensor_operands(node: fx.Node) -> tuple[fx.Node, ...]:
    """The node's tensor operands in order (all its input nodes: scalars are plain Python
    values).
    """
    return tuple(a for a in node.args if isinstance(a, fx.Node))


def late_weight(node: fx.Node) -> fx.Node | None:
    """The parameter whose gradient a split backward leaves for later, if the node has one."""
    entry = REGISTRY.get(node.target) if node.op == "call_function" else None  # type: ignore[arg-type]
    if entry is None or not entry.late:
        return None
    weight = tensor_operands(node)[1]
    return weight if weight.op == "get_attr" else None


def shape_of(node: fx.Node) -> Shape:
    return node.meta["shape"]


def shapes_of(node: fx.Node) -> Shapes:
    return Shapes(tuple(shape_of(o) for o in tensor_operands(node)), shape_of(node))


def numel(shape: Shape) -> int:
    return math.prod(shape)


# --------------------------------------------------------------------------------------------------
# Pieces that many entries share


@dataclass(frozen=True, slots=True)
class Letters:
    """Builds rules from letters: one letter a factor, a dimension of several in brackets: `"b t
    (k g) e"`.
    """

    text: str
    dims: tuple[Factors, ...] = field(init=False)

    def __post_init__(self) -> None:
        out: list[Factors] = []
        group: list[str] | None = None
        for token in self.text.replace("(", " ( ").replace(")", " ) ").split():
            if token == "(":
                group = []
            elif token == ")":
                out.append(tuple(group or ()))
                group = None
            elif group is not None:
                group.append(token)
            else:
                out.append((token,))
        object.__setattr__(self, "dims", tuple(out))


def index_rule(expression: str, sizes: dict[str, int], **more: Any) -> Rule:
    """A rule from `"b t i, o i -> b t o"`."""
    operands, result = _indices(expression)
    return Rule(operands=operands, result=result, sizes=sizes, **more)


@cache
def _indices(expression: str) -> tuple[tuple[tuple[Factors, ...], ...], tuple[Factors, ...]]:
    """Of operands and result."""
    left, _, right = expression.partition("->")
    return tuple(Letters(part).dims for part in left.split(",")), Letters(right).dims


def letters(count: int, skip: str = "") -> list[str]:
    return [c for c in "abcdefghijklmnopqrsuvwxyz" if c not in skip][:count]
