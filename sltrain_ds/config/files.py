"""What a run reads must exist and fit: the tokenizer, the prepared data, one vocabulary in all of them."""

import os
from importlib.util import find_spec
from pathlib import Path

from sltrain_ds.errors import UserError

# a model may pad its vocabulary by less than this, for matrix sizes; a smaller one cannot hold the data's tokens
_PADDING = 128
_TRAIN = "`sltrain-ds tokenizer train --input FILE --vocab-size N --out DIR`"
_PREPARE = "`sltrain-ds data prepare --input FILE --tokenizer DIR --out DIR`"


def check_files(block, fields):
    """Tokenizer and data directories of a typed `sltrain` block against the model's fields; the run's own places.

    Relative paths start at the current directory. UserError names the first key whose directory is missing or misfits.
    """
    for key, place in (("run_dir", block.run_dir), ("checkpoint.dir", block.checkpoint.dir)):
        _check_place(f"sltrain.{key}", Path(place))
    tokenizer = Path(block.tokenizer)
    if not tokenizer.is_dir():
        raise UserError(_missing("sltrain.tokenizer", tokenizer, _TRAIN))
    directories = [Path(name) for name in ([block.data.dir] if isinstance(block.data.dir, str) else block.data.dir)]
    for directory in directories:
        if not directory.is_dir():
            raise UserError(_missing("sltrain.data.dir", directory, _PREPARE))
    # late: reading a tokenizer imports transformers
    from sltrain_ds.data.index import read_index
    from sltrain_ds.data.tokenizer import tokenizer_sha256

    indices = [read_index(directory) for directory in directories]
    for directory, index in zip(directories, indices, strict=True):
        _check_vocabulary(directory, index["vocab_size"], fields.get("vocab_size"))
        _check_length(directory, index, block.data.sequence_length)
    digest = tokenizer_sha256(tokenizer)
    for directory, index in zip(directories, indices, strict=True):
        if index["tokenizer_sha256"] != digest:
            raise UserError(
                f"sltrain.tokenizer: {tokenizer} is not the one that {directory} was prepared with; name that one, or "
                f"prepare the data again with {_PREPARE}"
            )


def check_packages(data):
    """Monitors that are switched on need their packages. UserError names the monitor and the package."""
    for key, package in (("tensorboard", "tensorboard"), ("wandb", "wandb"), ("comet", "comet_ml")):
        if data.get(key, {}).get("enabled") and find_spec(package) is None:
            raise UserError(f"{key}.enabled: true needs the package {package}; pip install {package}, or set false")


def _check_place(key, place):
    """It can be made and written there: the first of its parents that exists is a directory one may write."""
    found = next(path for path in (place, *place.absolute().parents) if os.path.lexists(path))
    if not found.is_dir():
        under = "" if found == place else f", and {place} is under it"
        raise UserError(f"{key}: {found} is a file, not a directory{under}; name another directory")
    if not os.access(found, os.W_OK | os.X_OK):
        raise UserError(f"{key}: {place} cannot be written, {found} is read-only here; name another directory")


def _check_vocabulary(directory, vocab, model_vocab):
    if model_vocab is not None and not vocab <= model_vocab < vocab + _PADDING:
        raise UserError(
            f"sltrain.model: its vocabulary of {model_vocab} differs from the {vocab} tokens of {directory}; set "
            f"vocab_size to {vocab} in sltrain.model.config, or prepare the data with a tokenizer of {model_vocab}"
        )


def _check_length(directory, index, length):
    for name, split in index["splits"].items():
        if split["tokens"] < length:
            raise UserError(
                f"sltrain.data.sequence_length: {length} is above the {split['tokens']} tokens of split {name} in "
                f"{directory}; set it lower or prepare more text"
            )


def _missing(key, directory, command):
    base = "" if directory.is_absolute() else f" below the current directory {Path.cwd()}"
    return f"{key}: {directory} does not exist{base}; make it with {command}, or name another"
