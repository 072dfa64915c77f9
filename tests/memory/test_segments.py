"""Growing segments are asked for where the user has not said otherwise."""

import pytest
import torch

from sltrain_ds.memory import segments


@pytest.mark.parametrize("running", [False, True])
def test_segments_grow_whether_cuda_runs_or_not(monkeypatch, running):
    asked = []
    for name in segments.VARIABLES:
        monkeypatch.setenv(name, "")
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: running)
    monkeypatch.setattr(torch.cuda.memory, "_set_allocator_settings", asked.append)
    segments.grow_segments()
    assert segments.os.environ["PYTORCH_ALLOC_CONF"] == "expandable_segments:True"
    assert asked == ["expandable_segments:True"] * running


@pytest.mark.parametrize("name", segments.VARIABLES)
def test_the_users_own_setting_stays(monkeypatch, name):
    for other in segments.VARIABLES:
        monkeypatch.delenv(other, raising=False)
    monkeypatch.setenv(name, "max_split_size_mb:128")
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda.memory, "_set_allocator_settings", lambda text: pytest.fail("set"))
    segments.grow_segments()
    assert [segments.os.environ.get(key) for key in segments.VARIABLES if key != name] == [None]
