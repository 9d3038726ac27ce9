"""Tiles that are worth measuring for one kernel, by stated rules."""

from __future__ import annotations

from collections.abc import Iterator

Tile = tuple[int, int, int, int]
"""Rows, columns, warps, stages."""

ELEMENTS = (1024, 2048, 4096, 8192)
"""Of a tile that need not hold whole rows; one that must may be as large as its rows."""
NARROWEST, WIDEST = 256, 4096
"""Columns of such a tile, where the tensor has as many."""
PER_THREAD = (4, 32)
"""Numbers of a value in one thread: below, loads are narrower than 16 bytes; above, too few threads
wait for memory at once."""
REGISTERS = 224
"""Of a thread's 255, for values; the rest is addresses."""
WARPS = (1, 2, 4, 8, 16, 32)
STAGES = (2, 3, 4)
"""Besides 1, of a kernel that goes over several tiles."""


def tiles(columns: int, *, whole_rows: bool, alive: int) -> list[Tile]:
    """columns: of the tensor. whole_rows: the kernel reduces rows, and holds them whole. alive:
    values of the tile's shape at once. Stages are measured afterwards, with the best of these."""
    shapes = _whole(columns) if whole_rows else _parts(columns)
    return [
        (rows, wide, warps, 1)
        for rows, wide in shapes
        for warps in WARPS
        if _fits(rows * wide, warps, alive)
    ]


def _fits(elements: int, warps: int, alive: int) -> bool:
    per_thread = elements / (32 * warps)
    least, most = PER_THREAD
    return least <= per_thread <= most and per_thread * alive <= REGISTERS


def _whole(columns: int) -> Iterator[tuple[int, int]]:
    wide = power_of_two(columns)
    rows = 1
    while rows == 1 or rows * wide <= ELEMENTS[-1]:
        yield rows, wide
        rows *= 2


def _parts(columns: int) -> Iterator[tuple[int, int]]:
    wide = min(power_of_two(columns), WIDEST)
    while True:
        for elements in ELEMENTS:
            if elements >= wide:
                yield elements // wide, wide
        if wide <= NARROWEST:
            return
        wide //= 2


def power_of_two(count: int) -> int:
    return 1 << max(count - 1, 0).bit_length()
