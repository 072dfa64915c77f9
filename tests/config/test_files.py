"""Tokenizer and data on disk: they exist, they fit each other and the model."""

import json
import os
import shutil
from pathlib import Path

import pytest

from sltrain_ds.config import from_dict, load
from sltrain_ds.errors import UserError


def test_what_fits_passes(tiny_config, tmp_path):
    path = tmp_path / "run.json"
    path.write_text(json.dumps(tiny_config()))
    assert load(path).sltrain.steps == 5


def test_relative_paths_start_at_the_current_directory(tiny, tiny_config, monkeypatch):
    monkeypatch.chdir(tiny["data"].parent)
    config = tiny_config(sltrain__tokenizer="tokenizer", sltrain__data__dir={"data": 1})
    from_dict(config, check_files=True)
    monkeypatch.chdir("/")
    with pytest.raises(
        UserError, match=r"sltrain\.tokenizer: tokenizer does not exist below the current directory /; make"
    ):
        from_dict(config, check_files=True)


@pytest.mark.parametrize(
    "changes, says",
    [
        (
            {"sltrain__tokenizer": "/nowhere"},
            "sltrain.tokenizer: /nowhere does not exist; make it with `sltrain-ds tokenizer "
            "train --input FILE --vocab-size N --out DIR`",
        ),
        (
            {"sltrain__data__dir": "/nowhere"},
            "sltrain.data.dir: /nowhere does not exist; make it with `sltrain-ds data prep",
        ),
        ({"sltrain__model__config__vocab_size": 383}, "vocabulary of 383 differs from the 384 tokens of"),
        ({"sltrain__model__config__vocab_size": 512}, "set vocab_size to 384 in sltrain.model.config"),
        ({"comet": {"enabled": True}}, "comet.enabled: true needs the package comet_ml"),
    ],
)
def test_what_does_not(tiny_config, changes, says):
    with pytest.raises(UserError) as caught:
        from_dict(tiny_config(**changes), check_files=True)
    assert says in str(caught.value) and "\n" not in str(caught.value)
    changed = tiny_config(**changes)
    assert from_dict(changed).world_size == 1  # without looking at the files


def test_a_padded_vocabulary_is_fine(tiny_config):
    from_dict(tiny_config(sltrain__model__config__vocab_size=448), check_files=True)


def test_directories_that_are_not_what_they_should_be(tiny, tiny_config, tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(UserError, match=r"holds no index\.json"):
        from_dict(tiny_config(sltrain__data__dir=str(empty)), check_files=True)
    with pytest.raises(UserError, match=r"holds no tokenizer\.json"):
        from_dict(tiny_config(sltrain__tokenizer=str(empty)), check_files=True)


def test_another_tokenizer_of_the_same_size(tiny, tiny_config, tmp_path):
    """Two tokenizers with equally many tokens still give other numbers."""
    other = tmp_path / "other"
    shutil.copytree(tiny["tokenizer"], other)
    file = other / "tokenizer.json"
    rules = json.loads(file.read_text())
    vocab = rules["model"]["vocab"]
    one, two = list(vocab)[-2:]
    vocab[one], vocab[two] = vocab[two], vocab[one]
    file.write_text(json.dumps(rules))
    with pytest.raises(UserError, match=r"sltrain\.tokenizer: .*other is not the one that .* was prepared with"):
        from_dict(tiny_config(sltrain__tokenizer=str(other)), check_files=True)


def test_sequence_longer_than_a_split(tiny, tiny_config):
    tokens = json.loads((tiny["data"] / "index.json").read_text())["splits"]["validation"]["tokens"]
    config = tiny_config(
        sltrain__model__config__max_position_embeddings=10**6, sltrain__data__sequence_length=tokens + 1
    )
    with pytest.raises(
        UserError, match=rf"sequence_length: {tokens + 1} is above the {tokens} tokens of split validation"
    ):
        from_dict(config, check_files=True)


@pytest.mark.parametrize("key", ["run_dir", "checkpoint.dir"])
@pytest.mark.parametrize("below", ["", "/deep/down"])
def test_places_that_are_files(tiny_config, tmp_path, key, below):
    (tmp_path / "file").write_text("x")
    name = f"{tmp_path}/file{below}"
    config = tiny_config(**{f"sltrain__{key.replace('.', '__')}": name})
    from_dict(config)  # without looking
    with pytest.raises(UserError, match=rf"sltrain\.{key}: {tmp_path}/file is a file, not a directory") as caught:
        from_dict(config, check_files=True)
    assert ("is under it" in str(caught.value)) == bool(below)


@pytest.mark.parametrize("key", ["run_dir", "checkpoint.dir"])
def test_places_that_cannot_be_written(tiny_config, tmp_path, monkeypatch, key):
    """Told before anything is built, not after the first `checkpoint.every` steps."""
    closed = tmp_path / "closed"
    closed.mkdir()
    access = os.access  # root may write everywhere
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != closed and access(path, mode))
    config = tiny_config(**{f"sltrain__{key.replace('.', '__')}": f"{closed}/deep/down"})
    with pytest.raises(UserError, match=rf"sltrain\.{key}: .*/deep/down cannot be written, {closed} is read-only"):
        from_dict(config, check_files=True)
