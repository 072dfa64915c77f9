"""Training and validation batches of prepared data; their order is a pure function of (seed, step)."""

from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import torch

from sltrain_ds.data.index import DTYPES, NAME, check_sizes, read_index
from sltrain_ds.data.order import BLOCK, assign, epoch_order, shares
from sltrain_ds.errors import UserError

IGNORED = -100  # label that the loss ignores, as in transformers


class TokenData:
    """One split of a prepared directory as non-overlapping sequences of `sequence_length` tokens.

    `data[i]` is int64 (sequence_length,). Labels are the same tokens; the model shifts them. A last, incomplete
    sequence is dropped and counted in `dropped_tokens`.
    """

    def __init__(self, directory: str | Path, split: str, sequence_length: int):
        self.directory, self.split, self.sequence_length = Path(directory), split, int(sequence_length)
        if self.sequence_length < 2:
            raise UserError(f"sltrain.data.sequence_length {sequence_length}: must be at least 2")
        self.index = read_index(self.directory)
        if split not in self.index["splits"]:
            raise UserError(f"{self.directory / NAME}: no split {split!r}; there are {', '.join(self.index['splits'])}")
        check_sizes(self.directory, self.index, (split,))
        self.vocab_size, self.eos_id = self.index["vocab_size"], self.index["eos_id"]
        shards = self.index["splits"][split]["shards"]
        dtype = DTYPES[self.index["dtype"]]
        self._shards = [np.memmap(self.directory / shard["file"], dtype, "r") for shard in shards]
        self._ends = np.cumsum([len(shard) for shard in self._shards], dtype=np.int64)
        self.num_tokens = int(self._ends[-1]) if shards else 0
        self.num_sequences, self.dropped_tokens = divmod(self.num_tokens, self.sequence_length)

    def __len__(self) -> int:
        return self.num_sequences

    def tokens(self, start: int, stop: int) -> np.ndarray:
        """Tokens [start, stop) of the whole split as int64; the range may span shards."""
        parts = []
        for shard, end in zip(self._shards, self._ends.tolist(), strict=True):
            begin = end - len(shard)
            if begin < stop and start < end:
                parts.append(shard[max(start, begin) - begin : min(stop, end) - begin])
        return np.concatenate(parts).astype(np.int64) if parts else np.empty(0, np.int64)

    def __getitem__(self, i: int) -> np.ndarray:
        if not 0 <= i < self.num_sequences:
            raise IndexError(i)
        return self.tokens(int(i) * self.sequence_length, (int(i) + 1) * self.sequence_length)


