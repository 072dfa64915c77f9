import json

import numpy as np
import pytest
import torch
from bounds import of_sum
from tiny_runs import METHODS, model, save_checkpoint

from sltrain_ds.errors import UserError
from sltrain_ds.methods.layer import MethodLinear
from sltrain_ds.models.converted import save_converted
from sltrain_ds.report.weights import layers, open_weights


def merged(built):
    """Layer name -> (W, S) by the layer protocol."""
    out = {}
    for name, module in built.named_modules():
        if isinstance(module, MethodLinear):
            out[name] = module.dense_weight().float().numpy(), module.dense_sparse()
    return out


@pytest.mark.parametrize("method", ["sltrain", "low_rank"])
@pytest.mark.parametrize("form", ["checkpoint", "converted"])
def test_parts_of_trained_layers(tmp_path, method, form):
    built = model(method)
    if form == "checkpoint":
        save_checkpoint(tmp_path, built, method)
    else:
        save_converted(built, tmp_path / "export", METHODS[method])
    found = list(layers(tmp_path))
    expected = merged(built)
    assert [layer.name for layer in found] == list(expected) and len(found) == 14
    for layer in found:
        W, S = expected[layer.name]
        np.testing.assert_array_equal(layer.W, W)
        if method == "sltrain":
            np.testing.assert_array_equal(layer.sparse, S.numpy())
            np.testing.assert_allclose(
                layer.low_rank + layer.sparse, W, rtol=0.0, atol=of_sum(torch.float32, 2, abs(W).max())
            )
            assert np.linalg.matrix_rank(layer.low_rank, tol=1e-5) == 4
        else:
            assert layer.sparse is None and layer.low_rank is not None


def test_stored_supports_are_read(tmp_path):
    built = model()
    layer = built.get_submodule("model.layers.0.mlp.up_proj")
    # another support than the seed's: its non-zeros in the last rows
    dense = torch.zeros(layer.out_features * layer.in_features, dtype=torch.bool)
    dense[-layer.nnz :] = True
    dense = dense.view(layer.out_features, layer.in_features)
    rows = torch.cat([torch.zeros(1, dtype=torch.int64), dense.sum(1).cumsum(0)])
    layer.set_stored_support(rows, dense.nonzero()[:, 1])
    save_checkpoint(tmp_path, built)
    found = {layer.name: layer for layer in layers(tmp_path)}["model.layers.0.mlp.up_proj"]
    np.testing.assert_array_equal(found.sparse != 0, dense.numpy())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_plain_models_give_w_alone(tmp_path, dtype):
    built = model("full_rank").to(dtype)
    built.save_pretrained(tmp_path / "export")
    found = {layer.name: layer for layer in layers(tmp_path)}
    assert len(found) == 14 and "lm_head" not in found
    for name, layer in found.items():
        np.testing.assert_array_equal(layer.W, built.get_submodule(name).weight.detach().float().numpy())
        assert layer.low_rank is None and layer.sparse is None


def test_full_rank_checkpoint(tmp_path):
    built = model("full_rank")
    save_checkpoint(tmp_path, built, "full_rank")
    name, W, low_rank, sparse = next(layers(tmp_path))
    np.testing.assert_array_equal(W, built.get_submodule(name).weight.detach().numpy())
    assert low_rank is None and sparse is None


def test_checkpoints_elsewhere(tmp_path):
    save_checkpoint(tmp_path / "elsewhere", model())
    (tmp_path / "run").mkdir()
    folder = tmp_path / "elsewhere" / "checkpoints"
    (tmp_path / "run" / "config.json").write_text(json.dumps({"sltrain": {"checkpoint": {"dir": str(folder)}}}))
    weights, notes = open_weights(tmp_path / "run")
    assert weights.source == folder / "step_00000060" and notes == []


def test_auto_is_no_directory(tmp_path, monkeypatch):
    save_checkpoint(tmp_path, model())
    (tmp_path / "checkpoints").rename(tmp_path / "auto")
    (tmp_path / "run").mkdir()
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run" / "config.json").write_text(json.dumps({"sltrain": {"checkpoint": {"dir": "auto"}}}))
    assert open_weights(tmp_path / "run") == (None, [])


def test_a_damaged_checkpoint_is_told_and_the_export_taken(tmp_path):
    save_checkpoint(tmp_path, model())
    next((tmp_path / "checkpoints").glob("step_*/sltrain.json")).write_text("{")
    model("full_rank").save_pretrained(tmp_path / "export")
    weights, notes = open_weights(tmp_path)
    assert weights.source == tmp_path / "export"
    assert len(notes) == 1 and "sltrain.json" in notes[0]


def test_nothing_saved(tmp_path):
    assert open_weights(tmp_path) == (None, [])
    with pytest.raises(UserError, match="neither a checkpoint nor an export"):
        next(layers(tmp_path))


def test_damaged_safetensors(tmp_path):
    model("full_rank").save_pretrained(tmp_path / "export")
    (tmp_path / "export" / "model.safetensors").write_bytes(b"not that")
    weights, notes = open_weights(tmp_path)
    assert weights is None and "damaged" in notes[0]
