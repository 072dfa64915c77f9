"""What a run reads must exist and fit: the tokenizer, the prepared data, one vocabulary in all of them."""

import hashlib
from pathlib import Path

from sltrain_ds.errors import UserError

from .jsonfile import read_json

# a model may pad its vocabulary up to here, for matrix sizes; a smaller one cannot hold the data's tokens
_PADDING = 128


def check_files(block, fields):
    """Tokenizer and data directories of a typed `sltrain` block against the model's fields. UserError names the first misfit."""
    tokenizer = Path(block.tokenizer)
    if not tokenizer.is_dir():
        raise UserError(_missing("sltrain.tokenizer", tokenizer, "`sltrain-ds tokenizer train --input FILE --out DIR`"))
    digests = {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in _tokenizer_files(tokenizer)}
    if not digests:
        raise UserError(
            f"sltrain.tokenizer: {tokenizer} holds neither tokenizer.json nor tokenizer.model; give a tokenizer's directory"
        )
    directories = [block.data.dir] if isinstance(block.data.dir, str) else list(block.data.dir)
    for directory in directories:
        _check_data(Path(directory), block, fields)


def _tokenizer_files(directory):
    return [directory / name for name in ("tokenizer.json", "tokenizer.model") if (directory / name).is_file()]


def _check_data(directory, block, fields):
    prepare = "`sltrain-ds data prepare --input FILE --tokenizer DIR --out DIR`"
    if not directory.is_dir():
        raise UserError(_missing("sltrain.data.dir", directory, prepare))
    if not (directory / "index.json").is_file():
        raise UserError(
            f"sltrain.data.dir: {directory} has no index.json, so it was not prepared to the end; run {prepare}"
        )
    index = read_json(directory / "index.json")
    vocab, model_vocab = index.get("vocab_size"), fields.get("vocab_size")
    if not isinstance(vocab, int) or not isinstance(index.get("splits"), dict):
        raise UserError(f"{directory / 'index.json'}: has no vocab_size and splits; run {prepare} again")
    if model_vocab is not None and not vocab <= model_vocab < vocab + _PADDING:
        raise UserError(
            f"sltrain.model: vocabulary of {model_vocab} differs from that of {directory} ({vocab}); set vocab_size to {vocab} "
            f"in sltrain.model.config, or prepare the data with a tokenizer of {model_vocab}"
        )
    length = block.data.sequence_length
    for name, split in index["splits"].items():
        if split.get("tokens", 0) < length:
            raise UserError(
                f"sltrain.data.sequence_length: {length} is above the {split.get('tokens', 0)} tokens of split {name} in "
                f"{directory}; set it lower or prepare more text"
            )


def _missing(key, directory, command):
    base = "" if directory.is_absolute() else f" below the current directory {Path.cwd()}"
    return f"{key}: {directory} does not exist{base}; make it with {command}, or name another"
