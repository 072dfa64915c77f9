"""Convert text into memory-mapped token shards and an index; an interrupted run can be resumed.

During a run `preparing.json` holds its arguments, the reader's state and the length of every file; a resumed run
truncates the files to those lengths. `index.json` is written last.
"""

import contextlib
import hashlib
import json
import os
import re
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from sltrain_ds.data import index as index_file
from sltrain_ds.data import tokenizer as tokenizers
from sltrain_ds.data.index import DTYPES, NAME, SPLITS, STATE_NAME, file_sha256, read_index, write_json
from sltrain_ds.data.sources import DOCUMENTS, Hub, Source, file_source
from sltrain_ds.errors import UserError

BATCH_CHARACTERS = 1 << 20  # per tokenizer call
COMMIT_SECONDS = 20.0  # work lost if the run is killed, at most
OURS = re.compile(r"(?:train|validation)-\d{5}\.bin|\.?(?:index|preparing)\.json(?:\.tmp)?")


@dataclass(frozen=True)
class Preparation:
    """Arguments of `sltrain-ds data prepare`."""

    tokenizer: str | Path
    out: str | Path
    inputs: tuple[str | Path, ...] = ()
    hub: str | None = None
    hub_config: str | None = None
    hub_split: str = "train"
    text_column: str = "text"
    documents: str = "chapters"
    val_fraction: float = 0.01
    val_seed: int = 0
    shard_tokens: int = 1 << 28
    max_documents: int | None = None
    dtype: str = "auto"
    overwrite: bool = False
    progress: bool = True

    def check(self) -> None:
        if bool(self.inputs) == bool(self.hub):
            raise UserError("data prepare: give either --input FILE... or --hub NAME")
        if self.hub_config and not self.hub:
            raise UserError("--hub-config: needs --hub")
        if not 0 <= self.val_fraction < 1:
            raise UserError(f"--val-fraction {self.val_fraction}: must be at least 0 and below 1, e.g. 0.05")
        if self.documents not in DOCUMENTS:
            raise UserError(f"--documents {self.documents}: use one of {', '.join(DOCUMENTS)}")
        if self.shard_tokens < 1:
            raise UserError(f"--shard-tokens {self.shard_tokens}: must be at least 1")
        if self.max_documents is not None and self.max_documents < 1:
            raise UserError(f"--max-documents {self.max_documents}: must be at least 1")
        if self.dtype not in ("auto", *DTYPES):
            raise UserError(f"--dtype {self.dtype}: use auto, {' or '.join(DTYPES)}")

    def sources(self) -> list[Source]:
        if self.hub:
            return [Hub(self.hub, self.hub_config, self.hub_split, self.text_column)]
        return [file_source(path, self.text_column, self.documents) for path in self.inputs]


def prepare(job: Preparation) -> dict:
    """Prepare a data directory and return its index; for a directory already finished by the same job, only read it.

    Documents keep the input's order. A keyed hash of its text assigns a document to train or validation, so equal
    documents share a split. The result does not depend on where an earlier run stopped.
    """
    job.check()
    sources = job.sources()
    tokenizer = tokenizers.load(job.tokenizer)
    vocab_size = tokenizers.vocab_size(tokenizer)
    dtype = job.dtype if job.dtype != "auto" else "uint16" if vocab_size <= 1 << 16 else "uint32"
    if vocab_size - 1 > np.iinfo(DTYPES[dtype]).max:
        raise UserError(f"--dtype {dtype}: too narrow for a vocabulary of {vocab_size}; use uint32 or auto")
    header = {
        "format": index_file.FORMAT,
        "dtype": dtype,
        "tokenizer_sha256": tokenizers.sha256(tokenizer),
        "vocab_size": vocab_size,
        "eos_id": int(tokenizer.eos_token_id),
        "source": {
            "inputs": [source.identity() for source in sources],
            "text_column": job.text_column,
            "val_fraction": job.val_fraction,
            "val_seed": job.val_seed,
            "shard_tokens": job.shard_tokens,
            "max_documents": job.max_documents,
        },
    }
    out = Path(job.out)
    state = _open_out(out, header, job.overwrite)
    if state == "finished":
        return read_index(out)
    writer = _Writer(out, header, tokenizer, job, state)
    if not state:
        writer.commit(0, None)
    try:
        _run(writer, sources, state)
    except UserError:
        if not writer.documents:  # a wrong column or file
            writer.close()
            _remove(out)
        raise
    finally:
        writer.close()
    return writer.finish()


