"""The plan: every decision between a checked spec and an emitted program, and its predictions.

A frozen value that round-trips through JSON. Search writes it; emission reads nothing else but the
program and it.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field
from typing import Any

from llmspec.compiler.kernels.kinds import EAGER

SCHEMA = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class MeshSizes:
    """Ranks along each axis. Outer to inner: pipeline, replicas, shards, context, tensor.

    expert: ranks that split experts, a part of the data ranks: groups of neighbours among them.
    """

    pipeline: int = 1
    replicas: int = 1
    shards: int = 1
    context: int = 1
    expert: int = 1
    tensor: int = 1

    @property
    def data(self) -> int:
        return self.replicas * self.shards

    @property
    def expert_data(self) -> int:
        """Ranks that hold the same experts."""
        return self.data * self.context // self.expert

    @property
    def world_size(self) -> int:
        return self.pipeline * self.data * self.context * self.tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class UnitPlacement:
    """How one unit is split over the tensor axis.

    boundary: state of the value that flows in and out ("whole" or "split 1").
    nodes: choice of each operator by node name; parameters: state of each by path.
    """

    boundary_in: str = "whole"
    boundary_out: str = "whole"
    nodes: dict[str, str] = field(default_factory=dict)
    parameters: dict[str, str] = field(default_factory=dict)


EVERYTHING = "everything"
"""In place of a list of operators: a unit keeps its input alone, and all of it runs again."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Stretch:
    """What uses of one unit that follow each other in the chain compute again in the backward.

    blocks: how many uses. again: operators of the lowered unit, by the names of their nodes, or
        EVERYTHING. Values of theirs that the backward asks for are dropped and computed again.
    """

    blocks: int
    again: tuple[str, ...] | str = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """All decisions.

    stages: (first, stop) instances of the chain, in its order; see schedules.rank_of.
    context_style: how attention looks over context ranks; None where there is one.
    offload: what lives in host memory, sorted.
    choices: what the keys of the train block are that the spec leaves open, as it would say it.
    loss_rows: how many rows of logits there are at once; None: all, as a value of their own.
    recompute: unit name -> what its uses compute again, in the chain's order.
    actions: per pipeline rank, empty without a pipeline.
    ramp_actions: the same for the batch's smaller sizes, by their number of micro-batches.
    predicted: the ledger, as docs/json.md has it.
    """

    spec: str
    spec_hash: str
    model: str
    train: str
    mesh: MeshSizes
    zero: int
    sequence: bool
    microbatch: int
    microbatches: int
    schedule: str
    stages: tuple[tuple[int, int], ...]
    recompute: dict[str, tuple[Stretch, ...]]
    context_style: str | None = None
    offload: tuple[str, ...] = ()
    kernels: str = EAGER
    loss_rows: int | None = None
    choices: dict[str, str] = field(default_factory=dict)
    placements: dict[str, UnitPlacement] = field(default_factory=dict)
    actions: tuple[tuple[str, ...], ...] = ()
    ramp_actions: dict[str, tuple[tuple[str, ...], ...]] = field(default_factory=dict)
    predicted: dict[str, Any] = field(default_factory=dict)
    schema: int = SCHEMA

    @property
    def interleave(self) -> int:
        return len(self.stages) // self.mesh.pipeline

    def decisions(self) -> dict[str, Any]:
        """Everything but the predictions: what makes two plans the same program. A spec that leaves
        nothing of its train block open has no choices."""
        out = asdict(self)
        del out["predicted"]
        return out if self.choices else {k: v for k, v in out.items() if k != "choices"}

    @property
    def plan_hash(self) -> str:
        text = json.dumps(self.decisions(), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:6]


def to_json(plan: Plan) -> str:
    return json.dumps(asdict(plan), indent=1, sort_keys=True) + "\n"


def from_json(text: str) -> Plan:
    """Errors: ValueError when it is not a plan of this schema."""
    data = json.loads(text)
    if not isinstance(data, dict) or data.get("schema") != SCHEMA:
        raise ValueError(f"not a plan of schema {SCHEMA}")
    try:
        data["mesh"] = MeshSizes(**data["mesh"])
        data["placements"] = {k: UnitPlacement(**v) for k, v in data["placements"].items()}
        data["recompute"] = {k: tuple(map(_stretch, v)) for k, v in data["recompute"].items()}
        data["stages"] = tuple((int(a), int(b)) for a, b in data["stages"])
        data["offload"] = tuple(data["offload"])
        data["actions"] = tuple(tuple(row) for row in data["actions"])
        data["ramp_actions"] = {
            count: tuple(tuple(row) for row in rows) for count, rows in data["ramp_actions"].items()
        }
        return Plan(**data)
    except KeyError as error:
        raise ValueError(f"it has no {error}") from None
    except (TypeError, AttributeError) as error:
        raise ValueError(f"not a plan: {error}") from None


def _stretch(data: dict[str, Any]) -> Stretch:
    again = data["again"]
    return Stretch(blocks=data["blocks"], again=again if isinstance(again, str) else tuple(again))
