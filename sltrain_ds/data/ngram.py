"""Perplexity of n-gram models on the validation sequences: baselines that a language model must beat.

    unigram        p(w)     = (c(w) + 1) / (N + V)
    bigram         p(w | v) = l c(v w) / c(v) + (1 - l) p(w)               Jelinek-Mercer, interpolated, one l
    witten_bell    p(w | v) = (c(v w) + k T(v) p(w)) / (c(v) + k T(v))     T(v): distinct followers of v

c counts in the train split (N tokens, vocabulary V); if c(v) = 0, both bigrams equal p(w). l and k are fitted on the
last 5% of the train split with counts from the rest, never on validation; the final counts use all of it. The
predicted tokens are those of the model's evaluation: all but the first of each sequence, and with mask_documents
also without the first of each document.
"""

import numpy as np

from sltrain_ds.data.dataset import IGNORED, Mixture, TokenData, as_mixture, to_batch
from sltrain_ds.errors import UserError

HELD_OUT = 0.05
MAX_TRAIN_TOKENS = 50_000_000
WEIGHTS = np.linspace(0.01, 0.99, 99)
STRENGTHS = np.geomspace(0.05, 20, 60)


def perplexities(
    train: TokenData | Mixture, validation: TokenData | Mixture, tokens: int, mask_documents: bool = False
) -> dict[str, float]:
    """{"unigram", "bigram", "witten_bell": perplexity, "weight": l, "strength": k, "predicted_tokens"}.

    `tokens` is the evaluation budget (eval.tokens). At most the first `MAX_TRAIN_TOKENS` of the train split are
    counted, divided by weight over the sources of a mixture; "train_tokens" is the number counted.
    """
    train, validation = as_mixture(train), as_mixture(validation)
    if train.vocab_size != validation.vocab_size:
        raise UserError(f"train has a vocabulary of {train.vocab_size}, validation of {validation.vocab_size}")
    streams = _streams(train)
    cuts = [round(len(stream) * (1 - HELD_OUT)) for stream in streams]
    fitted = _Counts([stream[:cut] for stream, cut in zip(streams, cuts, strict=True)], train.vocab_size)
    held = [stream[cut:] for stream, cut in zip(streams, cuts, strict=True)]
    pairs = np.concatenate([part[:-1] for part in held]), np.concatenate([part[1:] for part in held])
    if not len(pairs[0]):
        raise UserError(f"train split of {sum(map(len, streams))} tokens: too few to fit a bigram")
    held_out = fitted.look_up(*pairs)
    weight = float(min(WEIGHTS, key=lambda value: _loss(_jelinek_mercer(held_out, value))))
    strength = float(min(STRENGTHS, key=lambda value: _loss(_witten_bell(held_out, value))))

    batch = to_batch(validation.rows(*validation.evaluation(tokens)), validation.eos_id if mask_documents else None)
    rows = batch["input_ids"].numpy()
    counted = batch["labels"].numpy()[:, 1:] != IGNORED if mask_documents else np.ones(rows[:, 1:].shape, bool)
    found = _Counts(streams, train.vocab_size).look_up(rows[:, :-1][counted], rows[:, 1:][counted])
    return {
        "unigram": float(np.exp(_loss(found["unigram"]))),
        "bigram": float(np.exp(_loss(_jelinek_mercer(found, weight)))),
        "witten_bell": float(np.exp(_loss(_witten_bell(found, strength)))),
        "weight": weight,
        "strength": strength,
        "predicted_tokens": int(counted.sum()),
        "train_tokens": sum(map(len, streams)),
    }


def _streams(train: Mixture) -> list[np.ndarray]:
    total = sum(train.weights)
    return [
        data.tokens(0, min(data.num_tokens, int(MAX_TRAIN_TOKENS * weight / total)))
        for data, weight in zip(train.sources, train.weights, strict=True)
    ]


class _Counts:
    """Unigram and bigram counts of token streams (int64, ids below `vocab`)."""

    def __init__(self, streams: list[np.ndarray], vocab: int):
        self.vocab = vocab
        self.tokens = sum(np.bincount(stream, minlength=vocab) for stream in streams)
        self.contexts = sum(np.bincount(stream[:-1], minlength=vocab) for stream in streams)
        codes = np.concatenate([stream[:-1] * vocab + stream[1:] for stream in streams])
        self.codes, self.pairs = np.unique(codes, return_counts=True)
        self.followers = np.bincount(self.codes // vocab, minlength=vocab)

    def look_up(self, before: np.ndarray, token: np.ndarray) -> dict[str, np.ndarray]:
        """Inputs of the formulas, one value per predicted token."""
        codes = before * self.vocab + token
        place = np.minimum(np.searchsorted(self.codes, codes), len(self.codes) - 1)
        return {
            "unigram": (self.tokens[token] + 1) / (self.tokens.sum() + self.vocab),
            "pair": np.where(self.codes[place] == codes, self.pairs[place], 0),
            "context": self.contexts[before],
            "followers": self.followers[before],
        }


def _jelinek_mercer(found: dict[str, np.ndarray], weight: float) -> np.ndarray:
    weights = np.where(found["context"] > 0, weight, 0.0)
    return weights * found["pair"] / np.maximum(found["context"], 1) + (1 - weights) * found["unigram"]


def _witten_bell(found: dict[str, np.ndarray], strength: float) -> np.ndarray:
    mass = np.where(found["context"] > 0, strength * found["followers"], 1.0)
    return (found["pair"] + mass * found["unigram"]) / (found["context"] + mass)


def _loss(probability: np.ndarray) -> float:
    """Mean negative log likelihood, in nats per token."""
    return float(-np.log(probability).mean())
