"""The gauge counts tensors; the meter's categories are the run's, and add up to the peak."""

import subprocess
import sys
from types import SimpleNamespace

import pytest

torch = pytest.importorskip("torch")

from sltrain_ds.memory.gauge import Gauge, resident  # noqa: E402
from sltrain_ds.ops import builder  # noqa: E402
from sltrain_ds.training.meter import Meter  # noqa: E402


@pytest.mark.skipif(builder.missing_tools() is not None, reason="counts in C++")
def test_counts_every_byte_of_a_tensor():
    gauge = Gauge("cpu")
    assert gauge.kind == "allocator"
    before = gauge.now()
    kept = torch.empty(1000, dtype=torch.float64)
    assert gauge.now() == before + 8000
    gauge.most(reset=True)
    passing = torch.ones(500, 100)
    passing = (passing * 2).sum()  # two of 200,000 bytes at once
    assert 8000 + 400_000 <= gauge.most() - before < 8000 + 401_000
    assert gauge.now() - before == 8000 + passing.nbytes
    view = kept[:10]
    del kept
    assert gauge.now() - before == 8000 + passing.nbytes  # a view keeps all of its storage
    del view
    assert gauge.now() - before == passing.nbytes
    assert gauge.most(reset=True) > gauge.now() == gauge.most()  # the new peak starts from what is alive


def test_growing_a_storage_counts():
    gauge = Gauge("cpu")
    before = gauge.now()
    tensor = torch.empty(0)
    tensor.resize_(300)
    if gauge.kind == "allocator":
        assert gauge.now() == before + 1200


def test_without_the_ops_the_resident_set_serves():
    code = (
        "import torch; from sltrain_ds.memory.gauge import Gauge; g = Gauge('cpu'); a = torch.ones(10_000_000);"
        "assert g.kind == 'resident', g.kind; assert 35e6 < g.now() < 60e6, g.now(); del a; g.now();"
        "assert g.most(reset=True) > 35e6; assert g.most() < 35e6, g.most()"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env={**__import__("os").environ, "SLTRAIN_OPS": "reference"}, capture_output=True
    )
    assert done.returncode == 0, done.stderr.decode()[-500:]


def test_the_peak_of_the_resident_set_is_no_less_than_it():
    now, most = resident()
    assert 0 < now <= most


def test_a_gradient_that_micro_batches_add_to_counts_once():
    model = torch.nn.Linear(300, 200, bias=False)
    engine = SimpleNamespace(module=model, optimizer=None, basic_optimizer=torch.optim.SGD(model.parameters()))
    meter = Meter("cpu")
    meter.watch(model)
    meter.begin(engine)
    for rows in (2, 500, 1000):  # each a new high, at which is counted
        meter.enter("backward")
        batch = torch.ones(rows, 300)
        model(batch).sum().backward()
    assert meter.read()["gradients"] == model.weight.nbytes


def test_a_run_writes_and_prints_where_its_memory_goes(train):
    process, lines = train(1, sltrain__steps=3)
    assert process.returncode == 0, process.stderr[-2000:]
    found = [line["memory"] for line in lines if "memory" in line]
    for memory in found:
        parts = {key: size for key, size in memory.items() if key not in ("peak", "tensors")}
        assert sum(parts.values()) == memory["peak"] and min(parts.values()) >= 0
        assert memory["tensors"] < memory["peak"]
    parameters = found[0]["weights"] // 4  # fp32
    assert found[-1]["states"] == 8 * parameters and found[-1]["masters"] == 4 * parameters
    assert "memory of this rank at its peak" in process.stdout and "peak of tensors" in process.stdout


def test_a_gauge_on_cuda_reads_active_bytes(monkeypatch):
    """Allocated ones fall while a freed block waits for the stream that still uses it."""
    stats = {"active_bytes.all.current": 7, "active_bytes.all.peak": 9, "allocated_bytes.all.peak": 5}
    monkeypatch.setattr(torch.cuda, "memory_stats", lambda device: stats)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: None)
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda device: 11)
    gauge = Gauge("cuda")
    assert (gauge.now(), gauge.most(reset=True), gauge.reserved()) == (7, 9, 11)
    assert Gauge("cpu").reserved() is None
