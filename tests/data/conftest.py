"""Small corpora, tokenizers and prepared directories, made once."""

import json

import numpy as np
import pytest

from sltrain_ds.data import tokenizer as tokenizers
from sltrain_ds.data.index import DTYPES, file_sha256

WORDS = [
    "the",
    "a",
    "cat",
    "dog",
    "house",
    "tree",
    "runs",
    "sleeps",
    "sees",
    "under",
    "over",
    "red",
    "old",
    "she",
    "it",
]


def make_documents(count: int, seed: int = 0) -> list[str]:
    random = np.random.default_rng(seed)
    return [f"{i} " + " ".join(random.choice(WORDS, size=random.integers(3, 40))) for i in range(count)]


@pytest.fixture(scope="session")
def documents():
    return make_documents(200)


@pytest.fixture(scope="session")
def tokenizer_dir(tmp_path_factory, documents):
    out = tmp_path_factory.mktemp("tokenizer") / "bpe"
    tokenizers.train(documents, 320, out)
    return out


@pytest.fixture
def make_data(tmp_path):
    """make_data(name, {split: [[tokens], [tokens]]}, vocab_size=...) -> directory, a list of tokens a shard."""

    def make(name, splits, vocab_size=1000, eos_id=2, dtype="uint16", tokenizer="0" * 64):
        folder = tmp_path / name
        folder.mkdir()
        index = {"format": 1, "dtype": dtype, "tokenizer_sha256": tokenizer, "vocab_size": vocab_size}
        index |= {"eos_id": eos_id, "splits": {}, "source": {}}
        for split, shards in splits.items():
            entries = []
            for number, tokens in enumerate(shards):
                path = folder / f"{split}-{number:05d}.bin"
                np.asarray(tokens, DTYPES[dtype]).tofile(path)
                entries.append({"file": path.name, "tokens": len(tokens), "sha256": file_sha256(path)})
            index["splits"][split] = {
                "shards": entries,
                "tokens": sum(map(len, shards)),
                "documents": sum(list(tokens).count(eos_id) for tokens in shards),
            }
        (folder / "index.json").write_text(json.dumps(index))
        return folder

    return make
