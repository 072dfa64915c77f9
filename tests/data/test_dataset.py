import numpy as np
import pytest
import torch

from sltrain_ds.data.dataset import (
    IGNORED,
    BatchSource,
    Mixture,
    TokenData,
    batches,
    evaluation_batches,
    open_data,
    predicted_tokens,
    to_batch,
)
from sltrain_ds.errors import UserError

LENGTH = 4


@pytest.fixture
def data(make_data):
    """25 sequences of 4 tokens, over three shards cut in the middle of sequences, and a tail of 3."""
    tokens = np.arange(103) + 10
    return TokenData(make_data("data", {"train": [tokens[:7], tokens[7:50], tokens[50:]]}), "train", LENGTH)


def test_sequences_run_over_shard_borders_and_the_tail_is_counted(data):
    assert (data.num_tokens, data.num_sequences, data.dropped_tokens, len(data)) == (103, 25, 3, 25)
    rows = np.stack([data[i] for i in range(25)])
    assert rows.dtype == np.int64
    assert rows.ravel().tolist() == list(range(10, 110))
    for i in (-1, 25):
        with pytest.raises(IndexError):
            data[i]


def test_uint32_tokens(make_data):
    folder = make_data("wide", {"train": [[100_000, 70_000, 2, 5]]}, vocab_size=200_000, dtype="uint32")
    assert TokenData(folder, "train", 4)[0].tolist() == [100_000, 70_000, 2, 5]


def global_batch(source, step, world):
    micros = range(source.accumulation(world))
    return torch.cat([source.micro_batch(step, m, r, world)["input_ids"] for m in micros for r in range(world)])


@pytest.mark.parametrize("seed", [0, 7])
def test_global_batch_is_the_same_at_every_world_and_micro_batch_size(data, seed):
    size = 16  # 25 sequences: epoch borders fall inside batches
    wanted = [global_batch(BatchSource.from_parts(data, seed, size, size), step, 1) for step in range(8)]
    for world in (1, 2, 4, 8):
        for micro in (1, 2):
            source = BatchSource.from_parts(data, seed, size, micro)
            for step in (7, 0, 3, 1):  # in any order: there is no state
                assert torch.equal(global_batch(source, step, world), wanted[step])


def test_order_is_the_function_that_batches_states(data):
    source = BatchSource.from_parts(data, 3, 6, 3)
    _, sequence = batches(data, 3, 5, 6)
    assert torch.equal(global_batch(source, 5, 1), torch.from_numpy(np.stack([data[i] for i in sequence])))


