"""`bench profile`: what its numbers are made of, and a tiny run of both methods."""

import json
from types import SimpleNamespace

import pytest
import torch
from torch.autograd import DeviceType

from sltrain_ds.bench import flops, profile_step, step
from sltrain_ds.cli import main
from sltrain_ds.config.presets import PRESETS
from sltrain_ds.errors import UserError
from sltrain_ds.methods.sltrain_layer import SLTrainLinear
from sltrain_ds.ops import gemm, sltrain_linear, spmm

CONFIG = {
    "train_batch_size": 4,
    "gradient_clipping": 0.0,
    "zero_optimization": {"stage": 2},
    "optimizer": {"type": "AdamW", "params": {"lr": 0.003, "torch_adam": True}},
    "sltrain": {
        "model": {
            "config": {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1,
                       "num_attention_heads": 2},
        },
        "method": {"name": "sltrain", "rank": 8, "density": 0.05, "alpha": 16},
        "precision": {"states": "8bit"},
        "per_layer_update": True,
        "op_mode": "compose",
        "tokenizer": "nowhere",
        "data": {"dir": "nowhere", "sequence_length": 16},
        "steps": 5,
    },
}  # fmt: skip


class Event(SimpleNamespace):
    """A profiler event: name, device, start and length in ns."""

    def __init__(self, name, on_gpu, begin, length):
        place = DeviceType.CUDA if on_gpu else DeviceType.CPU
        super().__init__(name=lambda: name, device_type=lambda: place, start_ns=lambda: begin,
                         duration_ns=lambda: length, is_user_annotation=lambda: name == "range")  # fmt: skip


def test_launches_waits_and_busy_time_are_told_apart():
    events = [
        Event("cudaLaunchKernel", False, 0, 5),
        Event("cuLaunchKernelEx", False, 5, 5),
        Event("cudaMemcpyAsync", False, 10, 5),
        Event("cudaStreamSynchronize", False, 20, 5),
        Event("cudaDeviceSynchronize", False, 30, 5),
        Event("aten::mm", False, 0, 40),
        Event("gemm", True, 0, 4_000_000),
        Event("adam", True, 3_000_000, 4_000_000),
        Event("gemm", True, 9_000_000, 1_000_000),
        Event("range", True, 0, 10_000_000),
    ]
    found = profile_step.summary(events, cuda=True)
    assert (found["launches"], found["waits"], found["kernels"]) == (2, 1, 3)
    assert found["kernels_ms"] == pytest.approx(9.0) and found["busy_ms"] == pytest.approx(8.0)
    assert found["top"][0] == {"name": "gemm", "ms": 5.0, "count": 2} and "aten::mm" not in found["calls"]
    on_cpu = profile_step.summary(events, cuda=False)
    assert on_cpu["launches"] is None and on_cpu["waits"] is None


def test_a_row_follows_from_its_case():
    case = {
        "method": "sltrain", "beside": ["full_rank"], "times": [0.1, 0.2, 0.4], "full_rank_times": [0.2, 0.2, 0.2],
        "tokens": 1000, "model_flops": 10**13, "own_flops": 2 * 10**13, "device_flops": 10**14, "bytes": None,
        "launches": 7, "waits": 1, "kernels": 9, "kernels_ms": 60.0, "busy_ms": 50.0,
    }  # fmt: skip
    row = dict(zip(profile_step.COLUMNS, profile_step.table_row(case), strict=True))
    assert row["ms"] == 200 and row["tokens/s"] == 5000 and row["MFU"] == 0.5 and row["x full-rank's time"] == 1.0
    assert row["own TFLOP"] == 20 and row["busy"] == 0.25 and row["active MB"] is None


def test_model_flops_are_six_a_weight_and_token_and_attention():
    fields = PRESETS["llama_7b"]
    weights = 32 * (4 * 4096**2 + 3 * 4096 * 11008) + 32_000 * 4096
    assert flops.model_flops(fields, 2048, 8192) == 6 * 8192 * (weights + 32 * 4096 * 2048)


@pytest.mark.parametrize("mode", ["compose", "keep", "factored", "factored_dense"])
def test_a_modes_flops_are_those_of_its_products(mode, monkeypatch):
    """Counted from the products that a forward and backward make."""
    if mode.startswith("factored"):
        monkeypatch.setattr(spmm, "available", lambda device: False)  # so that S is dense: its products are seen
    layer = SLTrainLinear(24, 40, rank=8, density=0.1, alpha=8)
    layer.op_mode = mode
    x = torch.randn(16, 24, requires_grad=True)
    counted = []

    def counting(out, a, b, *args, **kwargs):
        counted.append(2 * a.shape[0] * a.shape[1] * b.shape[1])
        return gemm.gemm_(out, a, b, *args, **kwargs)

    monkeypatch.setattr(sltrain_linear, "_native_serves", lambda *_: False)  # the reference, whose products are seen
    monkeypatch.setattr(sltrain_linear, "gemm_", counting)
    layer(x).sum().backward()
    told = flops.layer_flops("factored_dense" if mode == "factored" else mode, 40, 24, 8, layer.nnz, 16)
    assert sum(counted) == told


def test_both_methods_at_two_sizes(tmp_path, monkeypatch, capsys):
    for key, value in step.alone().items():
        monkeypatch.setenv(key, value)
    path = tmp_path / "small.json"
    path.write_text(json.dumps(CONFIG))
    sizes = ["--tokens", "8,32", "--sequence", "16", "--pairs", "2", "--seconds", "0"]
    assert main(["bench", "profile", str(path), *sizes, "--device", "cpu", "--out", str(tmp_path)]) == 0
    assert capsys.readouterr().out == (tmp_path / "profile.md").read_text()
    cases = json.loads((tmp_path / "profile.json").read_text())["cases"]
    assert [(case["method"], case["tokens"], bool(case["bytes"])) for case in cases] == [
        ("sltrain", 8, True), ("sltrain", 8, False), ("full_rank", 8, False), ("sltrain", 32, False),
        ("full_rank", 32, False),
    ]  # fmt: skip
    assert all(len(case["times"]) == 2 and case["kernels"] > 10 for case in cases)
    assert cases[0]["modes"] == {"compose": 7} and cases[0]["bytes"]["allocated"] > 0
    assert cases[1]["own_flops"] > cases[2]["own_flops"] == cases[2]["model_flops"]


def test_memory_decides_what_is_measured_together(monkeypatch, capsys):
    peaks = {"a": [10e9, 30e9], "b": [20e9, 45e9], "c": [90e9]}
    monkeypatch.setattr(profile_step, "estimate", lambda peak: SimpleNamespace(peak=peak))

    def grouped(free):
        monkeypatch.setattr(profile_step, "free_bytes", lambda device: free / profile_step.ROOM)
        return profile_step.groups("x.json", peaks, "cpu")

    assert grouped(56e9) == [["a", "b"]]  # 10 + 20, and the 25 of the larger growth
    assert grouped(54e9) == [["a"], ["b"]]
    assert grouped(31e9) == [["a"]] and "b needs 45.0 GB of 31.0" in capsys.readouterr().err


def test_tokens_that_make_no_whole_sequences_are_refused():
    with pytest.raises(UserError, match="--tokens 24: must be a multiple of --sequence 16"):
        profile_step.sized("x", CONFIG, "sltrain", 24, 16)
