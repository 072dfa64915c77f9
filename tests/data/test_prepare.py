import gzip
import json
import lzma
import shutil

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from sltrain_ds.data import prepare as module
from sltrain_ds.data import tokenizer as tokenizers
from sltrain_ds.data.dataset import TokenData
from sltrain_ds.data.index import verify
from sltrain_ds.data.prepare import Preparation, prepare
from sltrain_ds.errors import UserError


def write_jsonl(path, documents, opener=open):
    with opener(path, "wt", encoding="utf-8") as file:
        for number, text in enumerate(documents):
            file.write(json.dumps({"id": number, "text": text}, ensure_ascii=bool(number % 2)) + "\n")
    return path


def write_parquet(path, documents):
    table = pyarrow.table({"id": list(range(len(documents))), "text": documents})
    pyarrow.parquet.write_table(table, path, row_group_size=17)
    return path


@pytest.fixture
def job(tokenizer_dir, tmp_path):
    def make(out="out", **options):
        options.setdefault("val_fraction", 0.2)
        return Preparation(tokenizer=tokenizer_dir, out=tmp_path / out, progress=False, **options)

    return make


def read(folder):
    """{file: bytes} of a prepared directory."""
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def documents_of(folder, split, tokenizer):
    tokens = TokenData(folder, split, 2).tokens(0, 10**9)
    parts = np.split(tokens, np.flatnonzero(tokens == 2) + 1)
    assert len(parts[-1]) == 0  # EOS after the last too
    return [tokenizer.decode(part[:-1].tolist()) for part in parts[:-1]]


def test_documents_come_back_in_order_each_in_one_split(job, tmp_path, documents, tokenizer_dir):
    index = prepare(job(inputs=(write_jsonl(tmp_path / "a.jsonl", documents),)))
    tokenizer = tokenizers.load(tokenizer_dir)
    train, validation = (documents_of(tmp_path / "out", split, tokenizer) for split in ("train", "validation"))
    held = set(validation)
    assert [text for text in documents if text in held] == validation
    assert [text for text in documents if text not in held] == train
    assert index["splits"]["validation"]["documents"] == len(validation)
    assert 20 < len(validation) < 60  # 40 of 200 expected
    assert index["tokenizer_sha256"] == tokenizers.tokenizer_sha256(tokenizer_dir)
    assert (index["dtype"], index["vocab_size"], index["eos_id"]) == ("uint16", 320, 2)
    assert json.loads((tmp_path / "out" / "index.json").read_text()) == index == verify(tmp_path / "out")


def test_every_format_gives_the_same_tokens(job, tmp_path, documents):
    hub = tmp_path / "hub"
    hub.mkdir()
    (hub / "README.md").write_text(
        "---\nconfigs:\n- config_name: en\n  data_files:\n  - split: train\n    path: part-*.jsonl\n---\n"
    )
    for number in range(4):
        write_jsonl(hub / f"part-{number}.jsonl", documents[number * 50 :][:50])
    text = tmp_path / "a.txt"
    text.write_text("\n\n\n\n".join(documents) + "\n")
    paragraphs = tmp_path / "p.txt"
    paragraphs.write_text("\n\n".join(documents) + "\n")
    lines = tmp_path / "l.txt"
    lines.write_text("\r\n".join(documents))
    halves = (write_jsonl(tmp_path / "1.jsonl", documents[:77]), write_parquet(tmp_path / "2.parquet", documents[77:]))
    kinds = {
        "jsonl": {"inputs": (write_jsonl(tmp_path / "a.jsonl", documents),)},
        "gz": {"inputs": (write_jsonl(tmp_path / "a.jsonl.gz", documents, gzip.open),)},
        "xz": {"inputs": (write_jsonl(tmp_path / "a (1) é.jsonl.xz", documents, lzma.open),)},
        "parquet": {"inputs": (write_parquet(tmp_path / "a.parquet", documents),)},
        "chapters": {"inputs": (text,)},
        "paragraphs": {"inputs": (paragraphs,), "documents": "paragraphs"},
        "lines": {"inputs": (lines,), "documents": "lines"},
        "two": {"inputs": halves},
        "hub": {"hub": str(hub), "hub_config": "en"},
    }
    results = {}
    for name, options in kinds.items():
        prepare(job(f"out-{name}", **options))
        files = read(tmp_path / f"out-{name}")
        index = json.loads(files.pop("index.json"))
        index.pop("source")
        results[name] = files, index
    for name in kinds:
        assert results[name] == results["jsonl"], name


