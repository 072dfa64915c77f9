"""What goes with the per-layer update, and what is refused beside it in one line."""

import pytest

from sltrain_ds.config import from_dict
from sltrain_ds.errors import UserError


@pytest.fixture
def per_layer(good):
    good["sltrain"] |= {"per_layer_update": True, "clipping": "lagged"}
    good["gradient_clipping"] = 1.0
    good["zero_optimization"] = {"stage": 2}
    return good


@pytest.mark.parametrize("stage", [2, 3])
@pytest.mark.parametrize(("clipping", "bound"), [("lagged", 1.0), ("per_layer", 0.5), ("lagged", 0.0), ("global", 0.0)])
def test_what_works(per_layer, stage, clipping, bound):
    per_layer["zero_optimization"]["stage"] = stage
    per_layer["sltrain"]["clipping"] = clipping
    per_layer["gradient_clipping"] = bound
    run = from_dict(per_layer)
    assert run.sltrain.per_layer_update and run.sltrain.clipping == clipping
    assert from_dict(run.to_json()) == run


REFUSED = {
    "stage 0": (
        ("zero_optimization", "stage", 0),
        ["sltrain.per_layer_update", "zero_optimization.stage", "set it to 2"],
    ),
    "stage 1": (("zero_optimization", "stage", 1), ["sltrain.per_layer_update", "zero_optimization.stage", "got 1"]),
    "global clipping": (("sltrain", "clipping", "global"), ["sltrain.clipping", "gradient_clipping 1", '"lagged"']),
    "per-layer clipping alone": (("sltrain", "per_layer_update", False), ["sltrain.clipping", "per_layer_update true"]),
    "W and dW of a step": (("sltrain", "op_mode", "keep_step"), ["sltrain.op_mode", "per_layer_update", '"auto"']),
    "no scatter": (("zero_optimization", "reduce_scatter", False), ["zero_optimization.reduce_scatter", "remove it"]),
    "scattered gradients": (
        ("zero_optimization", "contiguous_gradients", False),
        ["contiguous_gradients", "remove it"],
    ),
    "unused parameters": (
        ("zero_optimization", "ignore_unused_parameters", False),
        ["zero_optimization.ignore_unused_parameters", "remove it"],
    ),
    "prescaled": (("prescale_gradients", None, True), ["prescale_gradients", "remove it"]),
    "predivided": (("gradient_predivide_factor", None, 2.0), ["gradient_predivide_factor", "remove it"]),
    "fp16": (("fp16", "enabled", True), ["fp16.enabled", "bf16.enabled true"]),
    "skipped steps": (("bf16", "check_grad_overflow", True), ["bf16.check_grad_overflow", "remove it"]),
    "offload": (("zero_optimization", "offload_optimizer", {"device": "cpu"}), ["offload_optimizer", '"8bit"']),
    "accumulation by the caller": (("managed_gradient_accumulation", None, False), ["managed_gradient_accumulation"]),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not(per_layer, name):
    (block, key, value), words = REFUSED[name]
    if key is None:
        per_layer[block] = value
    else:
        per_layer.setdefault(block, {})[key] = value
    with pytest.raises(UserError) as error:
        from_dict(per_layer)
    (line,) = str(error.value).splitlines()
    for word in words:
        assert word in line, line
