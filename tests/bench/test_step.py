import json

import pytest
import torch

from sltrain_ds.bench import step
from sltrain_ds.bench.naive import NaiveLinear
from sltrain_ds.cli import main
from sltrain_ds.errors import UserError

CONFIG = {
    "train_batch_size": 4,
    "train_micro_batch_size_per_gpu": 2,
    "gradient_clipping": 1.0,
    "zero_optimization": {"stage": 2, "reduce_bucket_size": 100000, "allgather_bucket_size": 100000},
    "optimizer": {"type": "AdamW", "params": {"lr": 0.003, "torch_adam": True}},
    "sltrain": {
        "model": {
            "config": {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1,
                       "num_attention_heads": 2},
        },
        "method": {"name": "sltrain", "rank": 8, "density": 0.05, "alpha": 16},
        "tokenizer": "nowhere",
        "data": {"dir": "nowhere", "sequence_length": 16},
        "steps": 5,
    },
}  # fmt: skip


@pytest.fixture(autouse=True)
def one_rank(monkeypatch):
    for key, value in step.alone().items():
        monkeypatch.setenv(key, value)
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")


def test_rows_hold_medians_of_pairs():
    sizes = {
        "parameters": 2_000_000,
        "modes": {},
        "tokens": 100,
        "data": "random",
        "held": 5_000_000,
        "peak": 7_000_000,
    }
    methods = {
        "full_rank": {"times": [1.0, 2.0, 4.0], **sizes},
        "sltrain": {"times": [2.0, 2.0, 2.0], **sizes},
        "naive": {"times": [2.0, 6.0, 3.0], **sizes},
    }
    case = {"config": "x/y.json", "engines": "together", "methods": methods}
    rows = {row[1]: row for row in step.table_rows(case)}
    assert rows["sltrain"][5:11] == pytest.approx([2000.0, 50.0, 1.5, 1.0, 5.0, 7.0])  # 1, 3, 1.5 and 2, 1, 0.5
    assert rows["full_rank"][7:9] == pytest.approx([2.0, 1.0]) and rows["naive"][7:9] == pytest.approx([1.0, 2.0])
    methods["sltrain"]["modes"] = {"factored": 3, "compose": 4}
    del methods["naive"]
    assert step.table_rows(case)[1][1] == "sltrain: factored 3, compose 4"
    assert [row[7] for row in step.table_rows(case)] == [None, None]


def test_bench_step_runs_all_methods_through_the_engine(tmp_path, capsys):
    path = tmp_path / "small.json"
    path.write_text(json.dumps(CONFIG))
    command = ["bench", "step", str(path), "--steps", "2", "--out", str(tmp_path), "--set", "train_batch_size=2"]
    assert main([*command, "--device", "cpu"]) == 0
    assert capsys.readouterr().out == (tmp_path / "step.md").read_text()
    (case,) = json.loads((tmp_path / "step.json").read_text())["cases"]
    found = case["methods"]
    assert list(found) == list(step.METHODS) and case["engines"] == "together" and not case["left_out"]
    assert all(len(one["times"]) == 2 and one["tokens"] == 32 and one["data"] == "random" for one in found.values())
    assert found["sltrain"]["parameters"] == found["naive"]["parameters"] < found["full_rank"]["parameters"]
    assert sum(found["sltrain"]["modes"].values()) == 7 and not found["naive"]["modes"]
    assert all(one["peak"] > one["held"] >= 4 * 4 * one["parameters"] for one in found.values())


def test_what_does_not_fit_together_runs_alone_and_what_does_not_fit_is_left_out(monkeypatch):
    needs = {method: step.estimate(step.variant("x", CONFIG, method)).peak for method in ("full_rank", "sltrain")}
    monkeypatch.setattr(step, "free_bytes", lambda device: (max(needs.values()) + 1000) / step.ROOM)
    case = step.measure("x", CONFIG, ["full_rank", "sltrain"], "cpu", 1)
    assert case["engines"] == "one by one" and len(case["methods"]) == 2
    monkeypatch.setattr(step, "free_bytes", lambda device: (min(needs.values()) + 1) / step.ROOM)
    case = step.measure("x", CONFIG, ["full_rank", "sltrain"], "cpu", 1)
    assert list(case["left_out"]) == [max(needs, key=needs.get)] and len(case["methods"]) == 1


def test_the_naive_engine_trains_the_same_model():
    run = step.variant("x", CONFIG, "sltrain")
    engines = [step.Engine(run, naive, "cpu") for naive in (False, True)]
    ours, naive = (engine.engine.module for engine in engines)
    assert sum(isinstance(module, NaiveLinear) for module in naive.modules()) == 7
    for (name, a), b in zip(ours.named_parameters(), naive.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4, msg=name)
    for engine in engines:
        engine.close()


def test_a_dense_file_is_refused():
    dense = {**CONFIG, "sltrain": {**CONFIG["sltrain"], "method": {"name": "full_rank"}}}
    assert step.variant("x", dense, "full_rank").sltrain.method.name == "full_rank"
    with pytest.raises(UserError, match=r"sltrain\.method\.name"):
        step.variant("x", dense, "naive")
