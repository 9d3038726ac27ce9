"""Plays a pipeline rank's action list: forwards, backwards (whole, or in two parts) and the sends
between them.

torch.distributed.pipelining reads the same words, but its stages replace FSDP2's settings with
their own (whole gradients, parameters gathered until the step ends), so that `zero` would silently
mean something else, and they agree on shapes by messages that a dry run cannot answer. Here shapes
are static, and what is reduced when is what the list says.
"""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .gradients import Turn, local_gradient
from .mesh import Mesh
from .split_backward import Product, splitting

_WORD = re.compile(r"(\d+)(UNSHARD|RESHARD|REDUCE_GRAD|(?:SEND_|RECV_)?[FB]|[IW])(\d*)")


class Gradients(Protocol):
    """ReplicatedGradients or ShardedGradients of one stage. in_parts: some of its backwards come in
    two parts."""

    in_parts: bool

    def before_microbatch(self, micro: Any) -> None: ...
    def weights(self, products: list[Product]) -> None: ...
    def finish(self) -> None: ...
    def zero(self) -> None: ...
    def gather(self) -> None: ...
    def release(self) -> None: ...
    def evaluation(self) -> Any: ...


class Scale(Protocol):
    """A LossScale."""

    value: float


class Action(NamedTuple):
    stage: int
    kind: str
    microbatch: int


@dataclass(frozen=True, slots=True)
class TiedWeights:
    """A weight of two stages, by its name in each; `owner` counts it in norms and saves it."""

    name: str
    owner: int
    copy: int


@dataclass(slots=True)
class _Step:
    """Values in flight, by (stage, micro-batch)."""

    micros: Sequence[Any]
    divisor: float
    train: bool
    inputs: dict[tuple[int, int], Tensor] = field(default_factory=dict)
    outputs: dict[tuple[int, int], Tensor] = field(default_factory=dict)
    gradients: dict[tuple[int, int], Tensor] = field(default_factory=dict)
    late: dict[tuple[int, int], list[Product]] = field(default_factory=dict)
    arrivals: dict[Action, list[Any]] = field(default_factory=dict)
    sends: dict[Action, list[Any]] = field(default_factory=dict)


def planned_actions(plan: Path) -> dict[int, list[str]]:
    """Each pipeline rank's list, as a plan.json has them."""
    return dict(enumerate(json.loads(plan.read_text())["actions"]))


def planned_actions_by_count(plan: Path) -> dict[int, dict[int, list[str]]]:
    """The same by the number of micro-batches, of a plan whose batch grows."""
    known = json.loads(plan.read_text())
    lists = known["ramp_actions"] | {str(known["microbatches"]): known["actions"]}
    return {int(count): dict(enumerate(ranks)) for count, ranks in lists.items()}


