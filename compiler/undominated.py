"""Which of many rows of numbers no other one exceeds."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import compress
from typing import TypeVar

import numpy as np

Row = TypeVar("Row", bound=tuple[int, ...])


def undominated(rows: Iterable[Row]) -> tuple[Row, ...]:
    """Each different row but those that another one reaches in every number, in the order given.
    All are of one length."""
    known = list(dict.fromkeys(rows))
    if not known:
        return ()
    table = np.array(known)
    reached_by = (table[None] >= table[:, None]).all(axis=2).sum(axis=1)
    return tuple(compress(known, reached_by == 1))  # by itself alone
