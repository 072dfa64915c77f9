"""The resolved file reruns as it is, on another number of GPUs too, and imports no heavy package to be read."""

import json
import subprocess
import sys

import pytest

from sltrain_ds.config import from_dict, load
from sltrain_ds.config.tree import Key

ODD = [None, True, 0, -1, 1.5, 1e30, 10**30, "", "auto", "x", [], [1], ["x", None], {}, {"x": 1}, {"enabled": []}]


@pytest.mark.parametrize("world", [1, 2, 4, 8])
def test_resolved_file_gives_the_same_run(good, tmp_path, world):
    run = from_dict(good, ["sltrain.steps=5000"], world_size=world, name="first.json")
    path = tmp_path / "config.json"  # another name: run_dir "auto" must have been resolved
    path.write_text(json.dumps(run.to_json()))
    assert load(path, world_size=world, check_files=False) == run


def test_another_number_of_gpus(good):
    first = from_dict(good, world_size=2, name="first.json")
    again = from_dict(first.to_json(), world_size=8, name="config.json")
    assert (first.accumulation, again.accumulation) == (8, 2)
    assert again.to_json() == first.to_json()


def test_checkpoints_follow_a_run_dir_set_later(good, tmp_path):
    """A rerun of a saved config.json elsewhere must not write into the first run's checkpoints."""
    path = tmp_path / "config.json"
    good["sltrain"]["run_dir"] = "first"
    for given in ({}, {"dir": "first/checkpoints"}):
        good["sltrain"]["checkpoint"] = given
        path.write_text(json.dumps(from_dict(good).to_json()))
        assert str(load(path, check_files=False).checkpoint_dir) == "first/checkpoints"
        run = load(path, ["sltrain.run_dir=second"], check_files=False)
        assert str(run.checkpoint_dir) == "second/checkpoints"
    good["sltrain"]["checkpoint"] = {"dir": "elsewhere"}
    path.write_text(json.dumps(from_dict(good).to_json()))
    assert str(load(path, ["sltrain.run_dir=second"], check_files=False).checkpoint_dir) == "elsewhere"


def test_accumulation_given_becomes_a_global_batch(good):
    del good["train_batch_size"]
    good["gradient_accumulation_steps"] = 4
    saved = from_dict(good, world_size=2).to_json()
    assert saved["train_batch_size"] == 256 and "gradient_accumulation_steps" not in saved
    assert from_dict(saved, world_size=4).accumulation == 2


SMALL = {
    "vocab_size": 64,
    "hidden_size": 8,
    "intermediate_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}


@pytest.mark.parametrize("source", [{"preset": "llama_1b"}, {"config": SMALL}])
@pytest.mark.parametrize(
    "method", [{"name": "full_rank"}, {"name": "low_rank", "rank": 4, "alpha": 8.0, "lr_scale": {"factors": 0.3}}]
)
def test_models_and_methods(good, source, method):
    good["sltrain"] |= {"model": source, "method": method}
    run = from_dict(good)
    assert from_dict(run.to_json()) == run and run.sltrain.method.name == method["name"]
    assert run.model_fields["hidden_size"] == (8 if "config" in source else 2048)


def test_a_model_directory_gives_its_fields(good, tmp_path):
    fields = {"model_type": "llama", "vocab_size": 64, "hidden_size": 16, "intermediate_size": 24,
              "num_hidden_layers": 1, "num_attention_heads": 2, "max_position_embeddings": 512}  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(fields))
    good["sltrain"]["model"] = {"path": str(tmp_path)}
    good["sltrain"]["method"]["rank"] = 16
    assert from_dict(good).model_fields == fields
    good["sltrain"]["method"]["rank"] = 17
    with pytest.raises(Exception, match="rank: 17 is above"):
        from_dict(good)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(Exception, match="not readable JSON"):
        from_dict(good)


def test_reading_a_config_is_light(good, tmp_path):
    path = tmp_path / "run.json"
    path.write_text(json.dumps(good))
    code = (
        "import sys; from sltrain_ds.cli import main; code = main(['config', 'check', sys.argv[1], '--no-files']); "
        "sys.exit(code or sorted({'torch', 'deepspeed', 'transformers'} & set(sys.modules)) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["sltrain"]["steps"] == 11000
    assert "512 sequences = 32 x 16 accumulated x 1 GPUs" in done.stderr


def test_nothing_but_user_errors(good):
    """Odd values at every known key are taken or refused in one line, never a traceback."""
    from sltrain_ds.config.overrides import whole_tree
    from sltrain_ds.errors import UserError

    def paths(node, path=()):
        if path:
            yield path
        if isinstance(node, dict):
            for name, child in node.items():
                yield from paths(child, (*path, name))

    refused = 0
    for path in paths(whole_tree()):
        for value in ODD:
            changed = json.loads(json.dumps(good))
            node = changed
            for name in path[:-1]:
                node = node.setdefault(name, {})
                if not isinstance(node, dict):
                    break
            else:
                node[path[-1]] = value
                try:
                    from_dict(changed)
                except UserError as error:
                    refused += 1
                    assert "\n" not in str(error) and path[0] in str(error), (path, value, str(error))
    assert refused > 1000
    assert isinstance(whole_tree()["train_batch_size"], Key)


def test_a_file_of_an_older_run_may_hold_keys_that_are_gone(good):
    older = from_dict(good).to_json()
    older["sltrain"]["op_constants"] = None
    assert from_dict(older).to_json() == from_dict(good).to_json()
