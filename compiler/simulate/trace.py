"""A step as a trace that Perfetto and chrome://tracing open: Chrome's trace-event JSON.

One process a pipeline rank, standing for all devices that do the same; one thread a stream. Times
are microseconds.
Source of the format: "Trace Event Format", Google, 2016.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import accumulate, pairwise
from typing import Any

from llmspec.compiler.cost.play import NEXT, Event
from llmspec.compiler.simulate.slices import MESSAGES
from llmspec.compiler.simulate.step import Simulated, simulated_object

THREADS = (
    "compute",
    "tensor",
    "context",
    "expert",
    "data",
    "offload",
    "optimizer",
    "messages to the rank after",
    "messages to the rank before",
)
WORDS = {
    "F": "forward",
    "B": "backward",
    "I": "backward of values",
    "W": "backward of matrices",
    "SEND_F": "result",
    "SEND_B": "gradient",
}
ONWARD = {"SEND_F": (1, "F"), "SEND_B": (-1, "B")}
"""What a message is for: so many stages on, which kind of action."""

Entry = dict[str, Any]


def trace_json(found: Simulated) -> str:
    """One entry a line; the same plan gives the same bytes."""
    lines = ",\n".join(json.dumps(entry, sort_keys=True) for entry in entries(found))
    about = json.dumps(simulated_object(found), sort_keys=True)
    return f'{{"displayTimeUnit": "ms", "otherData": {about}, "traceEvents": [\n{lines}\n]}}\n'


def entries(found: Simulated) -> Iterator[Entry]:
    timed = [entry for event in found.events for entry in _drawn(found, event)]
    yield from _names(found, timed)
    yield from timed
    yield from _arrows(found)


def _names(found: Simulated, timed: list[Entry]) -> Iterator[Entry]:
    """Of processes and of the threads that something stands on, in their order."""
    for rank, one in enumerate(found.ranks):
        first, last = one.devices
        words = f"pipeline rank {rank}: " if len(found.ranks) > 1 else ""
        words += f"device {first}" if first == last else f"devices {first} to {last}, all alike"
        yield _about("process", rank, 0, words)
        yield _order("process", rank, 0, rank)
    for pid, tid in sorted({(entry["pid"], entry["tid"]) for entry in timed}):
        yield _about("thread", pid, tid, THREADS[tid])
        yield _order("thread", pid, tid, tid)


def _about(what: str, pid: int, tid: int, name: str) -> Entry:
    return {"ph": "M", "name": f"{what}_name", "pid": pid, "tid": tid, "args": {"name": name}}


def _order(what: str, pid: int, tid: int, index: int) -> Entry:
    args = {"sort_index": index}
    return {"ph": "M", "name": f"{what}_sort_index", "pid": pid, "tid": tid, "args": args}


def _drawn(found: Simulated, event: Event) -> Iterator[Entry]:
    """A forward or backward as a whole, and its parts one after the other: computing inside it,
    what an axis leaves in the open on a thread of the axis."""
    args: Entry = {} if event.microbatch is None else {"micro-batch": event.microbatch}
    args |= {"stage": event.stage} if event.stage >= 0 else {}
    words = _title(event)
    if event.kind in ("F", "B", "I", "W"):
        yield _slice(event, 0, words, (event.start_s, event.stop_s), args)
    parts = found.slices.of(event)
    ends = accumulate((p.spent_s for p in parts), initial=event.start_s)
    for part, (start, stop) in zip(parts, pairwise(ends), strict=True):
        span = (min(start, event.stop_s), min(stop, event.stop_s))
        name = f"{words} {part.name}" if event.kind in ONWARD else part.name
        yield _slice(event, _thread(event, part.part), name, span, args)


def _title(event: Event) -> str:
    return f"{WORDS.get(event.kind, event.kind)} {event.microbatch}"


def _thread(event: Event, part: str) -> int:
    if event.kind in ONWARD:
        return len(THREADS) - (2 if event.stream == NEXT else 1)
    return THREADS.index("compute" if part == MESSAGES else part)


def _slice(event: Event, tid: int, name: str, span: tuple[float, float], args: Entry) -> Entry:
    start, stop = _nanoseconds(span[0]), _nanoseconds(span[1])
    return {
        "ph": "X",
        "name": name,
        "cat": event.kind,
        "pid": event.rank,
        "tid": tid,
        "ts": start / 1000,
        "dur": (stop - start) / 1000,
        "args": args,
    }


def _nanoseconds(seconds: float) -> int:
    return round(seconds * 1e9)


def _arrows(found: Simulated) -> Iterator[Entry]:
    """From each message to the forward or backward that waits for it."""
    waiting = {
        (e.stage, "B" if e.kind == "I" else e.kind, e.microbatch): e
        for e in found.events
        if e.kind in ("F", "B", "I")
    }
    for number, event in enumerate(found.events):
        if event.kind in ONWARD:
            further, kind = ONWARD[event.kind]
            to = waiting.get((event.stage + further, kind, event.microbatch))
            if to is not None:
                yield _end("s", number, event, _thread(event, MESSAGES), event.start_s)
                yield {**_end("f", number, to, 0, to.start_s), "bp": "e"}


def _end(phase: str, number: int, event: Event, tid: int, at_s: float) -> Entry:
    return {
        "ph": phase,
        "id": number,
        "name": "message",
        "cat": "message",
        "pid": event.rank,
        "tid": tid,
        "ts": _nanoseconds(at_s) / 1000,
    }
