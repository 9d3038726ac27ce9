"""Predictions and rows in, `docs/validation.md` out."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence

from bench.validation.chosen import ABOVE, SAME, Searched, read_chosen
from bench.validation.compared import GIB, Compared, by_family, counted, percentile, spearman
from bench.validation.grids import NEAR, grids
from bench.validation.heldout import held_out
from bench.validation.profiles import PROFILES
from bench.validation.rows import Row
from bench.validation.set_aside import OUT_OF_MEMORY, OUT_OF_MEMORY_DOUBTED
from llmspec.compiler.cost.hardware import GPU_CONSTANTS

FEWEST_PLANS = 4
"""Plans of one model that a rank correlation needs."""

HEAD = """# Validation: predictions against published runs

Steps that other people measured and published, priced by this compiler: the same model, devices,
batch and plan. Nothing is fitted to single rows. `make validate` writes this page again (two
minutes, no GPU); what the data are, and what a profile is, stands in
[bench/validation](../bench/validation/README.md).

*Error* is |predicted / published - 1|. A published step is printed by the source, or follows from
its tokens/s or FLOP/s. Memory is what the source's instrument shows: what PyTorch has allocated,
or what nvidia-smi sees (5 % more, and the context). It is compared with the middle of what the
printed number may mean: an unqualified "GB" is 10⁹ or 2³⁰ bytes. *Inside* is that interval, 5 %
wider each way.
"""


def render(compared: Sequence[Compared]) -> str:
    parts = [HEAD, _summary(compared), _held_out(compared), _orders(compared), _grids(compared)]
    parts += [_profiles(), _rejected(compared), _out_of_memory(compared), _unpriced(compared)]
    chosen = _chosen(compared, read_chosen())
    return "\n".join([*parts, _aside(compared), chosen, _every(compared)])


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)]) + "\n"


def _percent(value: float) -> str:
    return f"{100 * value:.1f} %"


def _statistics(name: str, ones: Sequence[Compared], *, every: bool = False) -> list[str]:
    """`every`: those too that statistics leave out."""
    ratios = [r for o in (ones if every else counted(ones)) if (r := o.ratio) is not None]
    with_memory = [o for o in ones if o.memory_ratio is not None]
    memory = [abs((o.memory_ratio or 0.0) - 1) for o in with_memory]
    cells = [name, str(len(ones)), str(len(ratios))]
    if ratios:
        errors = [abs(r - 1) for r in ratios]
        cells += [_percent(statistics.median(errors)), _percent(percentile(errors, 0.9))]
        cells.append(f"{statistics.median(ratios):.2f}")
    else:
        cells += ["", "", ""]
    if not memory:
        return [*cells, "", "", ""]
    inside = sum(o.memory_inside for o in with_memory)
    return [*cells, str(len(memory)), _percent(statistics.median(memory)), str(inside)]


def _summary(compared: Sequence[Compared]) -> str:
    rows = [_statistics(name, ones) for name, ones in by_family(compared).items()]
    head = ("source", "rows", "counted", "median error", "90th percentile")
    last = ("median of predicted/published", "with memory", "median error of memory", "inside")
    rows.append(_statistics("**all**", compared))
    rows.append(_statistics("all, none set aside", compared, every=True))
    return "## By source\n\n" + _table((*head, *last), rows)


def _held_out(compared: Sequence[Compared]) -> str:
    rows = [
        [o.source, f"{o.sustained:.3f}", _percent(o.median), _percent(o.tail)]
        for o in held_out(compared)
    ]
    text = (
        "## One source left out\n\nOne constant comes from these steps: `sustained`, what a step "
        f"keeps of the rates of kernels timed alone, {GPU_CONSTANTS['sustained']:.2f}. Here it is "
        "estimated from all other sources, and the source priced with that.\n\n"
    )
    head = ("source left out", "`sustained` of the others", "median error", "90th percentile")
    return text + _table(head, rows)


def _orders(compared: Sequence[Compared]) -> str:
    groups: dict[tuple[object, ...], list[Compared]] = {}
    for one in counted(compared):
        if one.ratio is not None:
            groups.setdefault(one.row.model_key, []).append(one)
    rows = []
    for ones in groups.values():
        plans = {tuple(sorted((k, str(v)) for k, v in o.row.plan.items())) for o in ones}
        if len(plans) < FEWEST_PLANS:
            continue
        pairs = [(o.priced.step_s or 0.0, o.row.step_s or 0.0) for o in ones]
        row = ones[0].row
        what = f"{row.model['family']}, batch {row.batch}, {row.gpus} × {row.gpu}"
        rows.append([row.family, what, str(len(ones)), f"{spearman(pairs):.2f}"])
    text = "## Order of plans\n\nSpearman's rank correlation of predicted and published steps, "
    text += "where a source runs one model, batch and cluster under several plans.\n\n"
    return text + _table(("source", "model", "runs", "correlation"), rows) + "\n" + AMBIGUOUS


AMBIGUOUS = """These steps lie within some percent of each other, and their network is known badly.
The source measured 40 Gb/s of bus bandwidth between nodes of 400 Gb/s (`experiments/bandwidth` of
its repository), printed one plan twice 9 % apart, and mended PCI Express in between: plans before
and after are not compared, as it asks. The order breaks at micro-batches of 2 on 8 tensor ranks,
which cost 10 to 15 % more than those of 4, where on 4 tensor ranks they cost less; no constant is
there for it.
"""


def _grids(compared: Sequence[Compared]) -> str:
    rows = [
        [
            grid.what,
            str(grid.runs),
            f"`{grid.first.row.id}`",
            f"`{grid.fastest.row.id}`",
            _percent(grid.lost),
        ]
        for grid in grids(compared)
    ]
    near = sum(grid.lost <= NEAR for grid in grids(compared))
    text = (
        "## The fastest run of a grid\n\nOf one model whose settings a source varied, the run that "
        "is priced fastest (tokens/s of a GPU), the one that was, and how much slower the first "
        f"is: at most {100 * NEAR:.0f} % in {near} of {len(rows)} grids.\n\n"
    )
    head = ("grid", "runs", "priced fastest", "measured fastest", "slower by")
    return text + _table(head, rows)


def _profiles() -> str:
    lines = ["## What the software did", ""]
    for profile in dict.fromkeys(PROFILES.values()):
        names = ", ".join(n for n, p in PROFILES.items() if p is profile)
        lines.append(f"- **{names}**: {'; '.join(profile.why)}.")
    return "\n".join(lines) + "\n"


def _rejected(compared: Sequence[Compared]) -> str:
    rows = [
        [
            f"`{o.row.id}`",
            f"{(o.priced.peak_bytes or 0) / GIB:.1f}",
            f"{(o.priced.usable_bytes or 0) / GIB:.1f}",
            _gib(o.row),
        ]
        for o in compared
        if o.rejected and o.row.id not in OUT_OF_MEMORY
    ]
    text = "## Plans that ran, and that we would reject\n\nGiB.\n\n"
    return text + _table(("run", "predicted peak", "usable", "published peak"), rows)


def _out_of_memory(compared: Sequence[Compared]) -> str:
    rows = []
    for one in compared:
        if one.row.id not in OUT_OF_MEMORY:
            continue
        peak, usable = (one.priced.peak_bytes or 0) / GIB, (one.priced.usable_bytes or 0) / GIB
        verdict = "does not fit" if one.rejected else "fits"
        doubt = OUT_OF_MEMORY_DOUBTED.get(one.row.id, "")
        rows.append([f"`{one.row.id}`", f"{peak:.1f}", f"{usable:.1f}", verdict, doubt])
    text = "## Runs that ran out of memory\n\nGiB.\n\n"
    head = ("run", "predicted peak", "usable", "predicted", "doubt")
    return text + _table(head, rows)


def _gib(row: Row) -> str:
    if row.peak_gib is None:
        return ""
    low, high = (f"{v:.1f}" for v in row.peak_gib)
    return low if low == high else f"{low} to {high}"


def _unpriced(compared: Sequence[Compared]) -> str:
    rows = [[f"`{o.row.id}`", o.missing] for o in compared if o.missing is not None]
    return "## Runs without a comparison\n\n" + _table(("run", "reason"), rows)


def _aside(compared: Sequence[Compared]) -> str:
    rows = [
        [f"`{o.row.id}`", f"{100 * (o.ratio - 1):+.1f} %", why]
        for o in compared
        if (why := o.aside) is not None and o.ratio is not None
    ]
    text = (
        "## Runs that statistics leave out\n\n"
        "By rules that ask nothing of the prediction, though written when predictions had been "
        "seen (`bench/validation/set_aside.py`). Each is priced all the same, and the last line "
        "of the first table counts them.\n\n"
    )
    return text + _table(("run", "error", "reason"), rows)


def _chosen(compared: Sequence[Compared], searched: Mapping[str, Searched]) -> str:
    rows = []
    for one in compared:
        found = searched.get(one.row.id)
        if found is None:
            continue
        gain = "" if found.gain is None else f"{100 * found.gain:.1f} %"
        chosen = "" if found.step_s is None else f"{found.step_s:.4g}"
        rows.append([f"`{one.row.id}`", f"{found.published_s:.4g}", chosen, gain, found.plan])
    gains = [s.gain for s in searched.values() if s.gain is not None]
    worse = sum(gain < -SAME for gain in gains)
    middle = _percent(statistics.median(gains)) if gains else "no"
    text = (
        "## What our search would choose\n\nNot told of the published plan, on the same devices "
        "and with the same software (`python -m bench.searched`, which takes hours; it has been "
        f"through {len(searched)} runs so far, one of each source after the other). Seconds, "
        "predicted; a plan may use what its time's software had not. The chosen plan is priced "
        f"above the published one in {worse} of them; the median gain is {middle}.\n\n"
    )
    text += "".join(f"- `{name}`: {why}.\n" for name, why in ABOVE.items() if name in searched)
    head = ("run", "published plan", "chosen plan", "gain", "chosen")
    return text + "\n" + _table(head, rows)


def _every(compared: Sequence[Compared]) -> str:
    lines = ["## Every run", "", "Seconds, and GiB."]
    head = ("run", "predicted", "published", "error", "from", "memory", "published memory")
    for name, ones in by_family(compared).items():
        source = ones[0].row
        lines += ["", f"### {name}", "", f"{source.source}. {_link(source)}", ""]
        rows = []
        for one in ones:
            if one.ratio is None:
                continue
            row, priced = one.row, one.priced
            error = f"{100 * (one.ratio - 1):+.1f} %"
            step = [f"{priced.step_s:.4g}", f"{row.step_s:.4g}", error, row.step_from or ""]
            peak = f"{one.read_gib or 0.0:.1f}"
            rows.append([f"`{row.id}`", *step, peak, _gib(row)])
        lines.append(_table(head, rows).rstrip("\n"))
    return "\n".join(lines) + "\n"


def _link(row: Row) -> str:
    return f"[{row.url.partition('//')[2].partition('/')[0]}]({row.url})"
