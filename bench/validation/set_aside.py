"""Rows that the page lists and its statistics leave out, each by a rule that asks nothing of a
prediction: the source contradicts itself, or its software ran an algorithm that we do not have."""

from __future__ import annotations

from bench.validation.rows import Row

HEADS = "the source's own steps with fewer and with more heads are 12 % shorter or more"
CONTRADICTED = {
    "bigscience-L658-18B-dp1tp8pp1mbs2gbs2048": "printed twice in one table: 130.4 s and 119.2 s",
    "bigscience-L727-181B-dp8tp8pp6mbs4gbs2048-h112": HEADS,
    "bigscience-L760-177B-dp8tp8pp6mbs4gbs2048-h96": HEADS,
    "bigscience-L930-178B-dp8tp4pp12mbs2gbs2048-h104": HEADS,
    "bigscience-L847-181B-dp8tp4pp12mbs4gbs2048-h128": "twice the heads add 23 % here, and 3 % to "
    "the same run with micro-batches half as large",
    **dict.fromkeys(
        (
            "internevo-7b-packed-ckptfalse-512gpu-mb2x2",
            "internevo-7b-packed-ckptfalse-1024gpu-mb2x2",
            "internevo-7b-packed-ckptfalse-1024gpu-mb2x1",
        ),
        "the source's step of four micro-batches is longer by less than the others compute on 8 "
        "GPUs",
    ),
}


OUT_OF_MEMORY = (
    "bigscience-L793-181B-dp48tp8pp1mbs1gbs2016",
    "bigscience-L917-184B-dp16tp4pp6mbs2gbs2048-h64",
    "bigscience-L957-206B-dp8tp4pp12mbs2gbs2048-h128",
)
"""Runs that the source says did not fit."""
OUT_OF_MEMORY_DOUBTED = {
    "bigscience-L957-206B-dp8tp4pp12mbs2gbs2048-h128": "the source's own run of 203 billion "
    "parameters by the same plan shows 67 GB of 80",
}


def reason(row: Row) -> str | None:
    """Why the statistics leave a row out, if they do."""
    whole = row.ranks("shard") in (1, row.ranks("data"))
    if row.family == "InternEvo" and whole:
        return "each rank broadcasts the parameters that it updates, as many messages as ranks"
    return CONTRADICTED.get(row.id)
