"""ZeRO-3's gathers are ordered after the update."""

from types import SimpleNamespace

from sltrain_ds.zero import gathers


def test_the_gather_stream_waits_for_the_current_one(monkeypatch):
    waited = []
    stream = SimpleNamespace(wait_stream=waited.append)
    monkeypatch.setattr(gathers, "get_accelerator", lambda: SimpleNamespace(current_stream=lambda: "current"))
    stage3 = SimpleNamespace(parameter_offload=SimpleNamespace(**{gathers.STREAM: stream}))
    gathers.gather_after_updates(SimpleNamespace(optimizer=stage3))
    assert waited == ["current"]
    for other in (SimpleNamespace(), SimpleNamespace(parameter_offload=SimpleNamespace(**{gathers.STREAM: None}))):
        gathers.gather_after_updates(SimpleNamespace(optimizer=other))  # another stage, and a CPU
    assert waited == ["current"]
