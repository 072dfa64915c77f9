"""What cuBLAS takes from torch's allocator, in the estimate."""

import pytest

from sltrain_ds.config import load
from sltrain_ds.memory.estimate import estimate
from sltrain_ds.memory.libraries import cublas_workspaces, kind_of


@pytest.mark.parametrize(
    "asked, kind, expected",
    [
        ("", "cpu", 0), ("", "a100", 2 * 8_519_680), ("", "h100", 2 << 25), (":4096:2:16:8", "h100", 2 * 8_519_680),
        (":0:0", "a100", 0), (":4096:8", "a100", 2 << 25), (":4096:8", "cpu", 0),
    ],
)  # fmt: skip
def test_workspaces_by_device_and_by_what_the_user_asks_for(monkeypatch, asked, kind, expected):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", asked)
    assert cublas_workspaces(kind) == expected


def test_the_estimate_counts_them_where_a_device_is_named(monkeypatch):
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    run = load("ds_configs/llama_60m.json", [], world_size=1, check_files=False)
    plain, on_gpu = estimate(run), estimate(run, device="h100")
    assert "libraries" not in plain.bytes and on_gpu.bytes["libraries"] == 2 << 25
    assert on_gpu.moments["backward"] - plain.moments["backward"] == 2 << 25
    assert kind_of("cpu") == "cpu"
    fixed = load("ds_configs/llama_60m.json", ["sltrain.deterministic=true"], world_size=1, check_files=False)
    assert estimate(fixed, device="a100").bytes["libraries"] == 2 << 25
