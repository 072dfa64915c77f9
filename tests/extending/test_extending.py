"""The recipes of docs/extending.md: a method and a callback from outside the package, in real runs."""

import json
import re
from pathlib import Path

import pytest
from ranks import launch

from sltrain_ds.config import from_dict
from sltrain_ds.errors import UserError
from sltrain_ds.memory.estimate import estimate
from sltrain_ds.models.build import skeleton

HERE = Path(__file__).parent
METHOD = {"name": "my_method:CoLA", "rank": 6}
CALLBACKS = [{"name": "my_callback:BestLoss", "options": {"margin": 0.001}}]


@pytest.fixture(autouse=True)
def _found(monkeypatch):
    monkeypatch.syspath_prepend(str(HERE))


def train(config, folder, *arguments, ranks=2):
    path = folder / "my_run.json"
    path.write_text(json.dumps(config))
    command = ["--module", "sltrain_ds.train", path, *arguments]
    process = launch(ranks, *command, cwd=HERE, DS_ACCELERATOR="cpu")  # started where the two modules are
    assert process.returncode == 0, process.stdout[-2000:] + process.stderr[-3000:]
    return process.stdout + process.stderr


def losses(folder):
    lines = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


@pytest.mark.distributed
def test_a_method_and_a_callback_train_checkpoint_and_resume(tiny_config, tmp_path):
    config = tiny_config(
        sltrain__method=METHOD, sltrain__callbacks=CALLBACKS, sltrain__steps=6, sltrain__checkpoint__every=3,
        zero_optimization__stage=3,
    )  # fmt: skip
    said = train(config, tmp_path)
    straight = losses(tmp_path)
    assert len(straight) == 6 and straight[-1] < straight[0]
    best = re.search(r"best loss (\S+) of 6 steps", said)
    assert best and float(best[1]) <= min(straight) + 0.001
    step = tmp_path / "run" / "checkpoints" / "step_00000003"
    state = json.loads((step / "sltrain.json").read_text())["callbacks"]["my_callback:BestLoss"]
    assert state["steps"] == 3
    said = train(config, tmp_path, "--resume", step, "--overwrite")
    assert losses(tmp_path) == straight
    assert f"best loss {best[1]} of 6 steps" in said


def test_the_estimate_counts_what_the_layers_hold(tiny_config):
    run = from_dict(tiny_config(sltrain__method=METHOD))
    model = skeleton(run)
    assert type(model.model.layers[0].mlp.up_proj).__name__ == "CoLALinear"
    assert sum(estimate(run).parameters.values()) == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(
    ("method", "line"),
    [
        ({**METHOD, "rank": 1000}, "sltrain.method.rank: 1000 is above min(in, out) of"),
        ({**METHOD, "rank": "6"}, "sltrain.method.rank: must be a whole number"),
        ({**METHOD, "rnak": 6}, "sltrain.method.rnak: unknown key; did you mean sltrain.method.rank?"),
        ({"name": "my_method:CoLA"}, "sltrain.method.rank: is missing"),
        ({**METHOD, "lr_scale": {"factor": 1.0}}, "sltrain.method.lr_scale.factor: unknown key; did you mean"),
        ({"name": "my_method:CoLALinear"}, "sltrain.method.name: my_method:CoLALinear is not a subclass of"),
        ({"name": "not_there:CoLA"}, "sltrain.method.name: not_there cannot be imported"),
    ],
)
def test_bad_options_of_ones_own_method_are_one_line(tiny_config, method, line):
    with pytest.raises(UserError) as error:
        from_dict(tiny_config(sltrain__method=method))
    assert str(error.value).startswith(line) and "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["my_method.py", "my_callback.py"])
def test_the_recipe_in_the_docs_is_the_module_that_is_run(name):
    _, code = (HERE / name).read_text(encoding="utf-8").split('"""\n', 1)
    assert code.strip() in (HERE.parents[1] / "docs" / "extending.md").read_text(encoding="utf-8")


def test_keys_of_ones_own_method_can_be_set(tiny_config):
    run = from_dict(tiny_config(sltrain__method=METHOD), ["sltrain.method.rank=3"])
    assert run.sltrain.method.rank == 3
    assert from_dict(run.to_json()).sltrain.method == run.sltrain.method