class Executor:
    """stages, gradients: this rank's, by stage number. actions: all ranks' lists.

    A stage is called as module(x, targets_BT, samples_B); x is tokens_BT on the first stage, else
    what the stage before returned, of shape and dtype `boundary`. The last returns the sum of its
    token losses; the executor divides it by batch.target_tokens. loss_scale: gradients come out
    multiplied with its value.
    """

    def __init__(
        self,
        *,
        stages: Mapping[int, nn.Module],
        gradients: Mapping[int, Gradients],
        actions: Mapping[int, Iterable[str]],
        mesh: Mesh,
        microbatches: int,
        boundary: tuple[tuple[int, ...], torch.dtype],
        tied: Sequence[TiedWeights] = (),
        loss_scale: Scale | None = None,
    ):
        self.stages, self.gradients, self.mesh = stages, gradients, mesh
        self.microbatches, self.boundary, self.tied = microbatches, boundary, tied
        self.loss_scale = loss_scale
        lists = {rank: [_parse(word) for word in words] for rank, words in actions.items()}
        self.owner = {a.stage: rank for rank, own in lists.items() for a in own}
        self.last_stage = max(self.owner)
        self.actions = lists[mesh.pipeline.rank]
        self.turns = _turns(self.actions)
        self.arrived = _arrived(lists, self.owner, mesh.pipeline.rank)
        self.split = {(a.stage, a.microbatch) for a in self.actions if a.kind == "I"}
        for stage, _ in self.split:
            gradients[stage].in_parts = True
        own = {stage for stage, rank in self.owner.items() if rank == mesh.pipeline.rank}
        assert own == set(stages) == set(gradients), f"the lists give this rank stages {own}"
        if mesh.device.type == "cuda" and mesh.pipeline.size > 1:
            # NCCL wants all ranks of a group in its first operation
            dist.all_reduce(torch.zeros(1, device=mesh.device), group=mesh.pipeline.group)

    def step(self, batch: Any) -> Tensor:
        """Loss and gradients of one optimizer step; the loss is 0 where the last stage is not."""
        for gradients in self.gradients.values():
            gradients.zero()
        loss = self._play(batch, self.actions, train=True)
        for gradients in self.gradients.values():
            gradients.finish()
        for tied in self.tied:
            self._sum_tied(tied)
        return loss

    def evaluate(self, batch: Any) -> Tensor:
        """The forwards of the same lists."""
        with ExitStack() as stack:
            for gradients in self.gradients.values():
                stack.enter_context(gradients.evaluation())
            forwards = [a for a in self.actions if a.kind in ("F", "SEND_F", "RECV_F")]
            return self._play(batch, forwards, train=False)

    def copies(self) -> list[nn.Parameter]:
        """This rank's copies of tied weights, which their owners count (see clip_)."""
        out = []
        for tied in self.tied:
            if tied.copy in self.stages:
                copy = self.stages[tied.copy].get_parameter(tied.name)
                owner = self.stages.get(tied.owner)
                if owner is None or owner.get_parameter(tied.name) is not copy:
                    out.append(copy)
        return out

    def _play(self, batch: Any, actions: list[Action], *, train: bool) -> Tensor:
        micros = list(batch.microbatches(self.microbatches))
        step = _Step(micros, batch.target_tokens, train)
        # float64 whatever the model computes in: all ranks must agree, only the last one knows
        loss = torch.zeros((), dtype=torch.float64, device=self.mesh.device)
        for action in actions:
            match action.kind:
                case "F":
                    loss = _plus(loss, self._forward(step, action))
                case "B" | "I":
                    self._backward(step, action)
                case "W":
                    self._weights(step, action)
                case "SEND_F":
                    # no name for what is sent, which would hold it until the next is
                    at = action.stage, action.microbatch
                    self._send(step, action, step.outputs[at].detach(), to=action.stage + 1)
                    if not train:
                        del step.outputs[at]
                case "SEND_B":
                    at = action.stage, action.microbatch
                    self._send(step, action, step.gradients.pop(at), to=action.stage - 1)
                case "RECV_F" | "RECV_B":
                    self._receive(step, action)
                case "UNSHARD":
                    self.gradients[action.stage].gather()
                case "RESHARD":
                    self.gradients[action.stage].release()
                case "REDUCE_GRAD":
                    pass  # the backward before it has been told to reduce as it goes
        for works in step.sends.values():
            for work in works:
                work.wait()
        return loss

    def _forward(self, step: _Step, action: Action) -> Tensor | None:
        """The loss, on the last stage."""
        stage, m = action.stage, action.microbatch
        micro = step.micros[m]
        if stage == 0:
            x = micro.tokens_BT
        else:
            self._await(step, Action(stage, "RECV_F", m))
            x = step.inputs[stage, m].requires_grad_(step.train)
        if step.train and (stage, m) in self.split:
            step.late[stage, m] = []
        with splitting(step.late.get((stage, m))):
            out = self.stages[stage](x, micro.targets_BT, micro.samples_B)
        if not step.train:
            step.inputs.pop((stage, m), None)
        is_last = stage == self.last_stage
        if is_last:
            out = out / step.divisor
            if step.train and self.loss_scale is not None:
                # where its backward looks for what comes from behind
                step.gradients[stage + 1, m] = torch.full_like(out, self.loss_scale.value)
        elif stage + 1 in self.stages:
            step.inputs[stage + 1, m] = out.detach()
        if step.train or not (is_last or stage + 1 in self.stages):
            step.outputs[stage, m] = out
        return out.detach() if is_last else None

    def _backward(self, step: _Step, action: Action) -> None:
        stage, m = action.stage, action.microbatch
        self._await(step, Action(stage, "RECV_B", m))
        self.gradients[stage].before_microbatch(self.turns[action])
        out = step.outputs.pop((stage, m))
        with splitting(step.late.get((stage, m))):
            torch.autograd.backward(out, step.gradients.pop((stage + 1, m), None))
        if stage:
            gradient = step.inputs.pop((stage, m)).grad
            assert gradient is not None, f"stage {stage} does not use its input"
            step.gradients[stage, m] = gradient

    def _weights(self, step: _Step, action: Action) -> None:
        gradients = self.gradients[action.stage]
        gradients.before_microbatch(self.turns[action])
        gradients.weights(step.late.pop((action.stage, action.microbatch)))

    def _send(self, step: _Step, action: Action, value: Tensor, *, to: int) -> None:
        # works hold their tensors: drop those that have left (Gloo does not tell)
        left = [a for a, works in step.sends.items() if all(w.is_completed() for w in works)]
        for earlier in left:
            del step.sends[earlier]
        step.sends[action] = self._transfer(dist.isend, value.contiguous(), to)

    def _receive(self, step: _Step, action: Action) -> None:
        stage, kind, m = action
        shape, dtype = self.boundary
        value = torch.empty(shape, dtype=dtype, device=self.mesh.device)
        if kind == "RECV_F":
            step.inputs[stage, m] = value
            step.arrivals[action] = self._transfer(dist.irecv, value, stage - 1)
        else:
            step.gradients[stage + 1, m] = value
            step.arrivals[action] = self._transfer(dist.irecv, value, stage + 1)

    def _transfer(self, operation: Any, value: Tensor, other_stage: int) -> list[Any]:
        group = self.mesh.pipeline.group
        peer = dist.get_global_rank(group, self.owner[other_stage])
        return dist.batch_isend_irecv([dist.P2POp(operation, value, peer, group)])

    def _await(self, step: _Step, action: Action) -> None:
        """What was sent, and with it the end of what its sender had used before."""
        for work in step.arrivals.pop(action, ()):
            work.wait()
        for earlier in self.arrived.get(action, ()):
            for work in step.sends.pop(earlier, ()):
                work.wait()

    def _sum_tied(self, tied: TiedWeights) -> None:
        """Both stages end with the sum; their shards lie alike, so local parts match."""
        here = [stage for stage in (tied.owner, tied.copy) if stage in self.stages]
        own = [self.stages[stage].get_parameter(tied.name) for stage in here]
        gradients = [local_gradient(p) for p in own]
        match gradients:
            case [one, other] if own[0] is not own[1]:
                other.copy_(one.add_(other))
            case [one]:
                elsewhere = tied.copy if here == [tied.owner] else tied.owner
                one.add_(self._exchanged(one.contiguous(), elsewhere))

    def _exchanged(self, value: Tensor, stage: int) -> Tensor:
        """What the stage's rank gives for our value."""
        received = torch.empty_like(value)
        group = self.mesh.pipeline.group
        peer = dist.get_global_rank(group, self.owner[stage])
        pair = [
            dist.P2POp(dist.isend, value, peer, group),
            dist.P2POp(dist.irecv, received, peer, group),
        ]
        for work in dist.batch_isend_irecv(pair):
            work.wait()
        return received


