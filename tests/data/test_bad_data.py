"""What users get wrong with data: one clear line each, exit code 2, no traceback, nothing that looks finished."""

import gzip
import json
import lzma
import os
import shutil

import pyarrow
import pyarrow.parquet
import pytest

from sltrain_ds.cli import main
from sltrain_ds.data.dataset import TokenData
from sltrain_ds.data.index import verify
from sltrain_ds.errors import UserError

GOOD = "".join(json.dumps({"text": f"the cat sees {i} dogs"}) + "\n" for i in range(40))


def parquet(path, **columns):
    pyarrow.parquet.write_table(pyarrow.table(columns), path)


def cut(path):
    path.write_bytes(path.read_bytes()[:-30])


def make_inputs(folder):
    (folder / "good.jsonl").write_text(GOOD)
    (folder / "empty.txt").touch()
    (folder / "blank.txt").write_text("\n \n\t\n\n\n\n\n \n")
    (folder / "blank.jsonl").write_text("\n\n")
    (folder / "latin.txt").write_bytes("the café\n".encode("latin-1") * 9)
    (folder / "late.txt").write_bytes(b"the cat\n" * 300_000 + "café".encode("latin-1"))
    (folder / "novel.epub").write_text("the cat")
    (folder / "none").write_text("the cat")
    (folder / "broken.jsonl").write_text(GOOD + '{"text": "the\n' + GOOD)
    (folder / "list.jsonl").write_text(GOOD + '["the cat"]\n')
    (folder / "array.json.jsonl").write_text(json.dumps([{"text": "the cat"}], indent=1))
    (folder / "number.jsonl").write_text(GOOD + '{"text": 5}\n')
    (folder / "null.jsonl").write_text(GOOD + '{"text": null}\n')
    (folder / "late_column.jsonl").write_text(GOOD + '{"body": "the cat"}\n')
    (folder / "surrogate.jsonl").write_text(GOOD + '{"text": "\\ud800"}\n')
    for opener, suffix in ((gzip.open, "gz"), (lzma.open, "xz")):
        path = folder / f"cut.jsonl.{suffix}"
        with opener(path, "wt") as file:
            file.write(GOOD * 50)
        cut(path)
        (folder / f"plain.txt.{suffix}").write_text("the cat")
    parquet(folder / "good.parquet", title=["a"], body=["the cat"])
    parquet(folder / "numbers.parquet", text=[1, 2])
    parquet(folder / "cut.parquet", text=["the cat"] * 50)
    cut(folder / "cut.parquet")
    (folder / "not.parquet").write_text("the cat")
    (folder / "a[1].txt").write_text("the cat")
    hub = folder / "hub"
    hub.mkdir()
    (hub / "a.jsonl").write_text(GOOD)
    (hub / "README.md").write_text(
        "---\nconfigs:\n"
        + "".join(
            f"- config_name: {name}\n  data_files:\n  - split: train\n    path: a.jsonl\n" for name in ("en", "de")
        )
        + "---\n"
    )