def _run(writer: "_Writer", sources: list[Source], state: dict | None) -> None:
    from tqdm import tqdm

    first, reader = (state["source"], state["reader"]) if state else (0, None)
    # disable=None: no bar if stderr is not a terminal
    hidden = None if writer.job.progress else True
    with tqdm(desc="prepare", unit=" documents", initial=writer.documents, disable=hidden) as bar:
        for number in range(first, len(sources)):
            pending, size, committed = [], 0, time.monotonic()
            source, before = sources[number], writer.documents
            resumed, reader = reader, None
            for texts in source.rows(resumed):
                pending += texts
                size += sum(map(len, texts))
                if size < BATCH_CHARACTERS:
                    continue
                bar.update(writer.add(pending))
                bar.set_postfix_str(f"{writer.tokens / 1e6:.1f}M tokens")
                pending, size = [], 0
                if writer.full:
                    return
                if time.monotonic() - committed >= COMMIT_SECONDS:
                    writer.commit(number, source.state())
                    committed = time.monotonic()
            bar.update(writer.add(pending))
            bar.set_postfix_str(f"{writer.tokens / 1e6:.1f}M tokens")
            if writer.full:
                return
            if resumed is None and writer.documents == before:
                raise UserError(f"{source.name}: holds no text")
            writer.commit(number + 1, None)


def _open_out(out: Path, header: dict, overwrite: bool) -> dict | str | None:
    """None for a new run, the saved state of an interrupted run of the same job, or "finished"."""
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out}: is a file; name a directory")
    there = sorted(entry.name for entry in out.iterdir()) if out.is_dir() else []
    strangers = [name for name in there if not OURS.fullmatch(name)]
    if strangers:
        raise UserError(f"--out {out}: holds {strangers[0]}, which is not prepared data; name a new directory")
    if overwrite:
        _clear(out)
    elif NAME in there:
        _same(out, read_index(out), header)
        index_file.check_sizes(out, read_index(out))
        (out / STATE_NAME).unlink(missing_ok=True)
        return "finished"
    elif STATE_NAME in there:
        try:
            state = json.loads((out / STATE_NAME).read_text(encoding="utf-8"))
        except ValueError as error:
            raise UserError(f"{out / STATE_NAME}: damaged; start again with --overwrite") from error
        _same(out, state["header"], header)
        return state
    elif there:
        raise UserError(f"--out {out}: holds {there[0]} but neither {NAME} nor {STATE_NAME}; use --overwrite")
    out.mkdir(parents=True, exist_ok=True)
    return None


def _same(out: Path, found: dict, wanted: dict) -> None:
    found = {**found, **found.get("source", {})}
    wanted = {**wanted, **wanted["source"]}
    for key in wanted:
        if key not in ("source", "splits") and found.get(key) != wanted[key]:
            raise UserError(
                f"--out {out}: was prepared with another {key} ({_short(found.get(key))}, now {_short(wanted[key])}); "
                "name a new directory or use --overwrite"
            )


def _short(value) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _clear(out: Path) -> None:
    """Remove what a preparation wrote, the index first, so that a partly removed directory never looks finished."""
    if not out.is_dir():
        return
    for name in sorted(entry.name for entry in out.iterdir()):
        if OURS.fullmatch(name) and name.endswith(("json", "tmp")):
            (out / name).unlink()
    for entry in out.iterdir():
        if OURS.fullmatch(entry.name):
            entry.unlink()


def _remove(out: Path) -> None:
    """Remove everything, so that the corrected command can run; also a directory that was there empty."""
    _clear(out)
    with contextlib.suppress(OSError):  # not empty, or a mount
        out.rmdir()


@dataclass
class _Split:
    shards: list[dict] = field(default_factory=list)
    documents: int = 0
    open_tokens: int = 0  # in the shard being written

    @property
    def tokens(self) -> int:
        return sum(shard["tokens"] for shard in self.shards) + self.open_tokens


