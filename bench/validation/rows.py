"""Published runs: a line of `published.jsonl` in, what a spec and a comparison need out."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

FILE = Path(__file__).parent / "published.jsonl"

NETWORK_GBITS = {
    "DGX A100 (Selene): NVLink3/NVSwitch in node, 8x200Gb/s HDR IB per node": 200,
    "NVLink/NVSwitch + 8x200Gb/s HDR per node": 200,
    "NVLink/NVSwitch in node; RoCE, 1600 Gb/s per 8-GPU node": 200,
    "NVLink/NVSwitch in node; 4x100Gb/s RoCE per node": 50,
    # the number of links is from memory in the source's own words
    "NVLink in node (8 GPUs); Omni-Path between nodes (Jean Zay), 4 links/node [link count "
    "recalled]": 50,
}
"""Gb/s per GPU between nodes, as each source describes its cluster; where it does not, the
device's own entry in the library stands."""

MENDED = 766
"""The line of BigScience's page below which steps are 1 to 5 % shorter."""

FAMILIES = {
    "Megatron-LM README tables (2020)": "Megatron 2020",
    "Megatron-LM SC 2021 (arXiv 2104.04473) Table 1, via slides": "Megatron 2021",
    "Korthikanti et al. 2022 (arXiv 2205.05198), values as stored in Calculon validation, "
    "Table 5": "Korthikanti 2022",
    "BigScience 176B topology grid (BLOOM)": "BigScience",
    "MosaicML llm-foundry MPT training benchmarks": "llm-foundry",
    "InternEvo scaling table": "InternEvo",
    "InternEvo FLOPs table": "InternEvo, packed",
    "SimuMax B200 validation set, real Megatron-LM measurements": "SimuMax B200",
    "llm.c run scripts (comments)": "llm.c",
    "Alpa benchmark README expected output": "Alpa",
}
"""Short names of sources."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One measured run. Batches are in sequences; `plan` is in the words of the plan block.

    step_from: how the source gives the time (`printed`, `from tokens/s`, `from FLOP/s`).
    peak_gib: the interval that the printed peak may mean, since "GB" has two meanings.
    """

    id: str
    source: str
    locator: str | None
    url: str
    recalled: tuple[str, ...]
    gpu: str
    gpus: int
    gpus_per_node: int
    interconnect: str
    model: Mapping[str, str | int]
    batch: int
    plan: Mapping[str, str | int | bool]
    precision: str
    optimizer: str
    attention: str | None
    framework: str
    step_s: float | None
    step_from: str | None
    peak_gib: tuple[float, float] | None
    peak_kind: str | None

    @property
    def sums_wide(self) -> bool:
        """Gradients in float32."""
        return "fp32 gradient" in self.precision

    @property
    def family(self) -> str:
        return FAMILIES[self.source]

    def size(self, name: str) -> int:
        value = self.model[name]
        assert isinstance(value, int), f"{self.id} has no whole {name}"
        return value

    def ranks(self, axis: str) -> int:
        value = self.plan.get(axis, 1)
        assert isinstance(value, int), f"{axis} of {self.id} is a number"
        return value

    @cached_property
    def nodes(self) -> tuple[int, int]:
        """(GPUs in a node, nodes), of those that the run used."""
        inside = min(self.gpus, self.gpus_per_node)
        return inside, self.gpus // inside

    @property
    def model_key(self) -> tuple[object, ...]:
        """Equal for two rows that differ in their plans alone."""
        sizes = tuple(v for k, v in self.model.items() if k != "family")
        return (self.source, sizes, self.batch, self.gpu, self.gpus, self.precision, self.repaired)

    @property
    def repaired(self) -> bool:
        """BigScience mended PCI Express of its nodes on 25 February 2022, and says not to compare
        with the lines above."""
        line = re.search(r"\(line (\d+)", self.locator or "")
        return self.family == "BigScience" and line is not None and int(line[1]) > MENDED

    @property
    def tokens_per_s(self) -> float | None:
        """A GPU."""
        tokens = self.batch * self.size("seq_len") / self.gpus
        return None if self.step_s is None else tokens / self.step_s


def read_rows(path: Path = FILE) -> tuple[Row, ...]:
    rows = []
    for line in path.read_text().splitlines():
        values = json.loads(line)
        values["recalled"] = tuple(values["recalled"])
        peak = values["peak_gib"]
        values["peak_gib"] = None if peak is None else (peak[0], peak[1])
        rows.append(Row(**values))
    return tuple(rows)
