"""What the loop leaves on the screen."""

from types import SimpleNamespace

import pytest
import torch

from sltrain_ds.errors import UserError
from sltrain_ds.training import loop
from sltrain_ds.training.evaluate import on_device


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


def test_a_tensor_under_two_keys_is_sent_once():
    tokens, mask = torch.tensor([[1, 2]]), torch.tensor([[1, 1]])
    sent = on_device({"input_ids": tokens, "labels": tokens, "attention_mask": mask}, "meta")
    assert sent["labels"] is sent["input_ids"] and sent["attention_mask"] is not sent["input_ids"]
    assert all(value.device.type == "meta" and value.shape == (1, 2) for value in sent.values())
