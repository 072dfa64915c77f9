"""What the reader takes from a checkpoint equals what the engine held when it wrote it."""

import json
from pathlib import Path

import pytest
import torch
from ranks import launch
from safetensors.torch import load_file

from sltrain_ds.checkpoint.reader import _Files, find_checkpoint, open_checkpoint
from sltrain_ds.errors import UserError

WORKER = Path(__file__).with_name("checkpoint_worker.py")
STEP = "step_00000003"
CASES = {
    1: ("0-fp32-adam", "1-bf16-adam", "2-fp32-adam8bit", "3-fp32-adam", "3-bf16all-adam8bit"),
    2: (
        *("0-fp32-adam", "1-fp32-adam", "2-fp32-adam", "3-fp32-adam"),
        *("1-bf16-adam", "2-bf16-adam8bit", "2-bf16all-adam8bit", "3-bf16-adam8bit", "3-bf16all-adam"),
        *("1-bf16-blockwise", "2-bf16all-blockwise", "3-bf16-blockwise"),
    ),
    4: ("3-bf16-adam", "3-bf16all-blockwise"),
}


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """world -> a folder with a checkpoints folder a case, written by real engines, once."""
    made = {}

    def of(world):
        if world not in made:
            made[world] = tmp_path_factory.mktemp(f"world{world}")
            done = launch(world, WORKER, made[world], *CASES[world], cwd=made[world], timeout=540)
            assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
        return made[world]

    return of


@pytest.mark.distributed
@pytest.mark.parametrize(("world", "case"), [(world, case) for world in CASES for case in CASES[world]])
def test_every_tensor_is_the_engines(written, world, case):
    folder = written(world) / case
    checkpoint = open_checkpoint(folder)
    expected = load_file(folder / "expected.safetensors")
    assert checkpoint.dir == folder / STEP and checkpoint.step == 3
    buffers = {"first.S_columns", "second.S_columns"}
    assert set(checkpoint.buffer_names()) == buffers
    assert set(checkpoint.names()) == {n for n in expected if not n.endswith("workspace")} - buffers
    for name in [*checkpoint.names(), *buffers]:
        tensor = checkpoint.tensor(name)
        assert tensor.dtype == checkpoint.dtype(name) == expected[name].dtype
        assert tensor.shape == checkpoint.shape(name) == expected[name].shape
        assert torch.equal(tensor, expected[name]), name
    assert torch.equal(checkpoint.tensor("head.weight"), expected["embed.weight"])
    assert checkpoint.shape("head.weight") == (23, 13)


@pytest.mark.distributed
def test_names_are_in_the_models_order(written):
    layers = [f"{layer}.{key}" for layer in ("first", "second") for key in ("A", "B", "S_values")]
    for case in ("2-fp32-adam", "3-fp32-adam"):
        assert open_checkpoint(written(2) / case).names() == ["shift", "embed.weight", *layers, "norm.weight"]


@pytest.mark.distributed
@pytest.mark.parametrize("case", ["2-bf16-adam8bit", "3-bf16-adam8bit"])
def test_a_lost_or_cut_file_is_named(written, tmp_path, case):
    source = written(2) / case / STEP
    files = sorted(file.name for file in source.glob("*.pt"))
    needed = [name for name in files if case[0] == "3" or "model_states" in name]
    for lost in needed:
        for cut in (None, 0.5, 0.99):
            folder = tmp_path / f"{lost}-{cut}"
            folder.mkdir()
            for file in source.iterdir():
                if file.name != lost:
                    (folder / file.name).symlink_to(file)
                elif cut:
                    content = file.read_bytes()
                    (folder / lost).write_bytes(content[: int(cut * len(content))])
            with pytest.raises(UserError, match=lost):
                checkpoint = open_checkpoint(folder)
                for name in checkpoint.names():
                    checkpoint.tensor(name)


def complete(folder, **changes):
    folder.mkdir(parents=True, exist_ok=True)
    module = {"w": torch.arange(6.0).view(2, 3)}
    torch.save({"module": module, "buffer_names": []}, folder / "mp_rank_00_model_states.pt")
    state = {"format": 1, "config": {}, "step": 7, "tokens": 9, "zero_stage": 2, "world_size": 1, "supports": {}}
    (folder / "sltrain.json").write_text(json.dumps(state | changes))
    return folder


def test_run_folder_and_step_mean_the_same(tmp_path):
    step = complete(tmp_path / "run" / "checkpoints" / "step_00000007")
    (step.parent / "latest").write_text("step_00000007\n")
    for path in (step, step.parent, tmp_path / "run"):
        assert find_checkpoint(path) == step
    assert open_checkpoint(tmp_path / "run").tensor("w").tolist() == [[0, 1, 2], [3, 4, 5]]


def bad_missing(tmp_path):
    return tmp_path / "nowhere"


def bad_empty(tmp_path):
    return tmp_path


def bad_no_latest(tmp_path):
    return complete(tmp_path / "step_00000005").parent


def bad_incomplete(tmp_path):
    complete(tmp_path / "step_00000005")
    (complete(tmp_path / "step_00000007") / "sltrain.json").unlink()
    return tmp_path / "step_00000007"


def bad_latest(tmp_path):
    (tmp_path / "latest").write_text("step_00000007")
    return bad_incomplete(tmp_path).parent


def bad_json(tmp_path):
    (complete(tmp_path) / "sltrain.json").write_text("{")
    return tmp_path


def bad_key(tmp_path):
    (complete(tmp_path) / "sltrain.json").write_text('{"format": 1}')
    return tmp_path


def bad_format(tmp_path):
    return complete(tmp_path, format=2)


def bad_name(tmp_path):
    return complete(tmp_path)


def bad_contents(tmp_path):
    torch.save([1, 2], complete(tmp_path) / "mp_rank_00_model_states.pt")
    return tmp_path


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (bad_missing, "nowhere: no such directory"),
        (bad_empty, "not a checkpoint, it holds neither sltrain.json nor latest"),
        (bad_no_latest, "nor latest .*; the newest complete is .*step_00000005"),
        (bad_incomplete, "step_00000007: incomplete, .*; the newest complete is .*step_00000005"),
        (bad_latest, "step_00000007: incomplete, .*; the newest complete is .*step_00000005"),
        (bad_json, r"sltrain.json: damaged \(JSONDecodeError"),
        (bad_key, r"sltrain.json: damaged \(KeyError"),
        (bad_format, "sltrain.json: format 2 is not 1"),
        (bad_name, "holds no parameter or buffer v"),
        (bad_contents, "mp_rank_00_model_states.pt: not a DeepSpeed checkpoint file"),
    ],
)
def test_what_is_no_checkpoint_is_said_in_one_line(tmp_path, make, message):
    with pytest.raises(UserError, match=message) as error:
        open_checkpoint(make(tmp_path)).tensor("v")
    assert "\n" not in str(error.value)


def test_files_are_let_go_once_the_budget_is_read(tmp_path):
    path = complete(tmp_path) / "mp_rank_00_model_states.pt"
    files = _Files(budget=40)
    first = files[path]
    files.count(torch.zeros(10))
    assert files[path] is first  # 40 bytes are within the budget
    files.count(torch.zeros(1))
    assert files[path] is not first