def _plus(loss: Tensor, part: Tensor | None) -> Tensor:
    return loss if part is None else loss + part


def _parse(word: str) -> Action:
    match = _WORD.fullmatch(word)
    if match is None:
        raise ValueError(f"not a pipeline action: {word!r}")
    return Action(int(match[1]), match[2], int(match[3] or -1))


def _arrived(
    lists: Mapping[int, list[Action]], owner: Mapping[int, int], rank: int
) -> dict[Action, list[Action]]:
    """By receive of this rank: those of its sends whose values the sender had used before."""
    found: dict[Action, list[Action]] = {}
    for other in lists.keys() - {rank}:
        used: list[Action] = []
        for stage, kind, m in lists[other]:
            before, after = owner.get(stage - 1) == rank, owner.get(stage + 1) == rank
            if kind == "F" and before:
                used.append(Action(stage - 1, "SEND_F", m))
            elif kind in ("B", "I") and after:
                used.append(Action(stage + 1, "SEND_B", m))
            elif kind == "SEND_F" and after:
                found[Action(stage + 1, "RECV_F", m)], used = used, []
            elif kind == "SEND_B" and before:
                found[Action(stage - 1, "RECV_B", m)], used = used, []
    return found


def _turns(actions: list[Action]) -> dict[Action, Turn]:
    """For each backward of a rank's list, and each part of one."""
    # first: the executor zeroes gradients before the first forward
    turns = {a: Turn(first=False, last=False, reduce=False) for a in actions if a.kind == "I"}
    for stage in {a.stage for a in actions}:
        own = [a for a in actions if a.stage == stage and a.kind in ("B", "W", "REDUCE_GRAD")]
        ends = [a for a in own if a.kind != "REDUCE_GRAD"]
        for a, after in zip_longest(own, own[1:]):
            if a.kind != "REDUCE_GRAD":
                turns[a] = Turn(
                    first=False,
                    last=a == ends[-1],
                    reduce=after is not None and after.kind == "REDUCE_GRAD",
                )
    return turns
