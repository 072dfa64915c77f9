import dataclasses
import json

import pytest
import torch

from sltrain_ds.ops import mode_cache
from sltrain_ds.ops.measure_modes import Layer

LAYER = Layer(48, 32, 8, 60, 40)
TIMES = {"compose": 2.0, "factored": 1.0}


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(mode_cache, "_said", set())
    return tmp_path / "sltrain_ds" / "modes.json"


def test_what_was_kept_is_found(cache):
    assert mode_cache.path() == cache and mode_cache.find(LAYER, ["compose"]) is None
    mode_cache.keep(LAYER, TIMES)
    assert mode_cache.find(LAYER, ["factored", "compose"]) == TIMES
    assert mode_cache.find(LAYER, ["compose"]) == {"compose": 2.0}
    assert mode_cache.find(LAYER, ["compose", "keep"]) is None  # not all of them
    assert [file.name for file in cache.parent.iterdir()] == ["modes.json"]


@pytest.mark.parametrize(
    "other",
    [{"out_features": 49}, {"in_features": 33}, {"rank": 9}, {"nnz": 61}, {"tokens": 41}, {"dtype": torch.bfloat16},
     {"bias": True}, {"recomputed": True}],
    ids=str,
)  # fmt: skip
def test_another_layer_is_another_one(other):
    mode_cache.keep(LAYER, TIMES)
    changed = dataclasses.replace(LAYER, **other)
    assert mode_cache.find(changed, ["compose"]) is None
    mode_cache.keep(changed, {"compose": 9.0})
    assert mode_cache.find(LAYER, ["compose"]) == {"compose": 2.0}


@pytest.mark.parametrize("what", ["device_name", "instructions", "_kernels", "_operator", "__version__"])
def test_another_machine_or_version_measures_anew(monkeypatch, what):
    mode_cache.keep(LAYER, TIMES)
    monkeypatch.setattr(mode_cache, what, "9.9" if what == "__version__" else lambda *_: "another")
    assert mode_cache.find(LAYER, ["compose"]) is None


def test_another_number_of_threads_measures_anew(monkeypatch):
    mode_cache.keep(LAYER, TIMES)
    threads = torch.get_num_threads() + 1
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    assert mode_cache.find(LAYER, ["compose"]) is None


@pytest.mark.parametrize(
    "content",
    ["{", "[]", '{"format": 2, "times": {}}', '{"format": 1, "times": {"a": 3}}',
     '{"format": 1, "times": {"a": {"b": 3}}}',
     '{"format": 1, "times": {"a": {"b": {"compose": "fast"}}}}', '{"format": 1, "times": {"a": {"b": {"keep": -1}}}}'],
)  # fmt: skip
def test_a_damaged_file_is_told_once_and_replaced(cache, capsys, content):
    cache.parent.mkdir()
    cache.write_text(content)
    assert mode_cache.find(LAYER, ["compose"]) is None and mode_cache.find(LAYER, ["keep"]) is None
    assert capsys.readouterr().out.count(str(cache)) == 1
    mode_cache.keep(LAYER, TIMES)
    assert mode_cache.find(LAYER, ["compose"]) == {"compose": 2.0}
    assert json.loads(cache.read_text())["format"] == mode_cache.FORMAT


def test_a_place_that_cannot_be_written_is_told(cache, capsys):
    cache.parent.write_text("a file")  # also for root
    mode_cache.keep(LAYER, TIMES)
    assert "cannot be written" in capsys.readouterr().out
