"""The shipped corpus through the two commands that the quickstart runs, and `data info`."""

import json

import pytest

from sltrain_ds.cli import main


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    from pathlib import Path

    import sltrain_ds

    corpus = Path(sltrain_ds.__file__).parent / "data" / "austen.txt.xz"
    folder = tmp_path_factory.mktemp("austen")
    tokenizer, data = str(folder / "tokenizer"), str(folder / "data")
    assert main(["tokenizer", "train", "--input", str(corpus), "--vocab-size", "2048", "--out", tokenizer]) == 0
    prepare = ["data", "prepare", "--input", str(corpus), "--tokenizer", tokenizer, "--out", data]
    assert main([*prepare, "--val-fraction", "0.05"]) == 0
    return data, [*prepare, "--val-fraction", "0.05"]


def test_chapters_of_six_novels_and_baselines(prepared, capsys):
    data, prepare = prepared
    assert main(prepare) == 0  # again: recognised
    assert main(["data", "verify", data]) == 0
    capsys.readouterr()
    assert main(["data", "info", data, "--json", "--ngram"]) == 0
    info = json.loads(capsys.readouterr().out)
    # 269 chapters; title pages, volume headings and notes stand between them
    assert info["train"]["documents"] + info["validation"]["documents"] == 281
    assert info["vocab_size"] == 2048
    # docs/data.md prints these; sentencepiece versions may merge a little differently
    assert info["train"]["tokens"] == pytest.approx(1_086_176, rel=0.01)
    assert info["validation"]["tokens"] == pytest.approx(64_605, rel=0.01)
    assert info["ngram"]["unigram"] == pytest.approx(529.6, rel=0.03)
    assert info["ngram"]["bigram"] == pytest.approx(67.3, rel=0.03)


def test_info_reads_as_text(prepared, capsys):
    assert main(["data", "info", prepared[0], "--sequence-length", "100"]) == 0
    assert "sequences_of_100 10861, dropped_tokens 76" in capsys.readouterr().out
