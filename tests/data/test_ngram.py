import math
from itertools import pairwise

import numpy as np
import pytest

from sltrain_ds.data.dataset import TokenData
from sltrain_ds.data.ngram import HELD_OUT, STRENGTHS, WEIGHTS, perplexities
from sltrain_ds.errors import UserError

LENGTH, VOCAB = 8, 12


@pytest.fixture
def splits(make_data):
    random = np.random.default_rng(0)

    def chain(count):  # each token tends to be followed by the next one; 2 ends a document now and then
        out = [3]
        for _ in range(count - 1):
            out.append((out[-1] + 1) % (VOCAB - 1) if random.random() < 0.7 else int(random.integers(VOCAB - 1)))
        return out

    folder = make_data("chain", {"train": [chain(900), chain(300)], "validation": [chain(203)]}, vocab_size=VOCAB)
    return [TokenData(folder, split, LENGTH) for split in ("train", "validation")]


def formulas(train, pairs, weight, strength):
    """The three losses, token by token, in plain Python."""
    count, pair, context = {}, {}, {}
    for token in train:
        count[token] = count.get(token, 0) + 1
    for v, w in pairwise(train):
        pair[v, w] = pair.get((v, w), 0) + 1
        context[v] = context.get(v, 0) + 1
    sums = [0.0, 0.0, 0.0]
    for v, w in pairs:
        p = (count.get(w, 0) + 1) / (len(train) + VOCAB)
        c, followers = context.get(v, 0), sum(1 for left, _ in pair if left == v)
        bigram = weight * pair.get((v, w), 0) / c + (1 - weight) * p if c else p
        bell = (pair.get((v, w), 0) + strength * followers * p) / (c + strength * followers) if c else p
        for i, value in enumerate((p, bigram, bell)):
            sums[i] -= math.log(value)
    return [total / len(pairs) for total in sums]


@pytest.mark.parametrize("masked", [False, True])
def test_perplexities_are_the_formulas_on_the_models_tokens(splits, masked):
    train, validation = splits
    got = perplexities(train, validation, 160, mask_documents=masked)
    rows = [validation[i * 25 // 20].tolist() for i in range(20)]  # 160 tokens of 25 sequences, spread
    pairs = [(v, w) for row in rows for v, w in pairwise(row) if not (masked and v == 2)]
    assert got["predicted_tokens"] == len(pairs)
    tokens = train.tokens(0, 10**9).tolist()
    wanted = formulas(tokens, pairs, got["weight"], got["strength"])
    for name, loss in zip(("unigram", "bigram", "witten_bell"), wanted, strict=True):
        assert got[name] == pytest.approx(math.exp(loss), rel=1e-12)
    assert got["bigram"] < got["unigram"] * 0.7


def test_interpolation_is_fitted_on_held_out_training_tokens(splits):
    train, validation = splits
    got = perplexities(train, validation, 10**9)
    tokens = train.tokens(0, 10**9).tolist()
    cut = round(len(tokens) * (1 - HELD_OUT))
    held = list(pairwise(tokens[cut:]))
    best = min(WEIGHTS, key=lambda value: formulas(tokens[:cut], held, value, 1.0)[1])
    assert got["weight"] == pytest.approx(best)
    best = min(STRENGTHS, key=lambda value: formulas(tokens[:cut], held, 0.5, value)[2])
    assert got["strength"] == pytest.approx(best)


def test_tokens_and_contexts_never_seen_have_a_probability(make_data):
    folder = make_data("unseen", {"train": [[3, 4] * 40], "validation": [[9, 10, 11, 3] * 4]}, vocab_size=VOCAB)
    got = perplexities(TokenData(folder, "train", 8), TokenData(folder, "validation", 8), 100)
    assert all(math.isfinite(got[name]) for name in ("unigram", "bigram", "witten_bell"))


def test_refuses(make_data, splits):
    other = TokenData(make_data("other", {"train": [[3] * 20]}, vocab_size=50), "train", LENGTH)
    with pytest.raises(UserError, match="vocabulary of 50, validation of 12"):
        perplexities(other, splits[1], 100)
    short = TokenData(make_data("short", {"train": [[3] * 8]}, vocab_size=VOCAB), "train", LENGTH)
    with pytest.raises(UserError, match="8 tokens: too few"):
        perplexities(short, splits[1], 100)
