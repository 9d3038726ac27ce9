"""Datasets: an optimizer step's number in, this data rank's micro-batches of token ids out.

The run's n-th sample (n counts over all steps and ranks) is the same whatever the mesh, and the
step's number is the whole state. B sequences of a micro-batch on a rank  T tokens
"""

import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from .context import own_tokens
from .errors import UserError
from .mesh import Mesh
from .random import bits
from .tokenise import DTYPES, find_files, mapped, memory_map

# llm.c writes 256 int32 before the tokens; the first tells the type of what follows.
HEADER_BYTES = 1024
HEADER_DTYPES = {20240520: "uint16", 20240801: "uint32"}


@dataclass(frozen=True, slots=True, kw_only=True)
class MicroBatch:
    """samples_B: the samples' numbers in the run (int64). first, last: of its step."""

    tokens_BT: Tensor
    targets_BT: Tensor
    samples_B: Tensor
    first: bool
    last: bool


class Source(Protocol):
    """Samples of T + 1 tokens by number, from 0 to count - 1."""

    count: int

    def read(self, numbers: Tensor) -> Tensor: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Dataset:
    source: Source
    sequence_length: int
    seed: int

    @property
    def samples(self) -> int:
        """In one epoch."""
        return self.source.count

    def batch(self, step: int, global_batch: int, mesh: Mesh) -> "Batch":
        """global_batch: sequences of one optimizer step, over the whole mesh."""
        return self.take(step * global_batch, global_batch, mesh)

    def take(self, first: int, rows: int, mesh: Mesh) -> "Batch":
        """`rows` sequences from the run's sample number `first` on."""
        return Batch(dataset=self, first=first, rows=rows, mesh=mesh)

    def read(self, counters: Tensor) -> Tensor:
        """[n, T + 1] ids: each epoch is another seeded permutation of all samples."""
        epochs, positions = counters // self.samples, counters % self.samples
        numbers = torch.empty_like(counters)
        for epoch in epochs.unique().tolist():
            here = epochs == epoch
            numbers[here] = permute(positions[here], self.samples, self.seed, epoch)
        return self.source.read(numbers)


@dataclass(frozen=True, slots=True)
class Ramp:
    """A batch that grows up to `batch` sequences. stages: (steps, sequences of each) before.

    The run's samples come in the same order as without it, cut into other steps.
    """

    batch: int
    stages: tuple[tuple[int, int], ...]

    def rows(self, step: int) -> int:
        """Sequences of a step (from 0)."""
        for steps, rows in self.stages:
            if step < steps:
                return rows
            step -= steps
        return self.batch

    def first(self, step: int) -> int:
        """How many sequences the steps before it had: the number of its first sample."""
        seen = 0
        for steps, rows in self.stages:
            if step < steps:
                return seen + step * rows
            seen, step = seen + steps * rows, step - steps
        return seen + step * self.batch


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """first: the run's number of its first sample. rows: sequences over the whole mesh."""

    dataset: Dataset
    first: int
    rows: int
    mesh: Mesh

    @property
    def target_tokens(self) -> int:
        """Over the whole mesh: what the sum of token losses is divided by."""
        return self.rows * self.dataset.sequence_length

    def count(self, sequences: int) -> int:
        """Micro-batches of so many sequences on one data rank."""
        return self.rows // (sequences * self.mesh.data.size)

    def microbatches(self, count: int) -> Iterator[MicroBatch]:
        """Row j of micro-batch i on data rank r is row (i * data + r) * B + j of the batch; a
        context rank gets its own tokens of it."""
        data, context = self.mesh.data, self.mesh.context
        local_rows, rest = divmod(self.rows, count * data.size)
        assert rest == 0, (
            f"{self.rows} sequences do not divide into {count} micro-batches on {data.size} ranks"
        )
        for i in range(count):
            start = self.first + (i * data.size + data.rank) * local_rows
            counters = torch.arange(start, start + local_rows)
            ids = self.dataset.read(counters).to(self.mesh.device, non_blocking=True)
            yield MicroBatch(
                tokens_BT=own_tokens(ids[:, :-1], 1, context).contiguous(),
                targets_BT=own_tokens(ids[:, 1:], 1, context).contiguous(),
                samples_B=counters.to(self.mesh.device),
                first=i == 0,
                last=i == count - 1,
            )


def text(
    patterns: str | Sequence[str],
    *,
    sequence_length: int,
    vocab: int,
    tokenizer: str = "bytes",
    exclude: str | Sequence[str] = (),
    root: str = ".",
    cache: str | None = None,
    seed: int = 0,
) -> Dataset:
    """Text files, one after the other, tokenised once (tokenise.py).

    tokenizer: `bytes`, or the path of a tokenizer.json, whose end marker divides files.
    root: the folder that relative patterns are seen from.
    """
    made = memory_map(find_files(patterns, exclude, root), tokenizer, cache)
    if made.vocab > vocab:
        raise UserError(
            f"the tokenizer `{tokenizer}` has {made.vocab} tokens,"
            f" but the model's vocabulary has {vocab}"
        )
    source = _Files(
        [str(patterns)], [made.open()], sequence_length, vocab, about=f"text({patterns!r})"
    )
    return Dataset(source=source, sequence_length=sequence_length, seed=seed)