class Mixture:
    """Weighted mixture of splits with one vocabulary and sequence length; weights are shares of the sequences.

    Every `BLOCK` samples contain exactly each source's share, in a keyed order. Each source has its own epochs.
    """

    def __init__(self, sources: list[TokenData], weights: list[float]):
        self.sources, self.weights = sources, tuple(float(weight) for weight in weights)
        first = sources[0]
        for data, weight in zip(sources, self.weights, strict=True):
            if not 0 < weight < float("inf"):
                raise UserError(f"sltrain.data.dir: weight {weight} of {data.directory}: must be above 0")
            if data.num_sequences == 0:
                raise UserError(
                    f"data {data.directory}: its {data.split} split has {data.num_tokens} tokens, "
                    f"too few for one sequence of {data.sequence_length}"
                )
            if data.index["tokenizer_sha256"] != first.index["tokenizer_sha256"]:
                raise UserError(f"sltrain.data.dir: {first.directory} and {data.directory} have different tokenizers")
        for data, share in zip(sources, shares(self.weights), strict=True):
            if share == 0:
                raise UserError(f"sltrain.data.dir: the weight of {data.directory} is below 1/{BLOCK} of the whole")
        self.sequence_length, self.vocab_size, self.eos_id = first.sequence_length, first.vocab_size, first.eos_id

    @property
    def num_sequences(self) -> int:
        return sum(data.num_sequences for data in self.sources)

    @property
    def dropped_tokens(self) -> int:
        return sum(data.dropped_tokens for data in self.sources)

    def order(self, samples: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
        """(source, sequence within that source) of the run's samples k >= 0."""
        source, number = assign(samples, seed, self.weights)
        sequence = np.empty_like(number)
        for s, data in enumerate(self.sources):
            here = source == s
            sequence[here] = epoch_order(number[here], data.num_sequences, seed, s)
        return source, sequence

    def rows(self, source: np.ndarray, sequence: np.ndarray) -> np.ndarray:
        """Tokens (n, sequence_length), int64."""
        return np.stack([self.sources[s][i] for s, i in zip(source.tolist(), sequence.tolist(), strict=True)])

    def evaluation(self, tokens: int) -> tuple[np.ndarray, np.ndarray]:
        """(source, sequence) of the validation set: `tokens` split by weight, spaced evenly over each source.

        Takes as many full sequences as the budget allows: at least one per source, at most all.
        """
        total = sum(self.weights)
        source, sequence = [], []
        for s, (data, weight) in enumerate(zip(self.sources, self.weights, strict=True)):
            n = data.num_sequences
            count = min(n, max(1, int(tokens * weight / total) // self.sequence_length))
            source.append(np.full(count, s))
            sequence.append(np.arange(count, dtype=np.int64) * n // count)
        return np.concatenate(source), np.concatenate(sequence)


def open_data(directories: str | Path | Mapping[str, float], split: str, sequence_length: int) -> Mixture:
    """The data of a config's `data.dir`: a directory, or {directory: weight}."""
    if not isinstance(directories, Mapping):
        directories = {directories: 1.0}
    if not directories:
        raise UserError("sltrain.data.dir: no directory in it")
    sources = [TokenData(directory, split, sequence_length) for directory in directories]
    return Mixture(sources, list(directories.values()))


def as_mixture(data: TokenData | Mixture) -> Mixture:
    return data if isinstance(data, Mixture) else Mixture([data], [1.0])


def batches(data: TokenData | Mixture, seed: int, step: int, global_batch: int):
    """(source, sequence) of every sample of global batch `step` (from 0), as two int64 arrays (global_batch,)."""
    samples = np.arange(step * global_batch, (step + 1) * global_batch, dtype=np.int64)
    return as_mixture(data).order(samples, seed)


class BatchSource:
    """Micro-batches of a run, computed from the step alone: a resumed run needs no other state.

    A step's global batch has the same sequences in the same order at any world size and micro-batch size; `row` of a
    micro-batch is its sample (micro * world + rank) * micro_batch + row.
    """

    def __init__(self, run, split: str = "train"):
        data = run.sltrain.data
        mixture = open_data(data.dir, split, data.sequence_length)
        self._set(mixture, run.sltrain.seed, run.train_batch_size, run.micro_batch_size, data.mask_documents)

    @classmethod
    def from_parts(
        cls, data: TokenData | Mixture, seed: int, global_batch: int, micro_batch: int, mask_documents: bool = False
    ) -> "BatchSource":
        """Build a `BatchSource` without a RunConfig; sizes in sequences."""
        source = cls.__new__(cls)
        source._set(as_mixture(data), seed, global_batch, micro_batch, mask_documents)
        return source

    def _set(self, data: Mixture, seed: int, global_batch: int, micro_batch: int, mask_documents: bool) -> None:
        self.data, self.seed, self.mask_documents = data, seed, mask_documents
        self.global_batch, self.micro_batch_size = global_batch, micro_batch

    def accumulation(self, world: int) -> int:
        """Micro-batches per step on each of `world` ranks."""
        steps, rest = divmod(self.global_batch, self.micro_batch_size * world)
        if rest or not steps:
            raise UserError(
                f"train_batch_size {self.global_batch}: no multiple of train_micro_batch_size_per_gpu "
                f"{self.micro_batch_size} x {world} ranks"
            )
        return steps

    def micro_batch(self, step: int, micro: int, rank: int, world: int) -> dict[str, torch.Tensor]:
        """CPU LongTensors for one forward: input_ids (micro_batch, sequence_length), and with mask_documents also
        position_ids and labels of that shape."""
        if not (0 <= micro < self.accumulation(world) and 0 <= rank < world):
            raise IndexError(f"micro {micro}, rank {rank} of {world}")
        first = step * self.global_batch + (micro * world + rank) * self.micro_batch_size
        samples = np.arange(first, first + self.micro_batch_size, dtype=np.int64)
        rows = self.data.rows(*self.data.order(samples, self.seed))
        return to_batch(rows, self.data.eos_id if self.mask_documents else None)


def to_batch(rows: np.ndarray, eos_id: int | None = None) -> dict[str, torch.Tensor]:
    """A batch from token rows (n, sequence_length). With `eos_id`, documents in one row do not attend to each other:

    position_ids restart at 0 after each EOS; from them transformers (masking_utils.py of 5.23,
    `find_packed_sequence_indices`) builds a block-diagonal causal mask for SDPA, at any batch size, but only if the
    model is called with use_cache=False. The first token of a document is not predicted (label -100).
    """
    input_ids = torch.from_numpy(np.ascontiguousarray(rows, dtype=np.int64))
    if eos_id is None:
        return {"input_ids": input_ids}
    starts = np.zeros(rows.shape, bool)
    starts[:, 1:] = rows[:, :-1] == eos_id
    place = np.arange(rows.shape[1])
    positions = place - np.maximum.accumulate(np.where(starts, place, 0), axis=1)
    labels = np.where(starts, IGNORED, rows)
    return {"input_ids": input_ids, "position_ids": torch.from_numpy(positions), "labels": torch.from_numpy(labels)}


def predicted_tokens(batch: Mapping[str, torch.Tensor]) -> int:
    """Number of tokens of a batch over which the shifted loss is averaged."""
    if "labels" in batch:
        return int((batch["labels"][:, 1:] != IGNORED).sum())
    rows, length = batch["input_ids"].shape
    return rows * (length - 1)


def evaluation_batches(
    data: TokenData | Mixture,
    tokens: int,
    batch_size: int,
    rank: int = 0,
    world: int = 1,
    mask_documents: bool = False,
) -> Iterator[tuple[dict[str, torch.Tensor], int]]:
    """(batch, weight) of this rank over a validation set of `tokens` tokens, the same set at any world and batch size.

    weight is the number of tokens averaged in the batch's mean loss: the total loss is sum(loss * weight) / sum(weight)
    over all ranks. Every rank gets the same number of batches, so that collectives inside the model match; a rank
    without sequences left gets a batch of one row and weight 0. The last batch may have fewer rows.
    """
    data = as_mixture(data)
    source, sequence = data.evaluation(tokens)
    eos_id = data.eos_id if mask_documents else None
    for start in range(0, len(source), batch_size * world):
        first = start + rank * batch_size
        here = slice(first, first + batch_size) if first < len(source) else slice(0, 1)
        batch = to_batch(data.rows(source[here], sequence[here]), eos_id)
        yield batch, predicted_tokens(batch) if first < len(source) else 0
