"""From phases (`warmup`, `constant`, `cosine`, `linear`) to a function: step from 0 -> rate."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import assert_never


class Shape(StrEnum):
    RISE = "rise"
    LEVEL = "level"
    COSINE = "cosine"
    LINE = "line"


@dataclass(frozen=True, slots=True, kw_only=True)
class Phase:
    """to: None keeps the rate (or, for a rise, means the peak). steps: None takes what is left."""

    shape: Shape
    to: float | None = None
    steps: int | None = None


def warmup(steps: int) -> Phase:
    """Up to the peak, which the last of the steps has."""
    return Phase(shape=Shape.RISE, steps=steps)


def constant(steps: int | None = None) -> Phase:
    return Phase(shape=Shape.LEVEL, steps=steps)


def cosine(to: float, steps: int | None = None) -> Phase:
    """Half a cosine from where the rate is; the step after the last would have `to`."""
    return Phase(shape=Shape.COSINE, to=to, steps=steps)


def linear(to: float, steps: int | None = None) -> Phase:
    """A line from where the rate is; the step after the last would have `to`."""
    return Phase(shape=Shape.LINE, to=to, steps=steps)


def schedule(peak: float, steps: int, *phases: Phase) -> Callable[[int], float]:
    """One phase after the other; after the last one the rate stays where it ended.

    steps: of the whole run; the one phase without a length takes what the others leave.
    Errors: ValueError if two phases have no length.
    """
    pieces = _lengths(steps, phases)

    def rate(step: int) -> float:
        value = 0.0 if pieces and pieces[0].shape is Shape.RISE else peak
        for phase in pieces:
            assert phase.steps is not None, "lengths were filled in"
            if step < phase.steps:
                return _inside(phase, step, value, peak)
            step -= phase.steps
            value = _end(phase, value, peak)
        return value

    return rate


def _lengths(steps: int, phases: tuple[Phase, ...]) -> tuple[Phase, ...]:
    open_phases = sum(phase.steps is None for phase in phases)
    if open_phases > 1:
        raise ValueError(f"{open_phases} phases of the learning rate have no number of steps")
    left = max(0, steps - sum(phase.steps or 0 for phase in phases))
    return tuple(replace(p, steps=left) if p.steps is None else p for p in phases)


def _end(phase: Phase, begin: float, peak: float) -> float:
    if phase.shape is Shape.RISE:
        return peak
    return begin if phase.to is None else phase.to


def _inside(phase: Phase, step: int, begin: float, peak: float) -> float:
    assert phase.steps is not None, "lengths were filled in"
    end = _end(phase, begin, peak)
    done = step / phase.steps
    match phase.shape:
        case Shape.LEVEL:
            return begin
        case Shape.RISE:
            return begin + (end - begin) * (step + 1) / phase.steps
        case Shape.LINE:
            return begin + (end - begin) * done
        case Shape.COSINE:
            return end + (begin - end) * 0.5 * (1.0 + math.cos(math.pi * done))
        case _:
            assert_never(phase.shape)
