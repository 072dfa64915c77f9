"""index.json of a prepared data directory: marks the directory as finished and describes its contents."""

import hashlib
import json
import os
from pathlib import Path

import numpy as np

from sltrain_ds.errors import UserError

FORMAT = 1
NAME, STATE_NAME = "index.json", "preparing.json"
DTYPES = {"uint16": np.dtype("<u2"), "uint32": np.dtype("<u4")}
SPLITS = ("train", "validation")


def write_json(path: Path, value: dict) -> None:
    """Write `value` to `path` atomically."""
    scratch = path.with_name(f".{path.name}.tmp")
    with scratch.open("w", encoding="utf-8") as file:
        json.dump(value, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    os.replace(scratch, path)


def file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_index(directory: str | Path) -> dict:
    """Read and check the index of a prepared directory. UserError if it is missing, unfinished or damaged."""
    directory = Path(directory)
    path = directory / NAME
    if not path.is_file():
        if (directory / STATE_NAME).is_file():
            raise UserError(f"data {directory}: not finished; run the same `sltrain-ds data prepare` again to continue")
        what = "holds no index.json" if directory.is_dir() else "no such directory"
        raise UserError(f"data {directory}: {what}; make it with `sltrain-ds data prepare`")
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path}: damaged, not JSON ({error}); prepare the data again with --overwrite") from error
    fault = _fault(index)
    if fault:
        raise UserError(f"{path}: {fault}; prepare the data again with --overwrite")
    return index


def _fault(index) -> str | None:
    if not isinstance(index, dict) or "format" not in index:
        return "not the index of prepared data"
    if index["format"] != FORMAT:
        return f"format {index['format']!r}, but this version reads {FORMAT}"
    try:
        if index["dtype"] not in DTYPES:
            return f"unknown dtype {index['dtype']!r}"
        top = np.iinfo(DTYPES[index["dtype"]]).max
        if not 0 <= index["eos_id"] < index["vocab_size"] <= top + 1:
            return f"eos_id {index['eos_id']}, vocab_size {index['vocab_size']} and {index['dtype']} do not fit"
        if not isinstance(index["tokenizer_sha256"], str):
            return "damaged: tokenizer_sha256"
        for name, split in index["splits"].items():
            if split["tokens"] != sum(shard["tokens"] for shard in split["shards"]) or split["documents"] < 0:
                return f"damaged: the shards of {name} do not add up"
            for shard in split["shards"]:
                if Path(shard["file"]).name != shard["file"] or shard["tokens"] < 1 or len(shard["sha256"]) != 64:
                    return f"damaged: shard {shard['file']!r}"
        if "train" not in index["splits"]:
            return "damaged: no train split"
    except (KeyError, TypeError, AttributeError) as error:
        return f"damaged: {error!r}"
    return None


def check_sizes(directory: Path, index: dict, splits=SPLITS) -> None:
    """Raise UserError for the first shard that is missing or differs from its recorded size."""
    width = DTYPES[index["dtype"]].itemsize
    for name in splits:
        for shard in index["splits"].get(name, {"shards": []})["shards"]:
            path = Path(directory) / shard["file"]
            if not path.is_file():
                raise UserError(f"{path}: missing, but {NAME} lists it; prepare the data again with --overwrite")
            size, wanted = path.stat().st_size, shard["tokens"] * width
            if size != wanted:
                raise UserError(
                    f"{path}: {size} bytes, but {NAME} says {wanted}; prepare the data again with --overwrite"
                )


def verify(directory: str | Path) -> dict:
    """Check every shard's size, sha256, token ids and final EOS. Returns the index or raises UserError."""
    directory = Path(directory)
    index = read_index(directory)
    check_sizes(directory, index)
    for split in index["splits"].values():
        for shard in split["shards"]:
            path = directory / shard["file"]
            if file_sha256(path) != shard["sha256"]:
                raise UserError(f"{path}: its sha256 is not the one in {NAME}; prepare the data again with --overwrite")
            tokens = np.memmap(path, DTYPES[index["dtype"]], "r")
            if int(tokens.max()) >= index["vocab_size"]:
                raise UserError(f"{path}: token {int(tokens.max())}, but the vocabulary is {index['vocab_size']}")
            if tokens[-1] != index["eos_id"]:
                raise UserError(f"{path}: does not end with EOS ({index['eos_id']})")
    return index