@pytest.mark.parametrize("size", [1, 3, 7, 25, 60])
def test_each_full_sequence_once_an_epoch(data, size):
    steps = -(-75 // size)
    seen = np.concatenate([batches(data, 0, step, size)[1] for step in range(steps)])[:75].reshape(3, 25)
    assert (np.sort(seen, axis=1) == np.arange(25)).all()
    assert (seen[0] != seen[1]).any()


def test_seeds_differ(data):
    assert (batches(data, 0, 0, 25)[1] != batches(data, 1, 0, 25)[1]).any()


def test_batch_that_does_not_divide_is_refused(data):
    with pytest.raises(UserError, match="train_batch_size 6"):
        BatchSource.from_parts(data, 0, 6, 2).micro_batch(0, 0, 0, 2)
    with pytest.raises(IndexError):
        BatchSource.from_parts(data, 0, 8, 2).micro_batch(0, 2, 0, 2)


def test_batch_source_of_a_run(make_data):
    from types import SimpleNamespace as Run

    folders = {str(make_data(name, {"train": [np.arange(40) + 10]})): weight for name, weight in (("a", 3), ("b", 1))}
    block = Run(seed=1, data=Run(dir=folders, sequence_length=LENGTH, mask_documents=True))
    run = Run(sltrain=block, train_batch_size=8, micro_batch_size=2)
    batch = BatchSource(run, "train").micro_batch(0, 1, 1, 2)
    assert {name: (value.shape, value.dtype) for name, value in batch.items()} == {
        name: ((2, LENGTH), torch.int64) for name in ("input_ids", "position_ids", "labels")
    }


def test_mixture_has_the_shares_and_epochs_of_its_own(make_data):
    sources = [
        TokenData(make_data(name, {"train": [np.full(LENGTH * n, 10 + n)]}), "train", LENGTH)
        for name, n in (("a", 5), ("b", 50))
    ]
    mixture = Mixture(sources, [1.0, 3.0])
    source, sequence = mixture.order(np.arange(4000), seed=0)
    assert abs((source == 0).mean() - 0.25) < 0.03
    for s, n in enumerate((5, 50)):
        own = sequence[source == s]
        own = own[: len(own) // n * n].reshape(-1, n)
        assert (np.sort(own, axis=1) == np.arange(n)).all()
    wanted = torch.cat([global_batch(BatchSource.from_parts(mixture, 0, 8, 8), step, 1) for step in range(3)])
    got = torch.cat([global_batch(BatchSource.from_parts(mixture, 0, 8, 1), step, 4) for step in range(3)])
    assert torch.equal(got, wanted)
    assert set(wanted.unique().tolist()) == {15, 60}


def test_mixture_refuses(make_data):
    a = make_data("a", {"train": [np.arange(40)]})
    b = make_data("b", {"train": [np.arange(40)]}, tokenizer="1" * 64)
    short = make_data("short", {"train": [np.arange(3)]})
    for directories, message in [
        ({a: 1, b: 1}, "different tokenizers"),
        ({a: 0}, "weight 0"),
        ({a: -1.0}, "weight -1"),
        ({a: float("nan")}, "weight nan"),
        ({}, "no directory"),
        (short, "too few for one sequence of 4"),
        ({a: 1e9, make_data("c", {"train": [np.arange(40)]}): 1}, "below 1/65536"),
    ]:
        with pytest.raises(UserError, match=message):
            open_data(directories, "train", LENGTH)


def test_evaluation_is_the_same_set_at_any_world_and_batch_size(data):
    budget = 50  # twelve sequences
    whole = [(row, 3) for batch, _ in evaluation_batches(data, budget, 1) for row in batch["input_ids"].tolist()]
    assert len(whole) == 12
    for world in (1, 2, 4, 8):
        for size in (1, 2, 3, 5, 16):
            ranks = [list(evaluation_batches(data, budget, size, rank, world)) for rank in range(world)]
            assert len({len(batches) for batches in ranks}) == 1  # collectives meet
            got, weights = [], 0
            for turn in zip(*ranks, strict=True):
                for batch, weight in turn:
                    assert len(batch["input_ids"]) >= 1
                    weights += weight
                    if weight:
                        assert weight == predicted_tokens(batch)
                        got += [(row, 3) for row in batch["input_ids"].tolist()]
            assert got == whole and weights == 36


def test_evaluation_budget(data):
    def count(tokens):
        return len(list(evaluation_batches(data, tokens, 1)))

    assert [count(tokens) for tokens in (1, 4, 99, 100, 10**9)] == [1, 1, 24, 25, 25]


def test_document_borders_in_a_batch():
    rows = np.array([[5, 6, 2, 7, 2, 2, 8, 9], [2, 5, 5, 5, 5, 5, 5, 2]])
    batch = to_batch(rows, eos_id=2)
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1, 0, 0, 1], [0, 0, 1, 2, 3, 4, 5, 6]]
    x = IGNORED
    assert batch["labels"].tolist() == [[5, 6, 2, x, 2, x, x, 9], [2, x, 5, 5, 5, 5, 5, 2]]
    assert predicted_tokens(batch) == 4 + 6
    assert set(to_batch(rows)) == {"input_ids"}


def test_masked_evaluation_weighs_predicted_tokens(make_data):
    folder = make_data("documents", {"train": [[2]], "validation": [[5, 6, 2, 7, 8, 9, 2, 7, 2]]})
    data = TokenData(folder, "validation", LENGTH)
    weights = [weight for _, weight in evaluation_batches(data, 100, 1, mask_documents=True)]
    assert weights == [2, 2]  # 6 2 | 9 2
