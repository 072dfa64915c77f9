"""`sltrain-ds data info`: its own mistakes."""

import shutil

import pytest

from sltrain_ds.cli import main


@pytest.mark.parametrize("tokens", ["-5", "0"])
def test_eval_tokens_below_one(tiny, capsys, tokens):
    assert main(["data", "info", str(tiny["data"]), "--ngram", "--eval-tokens", tokens]) == 2
    assert f"error: --eval-tokens: {tokens} must be at least 1" in capsys.readouterr().err
    assert main(["data", "info", str(tiny["data"]), "--ngram", "--eval-tokens", "2000", "--sequence-length", "32"]) == 0
    assert "bigram" in capsys.readouterr().out


def test_ngram_without_a_validation_split(tiny, tmp_path, capsys):
    from sltrain_ds.data.index import read_index, write_json

    shutil.copytree(tiny["data"], tmp_path / "data")
    index = read_index(tmp_path / "data")
    del index["splits"]["validation"]
    write_json(tmp_path / "data" / "index.json", index)
    assert main(["data", "info", str(tmp_path / "data"), "--ngram"]) == 2
    assert "has no validation split" in capsys.readouterr().err