def test_text_cut_by_each_rule(job, tmp_path, tokenizer_dir):
    text = tmp_path / "book.txt"
    text.write_text("CHAPTER 1\n\n\nthe cat\nruns\n\nshe sees it\n\n \n\n\nCHAPTER 2\n\n\nthe dog\n\n\n\n\n")
    cuts = {
        "chapters": ["CHAPTER 1\n\n\nthe cat\nruns\n\nshe sees it", "CHAPTER 2\n\n\nthe dog"],
        "paragraphs": ["CHAPTER 1", "the cat\nruns", "she sees it", "CHAPTER 2", "the dog"],
        "lines": ["CHAPTER 1", "the cat", "runs", "she sees it", "CHAPTER 2", "the dog"],
        "file": [text.read_text()],
    }
    tokenizer = tokenizers.load(tokenizer_dir)
    for rule, wanted in cuts.items():
        prepare(job(rule, inputs=(text,), documents=rule, val_fraction=0))
        assert documents_of(tmp_path / rule, "train", tokenizer) == wanted, rule


def test_equal_documents_share_a_split_and_the_seed_chooses(job, tmp_path, documents):
    once = write_jsonl(tmp_path / "once.jsonl", documents)
    thrice = write_jsonl(tmp_path / "thrice.jsonl", documents * 3)
    one, three = prepare(job("one", inputs=(once,))), prepare(job("three", inputs=(thrice,)))
    for split in ("train", "validation"):
        assert three["splits"][split]["documents"] == 3 * one["splits"][split]["documents"]
    prepare(job("seed", inputs=(once,), val_seed=1))
    assert read(tmp_path / "seed")["validation-00000.bin"] != read(tmp_path / "one")["validation-00000.bin"]


def test_shards_hold_whole_documents_and_read_as_one(job, tmp_path, documents):
    source = write_jsonl(tmp_path / "a.jsonl", documents)
    prepare(job("one", inputs=(source,)))
    index = prepare(job("many", inputs=(source,), shard_tokens=300))
    shards = index["splits"]["train"]["shards"]
    assert len(shards) > 5 and all(shard["tokens"] >= 300 for shard in shards[:-1])
    one, many = (TokenData(tmp_path / name, "train", 16) for name in ("one", "many"))
    assert (one.tokens(0, 10**9) == many.tokens(0, 10**9)).all()
    verify(tmp_path / "many")  # each shard ends with EOS


def test_max_documents(job, tmp_path, documents):
    halves = tuple(write_jsonl(tmp_path / f"{i}.jsonl", documents[i * 100 :][:100]) for i in range(2))
    index = prepare(job("some", inputs=halves, max_documents=130))
    assert sum(split["documents"] for split in index["splits"].values()) == 130
    prepare(job("same", inputs=(write_jsonl(tmp_path / "cut.jsonl", documents[:130]),)))
    assert read(tmp_path / "some")["train-00000.bin"] == read(tmp_path / "same")["train-00000.bin"]


def test_wide_tokens_on_request(job, tmp_path, documents):
    source = write_jsonl(tmp_path / "a.jsonl", documents)
    prepare(job("narrow", inputs=(source,)))
    prepare(job("wide", inputs=(source,), dtype="uint32"))
    narrow, wide = (TokenData(tmp_path / name, "train", 8).tokens(0, 10**9) for name in ("narrow", "wide"))
    assert (narrow == wide).all()
    assert (tmp_path / "wide" / "train-00000.bin").stat().st_size == 4 * len(wide)


class Stopped(BaseException):
    """As a kill: nothing in the code under test may catch it."""


