"""Nothing in a checkpoint gets to choose what runs; what an honest one needs is loaded."""

import os
from types import SimpleNamespace

import pytest
import torch
from deepspeed.runtime.checkpoint_engine import FastCheckpointEngine, TorchCheckpointEngine
from deepspeed.runtime.fp16.loss_scaler import LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum
from deepspeed.utils.tensor_fragment import fragment_address

from sltrain_ds.checkpoint.safe_load import load, safe_checkpoint_engine
from sltrain_ds.errors import UserError


class Runs:
    """Unpickled without care, it touches a file."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


class Unknown:
    pass


def test_what_deepspeed_writes_is_loaded(tmp_path):
    held = {
        "zero_stage": ZeroStageEnum.gradients,
        "loss_scaler": LossScaler(1.0),
        "param_slice_mappings": [{"w": fragment_address(numel=3, start=4)}],
        "shape": torch.Size([2, 3]),
        "columns": torch.tensor([1, 65535]).to(torch.uint16),
    }
    torch.save(held, tmp_path / "file.pt")
    for mmap in (False, True):
        found = load(tmp_path / "file.pt", mmap=mmap)
        assert found["zero_stage"] is ZeroStageEnum.gradients and found["loss_scaler"].cur_scale == 1.0
        assert found["param_slice_mappings"] == held["param_slice_mappings"] and found["shape"] == held["shape"]
        assert torch.equal(found["columns"], held["columns"])


def test_a_stage_as_python_3_11_0_wrote_it_and_nothing_else_by_getattr(tmp_path):
    torch.save({"stage": Runs(getattr, ZeroStageEnum, "gradients")}, tmp_path / "stage.pt")
    assert load(tmp_path / "stage.pt")["stage"] is ZeroStageEnum.gradients
    for name, call in {
        "other": Runs(getattr, ZeroStageEnum, "__class__"),
        "class": Runs(getattr, LossScaler, "cur"),
    }.items():
        torch.save({"stage": call}, tmp_path / f"{name}.pt")
        with pytest.raises(UserError, match=rf"{name}.pt: refused: it holds getattr"):
            load(tmp_path / f"{name}.pt")


@pytest.mark.parametrize("mmap", [False, True])
def test_a_pickle_that_runs_code_is_refused_unrun(tmp_path, mmap):
    marker = tmp_path / "ran"
    calls = {"system": Runs(os.system, f"touch {marker}"), "open": Runs(open, str(marker), "w")}
    for name, call in {**calls, "eval": Runs(eval, "1"), "Unknown": Unknown()}.items():
        file = tmp_path / f"{name}.pt"
        torch.save({"module": {"w": torch.ones(2)}, "extra": call}, file)
        with pytest.raises(UserError, match=rf"{name}.pt: refused: it holds \S*{name}") as error:
            load(file, mmap=mmap)
        assert "\n" not in str(error.value)
    assert not marker.exists()


def test_missing_cut_and_foreign_files_are_named(tmp_path):
    with pytest.raises(UserError, match=r"file.pt: no such file"):
        load(tmp_path / "file.pt")
    torch.save({"w": torch.ones(5000)}, tmp_path / "file.pt")
    whole = (tmp_path / "file.pt").read_bytes()
    for content in (b"", b"text", whole[:9000], whole[:-3], whole[100:], whole[:200] + bytes(900) + whole[1100:]):
        (tmp_path / "file.pt").write_bytes(content)
        for mmap in (False, True):
            with pytest.raises(UserError, match=r"file.pt: (damaged|cut short)") as error:
                load(tmp_path / "file.pt", mmap=mmap)
            assert "\n" not in str(error.value)


def test_inside_the_block_deepspeeds_engine_loads_safely(tmp_path):
    marker = tmp_path / "ran"
    torch.save({"w": torch.ones(2)}, tmp_path / "good.pt")
    torch.save({"w": Runs(open, str(marker), "w")}, tmp_path / "bad.pt")
    engine = SimpleNamespace(checkpoint_engine=TorchCheckpointEngine())
    before = torch.load
    with safe_checkpoint_engine(engine):
        loaded = engine.checkpoint_engine.load(str(tmp_path / "good.pt"), map_location=lambda storage, place: storage)
        assert torch.equal(loaded["w"], torch.ones(2))
        with pytest.raises(UserError, match=r"bad.pt: refused: it holds .*open"):
            engine.checkpoint_engine.load(str(tmp_path / "bad.pt"))
    assert torch.load is before and not marker.exists()


def test_an_engine_that_reads_by_other_means_is_refused():
    other = object.__new__(FastCheckpointEngine)
    with (
        pytest.raises(UserError, match=r"checkpoint: FastCheckpointEngine cannot be loaded without unpickling"),
        safe_checkpoint_engine(SimpleNamespace(checkpoint_engine=other)),
    ):
        pass