class _Writer:
    """Appends documents to the shards of both splits; `commit` makes everything so far durable."""

    def __init__(self, out: Path, header: dict, tokenizer, job: Preparation, state: dict | None):
        self.out, self.header, self.tokenizer, self.job = out, header, tokenizer, job
        self.dtype = DTYPES[header["dtype"]]
        self.splits = {name: _Split(**(state["splits"][name] if state else {})) for name in SPLITS}
        self.files = {}
        if state:
            self._cut_back()

    @property
    def documents(self) -> int:
        return sum(split.documents for split in self.splits.values())

    @property
    def tokens(self) -> int:
        return sum(split.tokens for split in self.splits.values())

    @property
    def full(self) -> bool:
        return self.job.max_documents is not None and self.documents >= self.job.max_documents

    def _path(self, name: str) -> Path:
        return self.out / f"{name}-{len(self.splits[name].shards):05d}.bin"

    def _cut_back(self) -> None:
        kept = set()
        for name, split in self.splits.items():
            wanted = {shard["file"]: shard["tokens"] for shard in split.shards}
            if split.open_tokens:
                wanted[self._path(name).name] = split.open_tokens
            for file, tokens in wanted.items():
                path, size = self.out / file, tokens * self.dtype.itemsize
                if not path.is_file() or path.stat().st_size < size:
                    raise UserError(f"{path}: shorter than {STATE_NAME} says; start again with --overwrite")
                os.truncate(path, size)
            kept |= wanted.keys()
        for path in self.out.glob("*.bin"):
            if path.name not in kept:
                path.unlink()

    def add(self, texts: list[str]) -> int:
        """Tokenize and append documents, up to max_documents; returns how many were added."""
        if self.job.max_documents is not None:
            texts = texts[: self.job.max_documents - self.documents]
        for batch in _batches(texts):
            for text, ids in zip(batch, tokenizers.encode(self.tokenizer, batch), strict=True):
                self._append("validation" if self._held_out(text) else "train", ids)
        return len(texts)

    def _held_out(self, text: str) -> bool:
        key = b"sltrain validation %d" % self.job.val_seed
        digest = hashlib.blake2b(text.encode(), digest_size=8, key=key).digest()
        return int.from_bytes(digest, "little") < self.job.val_fraction * 2**64

    def _append(self, name: str, ids: list[int]) -> None:
        split = self.splits[name]
        if name not in self.files:
            self.files[name] = self._path(name).open("ab")
        self.files[name].write(np.array([*ids, self.header["eos_id"]], self.dtype).tobytes())
        split.documents += 1
        split.open_tokens += len(ids) + 1
        if split.open_tokens >= self.job.shard_tokens:
            self._roll(name)

    def _roll(self, name: str) -> None:
        """Close the shard being written; a document never spans two shards."""
        split = self.splits[name]
        if name in self.files:
            _sync(self.files.pop(name))
        path = self._path(name)
        split.shards.append({"file": path.name, "tokens": split.open_tokens, "sha256": file_sha256(path)})
        split.open_tokens = 0

    def commit(self, source: int, reader: dict | None) -> None:
        for name in list(self.files):
            _sync(self.files.pop(name))
        splits = {name: vars(split) for name, split in self.splits.items()}
        state = {"header": self.header, "source": source, "reader": reader, "splits": splits}
        write_json(self.out / STATE_NAME, state)

    def close(self) -> None:
        for name in list(self.files):
            self.files.pop(name).close()

    def finish(self) -> dict:
        train, validation = (self.splits[name] for name in SPLITS)
        if not train.documents or (self.job.val_fraction and not validation.documents):
            _remove(self.out)
            empty = "validation" if train.documents else "train"
            raise UserError(
                f"--val-fraction {self.job.val_fraction}: none of {self.documents} documents fell into {empty}; "
                "use a larger fraction or smaller --documents"
            )
        for name, split in self.splits.items():
            if split.open_tokens:
                self._roll(name)
        splits = {
            name: {"shards": split.shards, "tokens": split.tokens, "documents": split.documents}
            for name, split in self.splits.items()
        }
        index = {**self.header, "splits": splits}
        write_json(self.out / NAME, index)
        (self.out / STATE_NAME).unlink(missing_ok=True)
        return index


def _sync(file) -> None:
    file.flush()
    os.fsync(file.fileno())
    file.close()


def _batches(texts: list[str]):
    batch, size = [], 0
    for text in texts:
        batch.append(text)
        size += len(text)
        if size >= BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