def tokens(
    patterns: str | Sequence[str],
    *,
    sequence_length: int,
    vocab: int,
    dtype: str | None = None,
    exclude: str | Sequence[str] = (),
    root: str = ".",
    seed: int = 0,
) -> Dataset:
    """Files of raw ids, as nanoGPT and llm.c write them; a sample never crosses files.

    dtype: uint16 or uint32; by default what llm.c's header or a name with `uint32` or `u32` says,
    else uint16.
    """
    paths = find_files(patterns, exclude, root)
    arrays = [_open_tokens(path, dtype) for path in paths]
    source = _Files(paths, arrays, sequence_length, vocab, about=f"tokens({patterns!r})")
    return Dataset(source=source, sequence_length=sequence_length, seed=seed)


def synthetic(*, sequence_length: int, vocab: int, seed: int = 0) -> Dataset:
    """Random ids without end: for measuring speed; nothing can be learned from them."""
    source = _Synthetic(sequence_length, vocab, seed)
    return Dataset(source=source, sequence_length=sequence_length, seed=seed)


def permute(positions: Tensor, count: int, seed: int, epoch: int) -> Tensor:
    """A permutation of range(count), chosen by seed and epoch, at these positions (int64).

    A Feistel network over the next power of four; what falls outside walks on until it is inside
    (Black and Rogaway 2002, Ciphers with Arbitrary Finite Domains).
    """
    half = max(1, ((count - 1).bit_length() + 1) // 2)
    mask = (1 << half) - 1
    stream = _mix(_mix(torch.tensor([seed])) ^ epoch)
    keys = _mix(stream ^ torch.arange(6)).tolist()
    values = positions.clone()
    outside = torch.ones_like(values, dtype=torch.bool)
    while outside.any():
        walking = values[outside]
        left, right = walking >> half, walking & mask
        for key in keys:
            left, right = right, left ^ (_mix(right ^ key) & mask)
        values[outside] = (left << half) | right
        outside = values >= count
    return values


def _mix(x: Tensor) -> Tensor:
    """splitmix64's next number after the state x."""
    return bits(x, torch.ones_like(x))


class _Files:
    """Samples cut from arrays of ids: number n is tokens [k T, k T + T] of its file."""

    def __init__(
        self, names: list[str], arrays: list[Tensor], length: int, vocab: int, *, about: str
    ):
        self.names, self.arrays, self.length, self.vocab = names, arrays, length, vocab
        counts = torch.tensor([max(0, (len(a) - 1) // length) for a in arrays])
        self.stops = counts.cumsum(0)
        self.firsts = self.stops - counts
        self.count = int(self.stops[-1])
        if self.count == 0:
            longest = max(len(a) for a in arrays)
            raise UserError(
                f"{about} has {longest} tokens in its longest file,"
                f" but a sample of {length} tokens and its targets need {length + 1}"
            )

    def read(self, numbers: Tensor) -> Tensor:
        files = torch.searchsorted(self.stops, numbers, right=True)
        starts = (numbers - self.firsts[files]) * self.length
        out = torch.empty(len(numbers), self.length + 1, dtype=torch.int64)
        for row, file, start in zip(out, files.tolist(), starts.tolist(), strict=True):
            row.copy_(self.arrays[file][start : start + self.length + 1])
        self._check(out, files)
        return out

    def _check(self, ids: Tensor, files: Tensor) -> None:
        if len(ids) and int(ids.max()) >= self.vocab:
            row = int(ids.amax(dim=1).argmax())
            raise UserError(
                f"{self.names[int(files[row])]} has token {int(ids[row].max())},"
                f" but the model's vocabulary has {self.vocab} (0 to {self.vocab - 1})"
            )


class _Synthetic:
    count = 2**40

    def __init__(self, length: int, vocab: int, seed: int):
        self.length, self.vocab, self.seed = length, vocab, seed

    def read(self, numbers: Tensor) -> Tensor:
        rows = _mix(numbers ^ _mix(torch.tensor([self.seed])))
        columns = _mix(torch.arange(self.length + 1))
        ids = _mix(rows[:, None] ^ columns[None, :])
        half = (ids >> 1) & (2**63 - 1)  # the remainder of 64 bits without a sign
        return (half % self.vocab * 2 + (ids & 1)) % self.vocab


def _open_tokens(path: str, dtype: str | None) -> Tensor:
    try:
        with open(path, "rb") as file:
            magic = int.from_bytes(file.read(4), sys.byteorder)
        size = os.path.getsize(path)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    raw = mapped(path, size)
    if size >= HEADER_BYTES and magic in HEADER_DTYPES and dtype in (None, HEADER_DTYPES[magic]):
        dtype, raw = HEADER_DTYPES[magic], raw[HEADER_BYTES:]
    if dtype is None:
        name = os.path.basename(path)
        dtype = "uint32" if "uint32" in name or "u32" in name else "uint16"
    if len(raw) % DTYPES[dtype].itemsize:
        raise UserError(f"{path} has {len(raw)} bytes, which are no whole number of {dtype}")
    return raw.view(DTYPES[dtype])