# what is given, a piece of the line
BAD = [
    (["--input", "nowhere.txt"], "nowhere.txt: no such file"),
    (["--input", "hub"], "hub: is a directory; name the files in it"),
    (["--input", "empty.txt"], "empty.txt: the file is empty"),
    (["--input", "good.jsonl", "empty.txt"], "empty.txt: the file is empty"),
    (["--input", "blank.txt"], "blank.txt: holds no text"),
    (["--input", "blank.jsonl"], "blank.jsonl: holds no text"),
    (["--input", "good.jsonl", "blank.txt"], "blank.txt: holds no text"),
    (["--input", "latin.txt"], "latin.txt: not UTF-8"),
    (["--input", "late.txt", "--documents", "lines"], "late.txt: not UTF-8"),
    (["--input", "novel.epub"], "novel.epub: unknown kind of file"),
    (["--input", "none"], "none: unknown kind of file"),
    (["--input", "a[1].txt"], "rename it"),
    (["--input", "broken.jsonl"], "broken.jsonl: line 41 is not JSON"),
    (["--input", "list.jsonl"], "list.jsonl: line 41 is not an object"),
    (["--input", "array.json.jsonl"], "line 1 is not JSON"),
    (["--input", "number.jsonl"], "row 41: 'text' holds int, not text"),
    (["--input", "null.jsonl"], "row 41: 'text' holds NoneType, not text"),
    (["--input", "late_column.jsonl"], "no column 'text' in row 41; columns there: body"),
    (["--input", "surrogate.jsonl"], "surrogate.jsonl: line 41 has an unpaired surrogate"),
    (["--input", "cut.jsonl.gz"], "cut.jsonl.gz: damaged"),
    (["--input", "cut.jsonl.xz"], "cut.jsonl.xz: damaged"),
    (["--input", "plain.txt.gz"], "plain.txt.gz: damaged"),
    (["--input", "plain.txt.xz"], "plain.txt.xz: damaged"),
    (["--input", "good.parquet"], "no column 'text' in row 1; columns there: title, body"),
    (["--input", "numbers.parquet"], "'text' holds int"),
    (["--input", "cut.parquet"], "cut.parquet: damaged"),
    (["--input", "not.parquet"], "not.parquet: damaged"),
    (["--input", "good.jsonl", "--text-column", "body"], "no column 'body' in row 1; columns there: text"),
    (["--input", "good.jsonl", "--val-fraction", "1"], "--val-fraction 1.0: must be"),
    (["--input", "good.jsonl", "--val-fraction", "-0.1"], "--val-fraction -0.1: must be"),
    (["--input", "good.jsonl", "--val-fraction", "nan"], "--val-fraction nan: must be"),
    (["--input", "good.jsonl", "--val-fraction", "0.00001"], "none of 40 documents fell into validation"),
    (["--input", "good.jsonl", "--documents", "words"], "--documents words: use one of chapters, paragraphs"),
    (["--input", "good.jsonl", "--shard-tokens", "0"], "--shard-tokens 0: must be"),
    (["--input", "good.jsonl", "--max-documents", "0"], "--max-documents 0: must be"),
    (["--input", "good.jsonl", "--workers", "0"], "--workers 0: must be"),
    (["--input", "good.jsonl", "--dtype", "int8"], "--dtype int8: use auto, uint16 or uint32"),
    (["--input", "good.jsonl", "--tokenizer", "nowhere"], "tokenizer nowhere: no such directory"),
    (["--input", "good.jsonl", "--tokenizer", "hub"], "tokenizer hub: holds no tokenizer.json"),
    (["--input", "good.jsonl", "--out", "hub"], "--out hub: holds README.md, which is not prepared data"),
    (["--input", "good.jsonl", "--out", "good.jsonl"], "--out good.jsonl: is a file"),
    (["--input", "good.jsonl", "--hub", "hub"], "give either --input FILE... or --hub NAME"),
    ([], "give either --input FILE... or --hub NAME"),
    (["--input", "good.jsonl", "--hub-config", "en"], "--hub-config: needs --hub"),
    (["--hub", "hub"], "available configs: ['en', 'de']"),
    (["--hub", "hub", "--hub-config", "fr"], "'fr' not found. Available: ['en', 'de']"),
    (["--hub", "hub", "--hub-config", "en", "--hub-split", "test"], "Available splits: ['train']"),
    (["--hub", "hub", "--hub-config", "en", "--text-column", "body"], "no column 'body' in row 1; columns there: text"),
    (["--hub", "./nowhere"], "--hub ./nowhere"),
]


def one_line(capfd) -> str:
    captured = capfd.readouterr()
    assert "Traceback" not in captured.err + captured.out
    lines = [line for line in captured.err.splitlines() if line.strip()]
    assert len(lines) == 1 and lines[0].startswith("sltrain-ds: error: "), captured
    return lines[0]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    make_inputs(folder)
    return folder


@pytest.mark.parametrize(("arguments", "message"), BAD, ids=[" ".join(arguments) or "nothing" for arguments, _ in BAD])
def test_prepare_refuses_in_one_line(inputs, tokenizer_dir, tmp_path, monkeypatch, capfd, arguments, message):
    monkeypatch.chdir(inputs)
    before = sorted(path for path in inputs.rglob("*"))
    out = tmp_path / "out"
    assert main(["data", "prepare", "--tokenizer", str(tokenizer_dir), "--out", str(out), *arguments]) == 2
    assert message in one_line(capfd)
    assert sorted(path for path in inputs.rglob("*")) == before
    # gone, or to be gone on with
    assert not out.exists() or ("preparing.json" in os.listdir(out) and "index.json" not in os.listdir(out))


