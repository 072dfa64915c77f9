"""`sltrain-ds eval` on a tiny model: numbers, masked documents, and every mistake in one line."""

import json
import math

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from sltrain_ds.cli import main
from sltrain_ds.data.dataset import TokenData
from sltrain_ds.methods.convert import convert
from sltrain_ds.methods.registry import get
from sltrain_ds.models.converted import save_converted

FIELDS = {"vocab_size": 384, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
          "num_attention_heads": 2, "max_position_embeddings": 64, "initializer_range": 0.3}  # fmt: skip
METHOD = {"name": "sltrain", "rank": 4, "density": 0.1, "alpha": 8.0, "support_seed": 0, "target_modules": ["mlp"]}


@pytest.fixture
def model(tmp_path):
    """A plain model directory, of weights that attend to what lies before."""
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**FIELDS)).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def run(tiny, capsys):
    """`run(directory, *flags)` -> (exit code, JSON on stdout or None, stderr)."""

    def call(directory, *flags):
        known = ["--data", str(tiny["data"]), "--sequence-length", "32", "--tokens", "640", "--device", "cpu", "--json"]
        code = main(["eval", str(directory), *known, *flags])
        out, err = capsys.readouterr()
        return code, json.loads(out) if out else None, err

    return call


def by_hand(model, tiny, cut):
    """Mean loss over the first sequences of validation, document by document where `cut`."""
    data = TokenData(tiny["data"], "validation", 32)
    total, count = 0.0, 0
    for i in range(20):
        row = torch.from_numpy(data[i * data.num_sequences // 20])
        ends = (row == data.eos_id).nonzero().flatten().tolist() if cut else []
        pieces = torch.tensor_split(row, [end + 1 for end in ends])
        for piece in pieces:
            if len(piece) > 1:
                with torch.no_grad():
                    logits = model(piece[None]).logits[0, :-1]
                total += torch.nn.functional.cross_entropy(logits, piece[1:], reduction="sum").item()
                count += len(piece) - 1
    return total / count, count


@pytest.mark.parametrize("cut", [False, True])
def test_the_loss_is_that_of_each_document(model, tiny, run, cut):
    code, out, _ = run(model, *["--mask-documents"][:cut])
    loss, count = by_hand(LlamaForCausalLM.from_pretrained(model), tiny, cut)
    assert code == 0 and out["tokens"] == count
    assert math.isclose(out["loss"], loss, rel_tol=1e-5) and math.isclose(
        out["perplexity"], math.exp(loss), rel_tol=1e-4
    )


def test_masking_is_seen(model, run):
    assert abs(run(model)[1]["loss"] - run(model, "--mask-documents")[1]["loss"]) > 1e-3


def refused(result, *parts):
    code, out, err = result
    assert code == 2 and out is None and err.count("sltrain-ds: error: ") == 1
    line = err[err.index("sltrain-ds: error: ") :]
    assert line.count("\n") == 1 and all(part in line for part in parts), line


@pytest.mark.parametrize("device", ["foo", "meta", "cuda:99"])
def test_a_device_that_cannot_be_used(model, run, device):
    refused(run(model, "--device", device), f"--device {device}: cannot be used", "cpu always works")


def test_a_sequence_longer_than_the_model(model, run):
    assert run(model, "--sequence-length", "64")[0] == 0
    refused(run(model, "--sequence-length", "65"), "--sequence-length: 65", "max_position_embeddings 64")


def test_a_run_directory_is_told_from_a_model(model, run):
    (model / "checkpoints").mkdir()
    refused(run(model), f"{model}: is a run, not a model; give the output of `sltrain-ds export {model} OUT_DIR`")


def test_a_truncated_file(model, run):
    file = model / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    refused(run(model), str(model), "cannot be loaded")


def test_no_safetensors_at_all(model, run):
    (model / "model.safetensors").write_bytes(b"something else")
    refused(run(model), str(model), "cannot be loaded")


def test_weights_of_another_size(model, run):
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "intermediate_size": 40}))
    refused(run(model), str(model), "cannot be loaded")


def test_weights_of_another_model(model, run):
    """transformers alone would warn, and draw what is missing at random."""
    file = model / "model.safetensors"
    state = load_file(file)
    del state["model.layers.1.mlp.up_proj.weight"]
    save_file({**state, "foreign": torch.zeros(2)}, file, metadata={"format": "pt"})
    refused(run(model), str(model), "lack model.layers.1.mlp.up_proj.weight", "1 missing")


@pytest.mark.parametrize("changes", [{"hidden_size": "32"}, {"num_attention_heads": [1]}, {"model_type": "nothing"}])
def test_a_config_that_is_none(model, run, changes):
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, **changes}))
    refused(run(model), str(model), "cannot be loaded")


def test_a_converted_model(tmp_path, run):
    torch.manual_seed(0)
    block = {key: value for key, value in METHOD.items() if key != "name"}
    built = convert(LlamaForCausalLM(LlamaConfig(**FIELDS)), get("sltrain")(**block))
    save_converted(built, tmp_path / "converted", METHOD)
    code, out, _ = run(tmp_path / "converted")
    assert code == 0 and out["tokens"] == 20 * 31
    file = tmp_path / "converted" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    refused(run(tmp_path / "converted"), str(tmp_path / "converted"), "damaged")


def test_a_vocabulary_too_small(tmp_path, run):
    LlamaForCausalLM(LlamaConfig(**{**FIELDS, "vocab_size": 100})).save_pretrained(tmp_path / "small")
    refused(run(tmp_path / "small"), "its tokenizer has 384 tokens, the model 100")
