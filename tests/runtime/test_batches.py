from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist

from llmspec.runtime import batches
from llmspec.runtime.batches import Dataset, permute
from llmspec.runtime.errors import UserError
from llmspec.runtime.mesh import Mesh
from tests.processes import run


@pytest.fixture
def words(tmp_path: Path) -> Dataset:
    """41 samples of 4 tokens: token k of the file is k."""
    np.arange(166, dtype="uint16").tofile(tmp_path / "a.bin")
    return batches.tokens("*.bin", root=str(tmp_path), sequence_length=4, vocab=166, seed=3)


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 16, 17, 1000, 4097])
def test_permutation(count: int):
    positions = torch.arange(count)
    one = permute(positions, count, seed=1, epoch=0)
    assert sorted(one.tolist()) == list(range(count))
    others = [permute(positions, count, 1, 1), permute(positions, count, 2, 0)]
    assert count < 16 or all((one != other).any() for other in others)
    assert torch.equal(permute(positions.flip(0), count, 1, 0), one.flip(0))
    # neighbours are scattered: a shuffled distance is a third of the whole
    assert count < 1000 or abs(one.diff().abs().double().mean() / count - 1 / 3) < 0.05


def gather(dataset: Dataset, steps: int, rows: int, microbatches: int, **sizes: int) -> list:
    """[(counter, tokens, targets)] of all data ranks, in the order of the global batch."""

    def of_rank(rank: int) -> list:
        mesh = Mesh.create("cpu", **sizes)
        out = []
        for step in range(steps):
            for i, micro in enumerate(dataset.batch(step, rows, mesh).microbatches(microbatches)):
                assert micro.tokens_BT.dtype == micro.samples_B.dtype == torch.int64
                assert (micro.first, micro.last) == (i == 0, i == microbatches - 1)
                for j, counter in enumerate(micro.samples_B.tolist()):
                    place = (step, i, mesh.data.rank, j)
                    row = micro.tokens_BT[j].tolist(), micro.targets_BT[j].tolist()
                    out.append((place, counter, *row))
        dist.barrier()  # none leaves while another still connects
        return out

    ranks = run(int(np.prod(list(sizes.values()) or [1])), of_rank)
    places = {row[0]: row for rank in ranks for row in rank}
    assert len(places) == steps * rows
    return [places[place][1:] for place in sorted(places)]


def test_the_same_samples_on_every_mesh(words: Dataset):
    one = gather(words, 12, 8, 1)
    assert [row[0] for row in one] == list(range(96))
    assert gather(words, 12, 8, 2, replicas=2) == one
    assert gather(words, 12, 8, 2, replicas=2, shards=2) == one
    assert gather(words, 12, 8, 4, pipeline=2, tensor=2) == one


def _parts(rank: int, dataset: Dataset) -> list:
    mesh = Mesh.create("cpu", replicas=2, context=2)
    micros = dataset.batch(1, 8, mesh).microbatches(2)
    values = [(m.tokens_BT.tolist(), m.targets_BT.tolist(), m.samples_B.tolist()) for m in micros]
    return [mesh.data.rank, mesh.context.rank, values]


def _alone(rank: int, dataset: Dataset) -> tuple:
    micro = next(iter(dataset.batch(1, 8, Mesh.create("cpu")).microbatches(1)))
    return micro.tokens_BT.tolist(), micro.targets_BT.tolist(), micro.samples_B.tolist()


def test_context_ranks_share_sequences(words: Dataset):
    """Chunks 0 and 3 of four on the first rank, 1 and 2 on the second."""
    tokens, targets, samples = run(1, _alone, words)[0]
    for data, context, values in run(4, _parts, words):
        places = [[0, 3], [1, 2]][context]
        for i, (ours, next_ones, numbers) in enumerate(values):
            rows = range((i * 2 + data) * 2, (i * 2 + data) * 2 + 2)
            assert ours == [[tokens[row][t] for t in places] for row in rows]
            assert next_ones == [[targets[row][t] for t in places] for row in rows]
            assert numbers == [samples[row] for row in rows]


def test_each_epoch_sees_each_sample_once(words: Dataset):
    assert words.samples == 41
    rows = words.read(torch.arange(123))
    assert (rows.diff() == 1).all()  # consecutive tokens
    for epoch in range(3):
        starts = rows[41 * epoch : 41 * epoch + 41, 0]
        assert sorted(starts.tolist()) == list(range(0, 164, 4))
    assert (rows[:41, 0] != rows[41:82, 0]).any()


def test_targets_follow_tokens_and_are_counted(words: Dataset):
    def check(rank: int) -> None:
        batch = words.batch(0, 6, Mesh.create("cpu"))
        assert batch.target_tokens == 24
        (micro,) = batch.microbatches(1)
        assert torch.equal(micro.targets_BT, micro.tokens_BT + 1)
        with pytest.raises(AssertionError, match="6 sequences do not divide into 4"):
            list(batch.microbatches(4))

    run(1, check)


