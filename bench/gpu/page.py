"""The results as tables for people."""

from __future__ import annotations

from typing import Any

Row = dict[str, Any]


def page(results: dict[str, Any]) -> str:
    """Markdown: device, then one table a section."""
    device = results["device"]
    lines = [
        f"# {device['name']}, torch {results['torch']}",
        "",
        f"A copy moves {device['bytes_per_s'] / 1e9:,.0f} GB/s, a product runs at "
        f"{device['flops'] / 1e12:,.1f} TFLOP/s. All of it took {results['seconds']:.0f} s.",
        "",
    ]
    for section, words in (("loss", "The loss"), ("kernels", "Kernels")):
        lines += _table(words, results.get(section), KERNELS)
    lines += _table("Training", results.get("training"), TRAINING)
    lines += _table("What else has landed", results.get("landed"), LANDED)
    lines += _table("Calibration and tuning", results.get("tools"), TOOLS)
    return "\n".join(lines) + "\n"


KERNELS = {
    "case": "of", "name": "kernel", "right": "right", "error": "error", "bound_s": "bound",
    "kernel_s": "ours", "of_copy": "of the copy's rate", "eager_s": "eager",
    "compiled_s": "compiled", "liger_s": "Liger", "kernel_peak_bytes": "memory",
    "eager_peak_bytes": "eager's", "note": "note", "failed": "failed",
}  # fmt: skip
LANDED = {
    "name": "program", "right": "right", "distance": "off by", "peak_bytes": "memory",
    "predicted_bytes": "predicted", "failed": "failed",
}  # fmt: skip
TOOLS = {
    "name": "what", "right": "right", "took_s": "took", "copy_ratio": "memory's rate to the copy's",
    "product_ratio": "the fastest product to the product", "tile": "tile", "warps": "warps",
    "gain": "gain over the rule", "use": "use", "failed": "failed",
}  # fmt: skip
TRAINING = {
    "case": "model", "layers": "layers", "who": "trained by", "tokens_per_s": "tokens/s",
    "mfu": "MFU", "of_product": "of the product's rate", "step_s": "step",
    "predicted_s": "predicted", "time_ratio": "time to ours", "peak_bytes": "memory",
    "predicted_bytes": "predicted ", "memory_ratio": "memory to ours", "failed": "failed",
}  # fmt: skip


def _table(words: str, rows: list[Row] | None, columns: dict[str, str]) -> list[str]:
    """Columns that no row has are left out."""
    if rows is None:
        return []
    if not rows:
        return [f"## {words}", "", "None.", ""]
    keys = [key for key in columns if any(row.get(key) not in (None, 0) for row in rows)]
    out = [f"## {words}", "", _line([columns[k] for k in keys]), _line(["---"] * len(keys))]
    return [*out, *(_line([_cell(k, row.get(k)) for k in keys]) for row in rows), ""]


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _cell(key: str, value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "**no**"
    if key.endswith("_s") and key != "tokens_per_s":
        return f"{1e3 * value:.3g} ms"
    if key.endswith("_bytes"):
        return f"{value / 2**30:.3g} GiB"
    if key in ("mfu", "of_product", "of_copy"):
        return f"{100 * value:.1f} %"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return str(value).replace("|", "/").replace("\n", " ")
