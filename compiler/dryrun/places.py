"""Which line of the emitted program computes now, also while its gradient is made."""

from __future__ import annotations

import linecache
import sys
from types import FrameType
from typing import NamedTuple

import torch


class Place(NamedTuple):
    """A line of the program; `backward`: its gradient is being made."""

    file: str = ""
    line: int = 0
    function: str = ""
    backward: bool = False

    @property
    def words(self) -> str:
        """As "`x = F.linear(x, w)` (model.py:12, LayerSwiglu.forward)"."""
        if not self.file:
            return "PyTorch"
        text = linecache.getline(self.file, self.line).strip()
        short = "/".join(self.file.split("/")[-2 if "/runtime/" in self.file else -1 :])
        of = "the backward of " if self.backward else ""
        return f"{of}`{text}` ({short}:{self.line}, {self.function})"


class Places:
    """`folder`: of the program. Lines of the model go before those of the training loop and of the
    runtime, and these before PyTorch's."""

    def __init__(self, folder: str):
        self.folder = folder.rstrip("/") + "/"
        self.around = (self.folder + "runtime/", self.folder + "train.py")
        # the forward that made a node of autograd, by the node's number
        self.of_node: dict[int, Place] = {}

    def remember(self) -> None:
        """Of an operator, before it runs: whether autograd has made a node for it."""
        number = torch._C._autograd._get_sequence_nr() - 1
        if number not in self.of_node:
            self.of_node[number] = self._found()[0]

    def now(self) -> Place:
        place, of_model = self._found()
        node = torch._C._current_autograd_node()
        if of_model or node is None:
            return place  # also where a block is computed again
        return self.of_node.get(node._sequence_nr(), place)._replace(backward=True)

    def _found(self) -> tuple[Place, bool]:
        """The innermost line, and whether it is of the model."""
        frame: FrameType | None = sys._getframe(2)
        inside: FrameType | None = None
        while frame is not None:
            name = frame.f_code.co_filename
            if name.startswith(self.folder):
                if not name.startswith(self.around):
                    return _at(frame), True
                inside = inside or frame
            frame = frame.f_back
        return (_at(inside) if inside is not None else Place()), False


def _at(frame: FrameType) -> Place:
    return Place(frame.f_code.co_filename, frame.f_lineno, frame.f_code.co_qualname)