def test_samples_do_not_cross_files(tmp_path: Path):
    for name, first, count in [("a", 0, 9), ("b", 100, 3), ("c", 200, 13)]:
        np.arange(first, first + count, dtype="uint16").tofile(tmp_path / f"{name}.bin")
    dataset = batches.tokens("*.bin", root=str(tmp_path), sequence_length=4, vocab=300)
    rows = dataset.source.read(torch.arange(dataset.samples))
    assert rows[:, 0].tolist() == [0, 4, 200, 204, 208]
    assert rows[-1].tolist() == [208, 209, 210, 211, 212]


def test_types_and_headers(tmp_path: Path):
    ids = np.array([5, 70000, 6], dtype="uint32")
    ids.tofile(tmp_path / "x.uint32.bin")
    ids.tofile(tmp_path / "plain.bin")
    header = np.zeros(256, dtype="int32")
    header[0] = 20240520
    with open(tmp_path / "llmc.bin", "wb") as file:
        file.write(header.tobytes() + np.array([7, 8, 9], dtype="uint16").tobytes())

    def read(name: str, **options) -> list[int]:
        dataset = batches.tokens(
            name, root=str(tmp_path), sequence_length=2, vocab=80000, **options
        )
        return dataset.source.read(torch.zeros(1, dtype=torch.int64))[0].tolist()

    assert read("x.uint32.bin") == read("plain.bin", dtype="uint32") == [5, 70000, 6]
    assert read("llmc.bin") == [7, 8, 9]
    (tmp_path / "odd.bin").write_bytes(b"123")
    with pytest.raises(
        UserError, match=r"odd\.bin has 3 bytes, which are no whole number of uint16"
    ):
        read("odd.bin")


def test_too_little_and_too_great(tmp_path: Path, words: Dataset):
    root = str(tmp_path)
    (tmp_path / "empty.u16").write_bytes(b"")
    with pytest.raises(UserError, match=r"tokens\('empty.u16'\) has 0 tokens .* need 5"):
        batches.tokens("empty.u16", root=root, sequence_length=4, vocab=9)
    small = batches.tokens("a.bin", root=root, sequence_length=4, vocab=100)
    with pytest.raises(
        UserError, match=r"a\.bin has token 1\d\d, but the model's vocabulary has 100"
    ):
        small.read(torch.arange(41))
    (tmp_path / "t.txt").write_text("some text")
    with pytest.raises(UserError, match="`bytes` has 256 tokens, but the model's vocabulary has 9"):
        batches.text("t.txt", root=root, sequence_length=4, vocab=9, cache=root)


def test_text(tmp_path: Path):
    (tmp_path / "t.txt").write_text("abcdefghi")
    dataset = batches.text(
        "t.txt", root=str(tmp_path), sequence_length=4, vocab=256, cache=str(tmp_path / "cache")
    )
    assert {bytes(row) for row in dataset.read(torch.arange(2)).tolist()} == {
        b"abcde",
        b"efghi",
    }


def test_synthetic():
    dataset = batches.synthetic(sequence_length=64, vocab=1000, seed=5)
    rows = dataset.read(torch.arange(200))
    assert rows.min() >= 0 and rows.max() < 1000 and abs(rows.double().mean() - 499.5) < 10
    assert len({tuple(row) for row in rows.tolist()}) == 200
    assert (dataset.read(torch.tensor([7])) == rows[7]).all()
    other = batches.synthetic(sequence_length=64, vocab=1000, seed=6)
    assert (other.read(torch.tensor([7])) != rows[7]).any()


def test_ramp():
    ramp = batches.Ramp(8, ((3, 2), (2, 4)))
    assert [ramp.rows(step) for step in range(7)] == [2, 2, 2, 4, 4, 8, 8]
    assert [ramp.first(step) for step in range(7)] == [0, 2, 4, 6, 10, 14, 22]


def test_a_ramp_reads_the_same_samples(words: Dataset):
    """In the same order, cut into other steps; micro-batches keep their size."""

    def of_rank(rank: int) -> list:
        mesh = Mesh.create("cpu", shards=2)
        ramp, out = batches.Ramp(8, ((2, 2), (1, 4))), []
        for step in range(5):
            batch = words.take(ramp.first(step), ramp.rows(step), mesh)
            micros = list(batch.microbatches(batch.count(1)))
            assert all(len(micro.tokens_BT) == 1 for micro in micros)
            assert len(micros) == ramp.rows(step) // 2
            out += [(int(m.samples_B[0]), m.tokens_BT[0].tolist()) for m in micros]
        dist.barrier()
        return out

    seen = sorted(sample for rank in run(2, of_rank) for sample in rank)
    assert [number for number, _ in seen] == list(range(24))
    assert [tokens for _, tokens in seen] == words.read(torch.arange(24))[:, :-1].tolist()