KINDS = ["jsonl", "parquet", "text", "hub"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("committed", ["each batch", "each source"])
def test_stopped_anywhere_it_goes_on_to_the_same_bytes(job, tmp_path, documents, monkeypatch, kind, committed):
    monkeypatch.setattr(module, "BATCH_CHARACTERS", 1500)
    monkeypatch.setattr(module, "COMMIT_SECONDS", 0.0 if committed == "each batch" else 1e9)
    if kind == "hub":
        (tmp_path / "hub").mkdir()
        for part in range(3):
            write_jsonl(tmp_path / "hub" / f"{part}.jsonl", documents[part::3])
        options = {"hub": str(tmp_path / "hub")}
    elif kind == "text":
        for part in range(2):
            (tmp_path / f"{part}.txt").write_text("\n".join(documents[part::2]))
        options = {"inputs": (tmp_path / "0.txt", tmp_path / "1.txt"), "documents": "lines"}
    else:
        write = write_jsonl if kind == "jsonl" else write_parquet
        options = {"inputs": tuple(write(tmp_path / f"{part}.{kind}", documents[part::2]) for part in range(2))}
    options["shard_tokens"] = 700
    prepare(job("whole", **options))
    whole = read(tmp_path / "whole")
    assert len(whole) > 5

    append, attempts, calls = module._Writer._append, 0, 0

    def stopping(self, name, ids):
        nonlocal calls
        if calls == 3 + 29 * attempts:  # further each time, in the middle of batches and shards
            # what is in the buffers of a killed process may or may not have reached the disk
            for file in self.files.values() if attempts % 2 else ():
                file.flush()
            raise Stopped
        calls += 1
        append(self, name, ids)

    monkeypatch.setattr(module._Writer, "_append", stopping)
    while True:
        calls = 0
        try:
            prepare(job("out", **options))
            break
        except Stopped:
            attempts += 1
            assert attempts < 100
            assert not (tmp_path / "out" / "index.json").exists()
            with pytest.raises(UserError, match="not finished"):
                TokenData(tmp_path / "out", "train", 8)
    assert attempts > 2
    assert read(tmp_path / "out") == whole


def test_killed_while_writing_the_index(job, tmp_path, documents, monkeypatch):
    options = {"inputs": (write_jsonl(tmp_path / "a.jsonl", documents),)}
    prepare(job("whole", **options))
    write = module.write_json

    def stopping(path, value):
        if path.name == "index.json":
            path.with_name(".index.json.tmp").write_text("{")
            raise Stopped
        write(path, value)

    monkeypatch.setattr(module, "write_json", stopping)
    with pytest.raises(Stopped):
        prepare(job(**options))
    monkeypatch.undo()
    prepare(job(**options))
    assert read(tmp_path / "out") == read(tmp_path / "whole")


def test_finished_is_recognised_without_tokenizing_and_another_job_is_refused(job, tmp_path, documents, monkeypatch):
    source = write_jsonl(tmp_path / "a.jsonl", documents)
    index = prepare(job(inputs=(source,)))
    before = read(tmp_path / "out")
    monkeypatch.setattr(module._Writer, "add", None)  # nothing may be tokenized
    moved = tmp_path / "elsewhere" / "a.jsonl"
    moved.parent.mkdir()
    shutil.copy(source, moved)
    assert prepare(job(inputs=(moved,))) == index
    monkeypatch.undo()
    for change, key in [
        ({"val_fraction": 0.3}, "val_fraction"),
        ({"max_documents": 5}, "max_documents"),
        ({"shard_tokens": 99}, "shard_tokens"),
        ({"inputs": (write_jsonl(tmp_path / "b.jsonl", documents),)}, "inputs"),
    ]:
        with pytest.raises(UserError, match=f"another {key} .*--overwrite"):
            prepare(job(**({"inputs": (source,)} | change)))
    assert read(tmp_path / "out") == before
    again = prepare(job(inputs=(source,), val_fraction=0.3, overwrite=True))
    assert again["source"]["val_fraction"] == 0.3
    verify(tmp_path / "out")


def test_changed_job_does_not_continue_a_stopped_one(job, tmp_path, documents, monkeypatch):
    source = write_jsonl(tmp_path / "a.jsonl", documents)
    append, count = module._Writer._append, iter(range(10**6))

    def stopping(self, name, ids):
        if next(count) == 50:
            raise Stopped
        append(self, name, ids)

    monkeypatch.setattr(module._Writer, "_append", stopping)
    with pytest.raises(Stopped):
        prepare(job(inputs=(source,)))
    monkeypatch.undo()
    with pytest.raises(UserError, match="another val_fraction"):
        prepare(job(inputs=(source,), val_fraction=0.5))


def test_an_input_that_fails_at_once_leaves_the_way_free(job, tmp_path, documents):
    source = write_jsonl(tmp_path / "a.jsonl", documents)
    with pytest.raises(UserError, match="'body' in row 1; columns there: id, text"):
        prepare(job(inputs=(source,), text_column="body"))
    prepare(job(inputs=(source,)))
    with pytest.raises(UserError, match="none of 200 documents fell into validation"):
        prepare(job("none", inputs=(source,), val_fraction=1e-9))
    prepare(job("none", inputs=(source,)))


def test_vocabulary_decides_the_width(job, tmp_path, documents, monkeypatch):
    options = {"inputs": (write_jsonl(tmp_path / "a.jsonl", documents),)}
    for size, dtype in ((1 << 16, "uint16"), ((1 << 16) + 1, "uint32")):
        monkeypatch.setattr(tokenizers, "vocab_size", lambda tokenizer, size=size: size)
        assert prepare(job(dtype, **options))["dtype"] == dtype
        verify(tmp_path / dtype)
    with pytest.raises(UserError, match="--dtype uint16: too narrow for a vocabulary of 65537"):
        prepare(job("narrow", **options, dtype="uint16"))
    assert not (tmp_path / "narrow").exists()
