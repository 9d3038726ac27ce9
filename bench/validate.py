"""Published runs against what we predict of them: `python -m bench.validate`, or `make validate`.

Prices every row of `bench/validation/published.jsonl`, writes `bench/results/validation.json` and,
from it, `docs/validation.md`. With `--check` nothing is written: exit status 1 when a prediction or
the page differs.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path

from bench.validation.compared import by_family, compare, counted, percentile
from bench.validation.page import render
from bench.validation.price import Priced, price
from bench.validation.rows import Row, read_rows

RESULTS = Path(__file__).parent / "results" / "validation.json"
PAGE = Path(__file__).resolve().parents[1] / "docs" / "validation.md"


def to_json(priced: Iterable[Priced]) -> str:
    """One row a line, so that a change of the cost model shows as lines."""
    lines = [json.dumps(asdict(p)) for p in priced]
    return "[\n" + ",\n".join(lines) + "\n]\n"


def from_json(text: str) -> dict[str, Priced]:
    return {values["id"]: Priced(**values) for values in json.loads(text)}


def chosen(rows: Iterable[Row], text: str) -> tuple[Row, ...]:
    return tuple(r for r in rows if text in r.id or text in r.family)


def print_summary(rows: Iterable[Row], priced: dict[str, Priced]) -> None:
    compared = compare([r for r in rows if r.id in priced], priced)
    for name, ones in [*by_family(compared).items(), ("all", compared)]:
        errors = [abs(r - 1) for o in counted(ones) if (r := o.ratio) is not None]
        if errors:
            figures = f"{percentile(errors, 0.5):7.1%}{percentile(errors, 0.9):9.1%}"
            print(f"{name:20}{len(errors):4} of {len(ones):3} rows {figures}")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", default="", help="rows whose id or source has this text; no page")
    parser.add_argument("--check", action="store_true", help="write nothing, compare instead")
    options = parser.parse_args(arguments)
    rows = read_rows()
    found = chosen(rows, options.only)
    priced = {row.id: price(row) for row in found}
    print_summary(rows, priced)
    if options.only:
        return 0
    results, page = to_json(priced.values()), render(compare(rows, priced))
    files = {RESULTS: results, PAGE: page}
    if options.check:
        stale = [p.name for p, text in files.items() if not p.is_file() or p.read_text() != text]
        print(f"stale: {', '.join(stale)}" if stale else "up to date")
        return 1 if stale else 0
    for path, text in files.items():
        path.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