TOKENIZER_BAD = [
    (["--input", "nowhere.txt"], "nowhere.txt: no such file"),
    (["--input", "latin.txt"], "latin.txt: not UTF-8"),
    (["--input", "broken.jsonl"], "line 41"),
    (["--input", "good.jsonl", "--text-column", "body"], "columns there: text"),
    (["--input", "blank.txt"], "no text"),
    (["--input", "good.jsonl", "--vocab-size", "10"], "--vocab-size 10: does not fit"),
    (["--input", "good.jsonl", "--vocab-size", "-4"], "--vocab-size -4"),
    (["--input", "good.jsonl", "--vocab-size", "99999"], "--vocab-size 99999: does not fit"),
    (["--input", "good.jsonl", "--out", "hub"], "--out hub: holds"),
    (["--input", "good.jsonl", "--out", "empty.txt"], "--out empty.txt: is a file"),
]


@pytest.mark.parametrize(("arguments", "message"), TOKENIZER_BAD, ids=[" ".join(a) for a, _ in TOKENIZER_BAD])
def test_tokenizer_train_refuses_in_one_line(inputs, tmp_path, monkeypatch, capfd, arguments, message):
    monkeypatch.chdir(inputs)
    assert main(["tokenizer", "train", "--vocab-size", "280", "--out", str(tmp_path / "out"), *arguments]) == 2
    assert message in one_line(capfd)
    assert not list(tmp_path.iterdir())


@pytest.fixture
def prepared(make_data):
    return make_data("data", {"train": [[5, 6, 7, 8, 2], [9, 2]], "validation": [[7, 7, 7, 7, 2]]})


def edit(folder, change):
    index = json.loads((folder / "index.json").read_text())
    change(index)
    (folder / "index.json").write_text(json.dumps(index))


def flip(folder):
    data = bytearray((folder / "train-00000.bin").read_bytes())
    data[0] ^= 1
    (folder / "train-00000.bin").write_bytes(data)


OPEN_BAD = {
    "no directory": (shutil.rmtree, "no such directory"),
    "no index": (lambda d: (d / "index.json").unlink(), "holds no index.json"),
    "not finished": (lambda d: (d / "index.json").rename(d / "preparing.json"), "not finished"),
    "cut index": (lambda d: cut(d / "index.json"), "index.json: damaged"),
    "no index of ours": (lambda d: (d / "index.json").write_text("[1]"), "not the index of prepared data"),
    "format": (lambda d: edit(d, lambda i: i.update(format=9)), "format 9"),
    "dtype": (lambda d: edit(d, lambda i: i.update(dtype="int3")), "dtype 'int3'"),
    "key": (lambda d: edit(d, lambda i: i.pop("eos_id")), "damaged: KeyError('eos_id')"),
    "vocabulary": (lambda d: edit(d, lambda i: i.update(vocab_size=70_000)), "do not fit"),
    "sum": (lambda d: edit(d, lambda i: i["splits"]["train"].update(tokens=8)), "do not add up"),
    "outside": (
        lambda d: edit(d, lambda i: i["splits"]["train"]["shards"][0].update(file="../x.bin")),
        "shard '../x.bin'",
    ),
    "no train": (lambda d: edit(d, lambda i: i["splits"].pop("train")), "no train split"),
    "cut shard": (lambda d: (d / "train-00001.bin").write_bytes(b"12"), "prepare the data again with --overwrite"),
    "no shard": (lambda d: (d / "train-00000.bin").unlink(), "train-00000.bin: missing"),
}


@pytest.mark.parametrize("name", OPEN_BAD)
def test_damaged_directory_names_the_file(prepared, capfd, name):
    TokenData(prepared, "train", 2)
    damage, message = OPEN_BAD[name]
    damage(prepared)
    with pytest.raises(UserError) as error:
        TokenData(prepared, "train", 2)
    assert message in str(error.value)
    assert main(["data", "verify", str(prepared)]) == 2
    assert message in one_line(capfd)


def test_open_refuses_split_and_length(prepared):
    with pytest.raises(UserError, match="no split 'test'; there are train, validation"):
        TokenData(prepared, "test", 2)
    with pytest.raises(UserError, match="sequence_length 1"):
        TokenData(prepared, "train", 1)


def test_verify_finds_what_opening_does_not(prepared, make_data):
    verify(prepared)
    flip(prepared)
    TokenData(prepared, "train", 2)
    with pytest.raises(UserError, match=r"train-00000\.bin: its sha256"):
        verify(prepared)
    with pytest.raises(UserError, match="token 1000, but the vocabulary is 1000"):
        verify(make_data("high", {"train": [[1000, 2]]}))
    with pytest.raises(UserError, match="does not end with EOS"):
        verify(make_data("open", {"train": [[5, 6]]}))
