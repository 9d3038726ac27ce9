"""Whole numbers shared out so that the shares sum to the whole."""

from __future__ import annotations

from collections.abc import Sequence


def shared_out(whole: int, sizes: Sequence[int]) -> list[int]:
    """`whole` in proportion to `sizes`, each to the nearest unit of what is left by then; the last
    gets it all where all sizes are 0."""
    left, size_left, found = whole, sum(sizes), []
    for size in sizes:
        share = round(left * size / size_left) if size_left else 0
        found.append(share)
        left, size_left = left - share, size_left - size
    if found:
        found[-1] += left
    return found


def from_the_end(whole: int, sizes: Sequence[int]) -> list[int]:
    """`whole` given to the last ones, each as much as it takes; what is over to the first."""
    left, found = whole, []
    for size in reversed(sizes):
        share = min(left, size)
        found.append(share)
        left -= share
    if found:
        found[-1] += left
    return found[::-1]
