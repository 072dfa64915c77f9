"""What the loop leaves on the screen."""

from types import SimpleNamespace

import pytest

from sltrain_ds import loop
from sltrain_ds.errors import UserError


def test_an_error_begins_a_line_of_its_own(monkeypatch, tmp_path, capsys):
    def lost(*place):
        raise UserError("a shard is gone")

    monkeypatch.setattr(loop, "GradNorm", lambda engine: None)
    block = SimpleNamespace(steps=9, seed=0)
    run = SimpleNamespace(sltrain=block, world_size=1, accumulation=1, run_dir=tmp_path)
    optimizer = SimpleNamespace(param_groups=[{"lr": 0.1}])
    engine = SimpleNamespace(global_rank=0, optimizer=optimizer)
    with pytest.raises(UserError) as error:
        loop.train(engine, run, SimpleNamespace(micro_batch=lost), None, None, start_step=1)
    err = capsys.readouterr().err  # while the error, and with it the bar, is held, as where it is printed
    assert "1/9" in err and err.endswith("\n"), error
