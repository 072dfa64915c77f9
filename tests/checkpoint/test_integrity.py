"""Files of a checkpoint that were damaged, lost, or had no room."""

import pytest
import torch

from sltrain_ds.checkpoint.integrity import check_whole, files_of_rank, files_with_weights, told_as_one_line
from sltrain_ds.errors import UserError


@pytest.fixture
def file(tmp_path):
    torch.save({"module": {"w": torch.randn(5000)}}, tmp_path / "mp_rank_00_model_states.pt")
    return tmp_path / "mp_rank_00_model_states.pt"


def test_flipped_bits_that_torch_reads_without_a_word(file):
    check_whole([file])
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    torch.load(file, weights_only=True)
    with pytest.raises(UserError, match=r"model_states\.pt: damaged, .*data/0 does not match its checksum"):
        check_whole([file])


def test_cut_and_missing_files_are_named(file):
    whole = file.read_bytes()
    for content in (b"", b"text", whole[:9000], whole[100:]):
        file.write_bytes(content)
        with pytest.raises(UserError, match=r"model_states\.pt: cut short") as error:
            check_whole([file])
        assert "\n" not in str(error.value)
    file.unlink()
    with pytest.raises(UserError, match=r"model_states\.pt: no such file"):
        check_whole([file])


def test_a_rank_reads_its_own_files(tmp_path):
    for rank in (1, 11):
        for kind in ("model", "optim"):
            (tmp_path / f"zero_pp_rank_{rank}_mp_rank_00_{kind}_states.pt").touch()
    (tmp_path / "bf16_zero_pp_rank_2_mp_rank_00_optim_states.pt").touch()
    own = [f"zero_pp_rank_1_mp_rank_00_{kind}_states.pt" for kind in ("model", "optim")]
    assert [path.name for path in files_of_rank(tmp_path, 3, 1)] == own
    names = [path.name for path in files_of_rank(tmp_path, 2, 2)]
    assert names == ["mp_rank_00_model_states.pt", "bf16_zero_pp_rank_2_mp_rank_00_optim_states.pt"]
    assert len(files_with_weights(tmp_path)) == 5
    (tmp_path / names[0]).touch()
    assert [path.name for path in files_with_weights(tmp_path)] == names[:1]


def test_a_full_disk_is_one_line(tmp_path):
    message = r"step_1: the checkpoint could not be written"
    with pytest.raises(UserError, match=message) as error, told_as_one_line(tmp_path / "step_1"):
        torch.save({"w": torch.zeros(100_000)}, "/dev/full")
    assert "\n" not in str(error.value)
    with pytest.raises(RuntimeError, match="another"), told_as_one_line(tmp_path):
        raise RuntimeError("another")
