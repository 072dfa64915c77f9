"""Documents from text, JSONL and parquet files and from hub data sets, streamed by `datasets`.

A source yields rows; each row is a list of documents. Its state is a small JSON object, so that an interrupted
preparation continues after the last row it kept.
"""

import hashlib
import json
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path

from sltrain_ds.errors import UserError

KINDS = {".txt": "text", ".text": "text", ".jsonl": "jsonl", ".ndjson": "jsonl", ".parquet": "parquet"}
COMPRESSIONS = (".xz", ".gz", ".bz2", ".zst")
# how a text file is split: `sample_by` of `datasets` (what one row is), and the document separator within a row
DOCUMENTS = {
    "chapters": ("document", re.compile(r"\n(?:[ \t]*\n){3,}")),  # three or more blank lines, as between chapters
    "paragraphs": ("paragraph", None),
    "lines": ("line", None),
    "file": ("document", None),
}
FINGERPRINT_BYTES = 1 << 20


def reason(error: BaseException) -> str:
    """First line of an exception's message, for a one-line error."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


class Source(ABC):
    """Rows of one `datasets` stream; subclasses define how to open it and how to read a row."""

    name: str

    @abstractmethod
    def identity(self) -> dict:
        """JSON identity of the input, compared when a preparation is resumed."""

    @abstractmethod
    def open(self):
        """The `datasets.IterableDataset` behind this source."""

    @abstractmethod
    def documents(self, row: dict, number: int) -> list[str]:
        """The documents of row `number` (counted from 1)."""

    def explain(self, error: Exception, number: int) -> str:
        """Error message for an exception raised while reading row `number`."""
        return f"{self.name}: cannot be read: {reason(error)}"

    def rows(self, state: dict | None = None) -> Iterator[list[str]]:
        """Documents row by row; with a `state` from `state()`, continues after the last row yielded."""
        self._rows = state["rows"] if state else 0
        try:
            self._dataset = self.open()
            if state:
                self._dataset.load_state_dict(state["dataset"])
            for row in self._dataset:
                self._rows += 1
                yield [text for text in self.documents(row, self._rows) if not text.isspace() and text]
        except (UserError, KeyboardInterrupt, GeneratorExit):
            raise
        except Exception as error:  # any error of a reader, a codec or the network concerns this input
            raise UserError(self.explain(error, self._rows + 1)) from error

    def state(self) -> dict:
        return {"rows": self._rows, "dataset": self._dataset.state_dict()}


def _load(*arguments, **options):
    import datasets

    # its own log lines would obscure our one-line error
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    datasets.disable_progress_bars()
    return datasets.load_dataset(*arguments, streaming=True, **options)


def _column(name: str, row: dict, column: str, number: int) -> str:
    if column not in row:
        there = ", ".join(map(str, row)) or "none"
        raise UserError(f"{name}: no column {column!r} in row {number}; columns there: {there} (--text-column)")
    text = row[column]
    if not isinstance(text, str):
        raise UserError(f"{name}: row {number}: {column!r} holds {type(text).__name__}, not text")
    return text


class _File(Source):
    def __init__(self, path: Path):
        self.path, self.name = path, str(path)

    def identity(self) -> dict:
        # size and both ends only: hashing a terabyte would read it twice
        size = self.path.stat().st_size
        digest = hashlib.sha256()
        with self.path.open("rb") as file:
            digest.update(file.read(FINGERPRINT_BYTES))
            file.seek(max(0, size - FINGERPRINT_BYTES))
            digest.update(file.read())
        return {"file": self.path.name, "bytes": size, "sha256_of_ends": digest.hexdigest()}

    def _load(self, builder: str, **options):
        return _load(builder, data_files=[str(self.path.resolve())], split="train", **options)

    def explain(self, error: Exception, number: int) -> str:
        if isinstance(error, UnicodeDecodeError):
            return f"{self.name}: not UTF-8 text ({reason(error)}); convert it first (iconv -t utf-8)"
        return f"{self.name}: damaged or not what its name says: {reason(error)}"


class TextFile(_File):
    """A text file, split into documents by one of `DOCUMENTS`."""

    def __init__(self, path: Path, documents: str):
        super().__init__(path)
        self.cut = documents
        self.sample_by, self.separator = DOCUMENTS[documents]

    def identity(self) -> dict:
        return super().identity() | {"documents": self.cut}

    def open(self):
        return self._load("text", sample_by=self.sample_by)

    def documents(self, row: dict, number: int) -> list[str]:
        text = row["text"]
        parts = self.separator.split(text) if self.separator else [text]
        return parts if self.cut == "file" else [part.strip("\n") for part in parts]


class JsonLinesFile(_File):
    """JSONL, one document per line. Read as text, so that errors name the line and no column type is inferred."""

    def __init__(self, path: Path, column: str):
        super().__init__(path)
        self.column = column

    def open(self):
        return self._load("text", sample_by="line")

    def documents(self, row: dict, number: int) -> list[str]:
        if not row["text"].strip():
            return []
        try:
            record = json.loads(row["text"])
        except ValueError as error:
            raise UserError(f"{self.name}: line {number} is not JSON: {reason(error)}") from error
        if not isinstance(record, dict):
            raise UserError(f"{self.name}: line {number} is not an object; JSONL needs one object per line")
        text = _column(self.name, record, self.column, number)
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise UserError(f"{self.name}: line {number} has an unpaired surrogate, which is not valid text") from error
        return [text]


class ParquetFile(_File):
    """A parquet file, one document per row; only its text column is read."""

    def __init__(self, path: Path, column: str):
        super().__init__(path)
        self.column = column

    def open(self):
        import pyarrow.parquet

        columns = pyarrow.parquet.read_schema(self.path).names
        if self.column not in columns:
            _column(self.name, dict.fromkeys(columns), self.column, 1)
        return self._load("parquet", columns=[self.column])

    def documents(self, row: dict, number: int) -> list[str]:
        return [_column(self.name, row, self.column, number)]


class Hub(Source):
    """A hub data set (or a directory of that layout), streamed without downloading it first."""

    def __init__(self, name: str, config: str | None, split: str, column: str):
        self.name = f"--hub {name}"
        self.repository, self.config, self.split, self.column = name, config, split, column

    def identity(self) -> dict:
        return {"hub": self.repository, "config": self.config, "split": self.split}

    def open(self):
        return _load(self.repository, self.config, split=self.split)

    def documents(self, row: dict, number: int) -> list[str]:
        return [_column(self.name, row, self.column, number)]

    def explain(self, error: Exception, number: int) -> str:
        line = " ".join(str(error).split())  # it lists configs and splits on further lines
        return f"{self.name} (config {self.config}, split {self.split}): cannot be read: {line or type(error).__name__}"


def file_source(path: str | Path, column: str = "text", documents: str = "chapters") -> Source:
    """Source for one file, chosen by suffix (.txt, .jsonl, .parquet; text and JSONL also .xz, .gz, .bz2, .zst)."""
    path = Path(path)
    if path.is_dir():
        raise UserError(f"{path}: is a directory; name the files in it, such as {path}/*.txt")
    if not path.is_file():
        raise UserError(f"{path}: no such file; name text (.txt), .jsonl or .parquet files that exist")
    if path.stat().st_size == 0:
        raise UserError(f"{path}: the file is empty")
    if set("[]*?") & set(str(path.resolve())) or "::" in str(path.resolve()):
        raise UserError(f"{path}: `datasets` would read its path as a pattern; rename it, without [ ] * ? and ::")
    suffixes = [suffix.lower() for suffix in path.suffixes]
    compressed = bool(suffixes) and suffixes[-1] in COMPRESSIONS
    kind = KINDS.get((suffixes[-2:-1] if compressed else suffixes[-1:] or [""])[0] if suffixes else "")
    if kind == "text":
        return TextFile(path, documents)
    if kind == "jsonl":
        return JsonLinesFile(path, column)
    if kind == "parquet" and not compressed:
        return ParquetFile(path, column)
    raise UserError(f"{path}: unknown kind of file; use .txt, .jsonl (both also .xz, .gz, .bz2, .zst) or .parquet")
