"""The word "auto" is resolved where Hugging Face users expect it, and remembered."""

import pytest

from sltrain_ds.config import from_dict


def test_every_auto(good):
    good |= {
        "gradient_clipping": "auto",
        "gradient_accumulation_steps": "auto",
        "bf16": {"enabled": "auto"},
        "fp16": {"enabled": "auto"},
        "checkpoint": {"use_node_local_storage": "auto"},
        "optimizer": {"type": "AdamW", "params": dict.fromkeys(("lr", "betas", "eps", "weight_decay"), "auto")},
        "zero_optimization": {
            "stage": 3,
            "reduce_bucket_size": "auto",
            "stage3_prefetch_bucket_size": "auto",
            "stage3_param_persistence_threshold": "auto",
        },
    }
    good["scheduler"]["params"] = {
        "total_num_steps": "auto",
        "warmup_num_steps": "auto",
        "warmup_min_ratio": "auto",
        "cos_min_ratio": "auto",
    }
    run = from_dict(good, world_size=2, name="some/where/my_run.json")
    config = run.deepspeed
    assert config["gradient_clipping"] == run.gradient_clipping == 1.0
    assert run.accumulation == config["gradient_accumulation_steps"] == 8
    assert run.bf16 is True and config["fp16"] == {"enabled": False}
    assert config["checkpoint"] == {"use_node_local_storage": False}
    assert config["optimizer"]["params"] == {"lr": 3e-3, "betas": [0.9, 0.999], "eps": 1e-8, "weight_decay": 0.0}
    assert config["scheduler"]["params"] == {
        "total_num_steps": 11000,
        "warmup_num_steps": 1100,
        "warmup_min_ratio": 0.0,
        "cos_min_ratio": 0.1,
    }
    zero = config["zero_optimization"]
    assert zero["reduce_bucket_size"] == 512**2
    assert zero["stage3_prefetch_bucket_size"] == int(0.9 * 512**2)
    assert zero["stage3_param_persistence_threshold"] == 5120
    assert str(run.run_dir) == "runs/my_run" and str(run.checkpoint_dir) == "runs/my_run/checkpoints"
    assert run.sltrain.precision.backend == "ours"
    assert run.resolved["optimizer.params.lr"] == 3e-3 and run.resolved["sltrain.run_dir"] == "runs/my_run"
    written = run.to_json()
    assert written["sltrain"]["checkpoint"].pop("dir") == "auto"  # it goes with run_dir
    assert written["sltrain"].pop("op_mode") == "auto"  # each layer chooses by its shape and tokens
    assert "auto" not in str(written)


def test_warmup_takes_the_optimizers_rate(good):
    good["optimizer"]["params"]["lr"] = 0.01
    params = {"warmup_min_lr": "auto", "warmup_max_lr": "auto", "warmup_num_steps": "auto"}
    good["scheduler"] = {"type": "WarmupLR", "params": params}
    run = from_dict(good, ["sltrain.steps=5"])
    assert run.deepspeed["scheduler"]["params"] == {"warmup_min_lr": 0.0, "warmup_max_lr": 0.01, "warmup_num_steps": 1}


def test_a_bucket_left_out_is_one_transformer_block(good):
    del good["zero_optimization"]["reduce_bucket_size"]
    run = from_dict(good)
    assert run.deepspeed["zero_optimization"]["reduce_bucket_size"] == 4 * 512 * 512 + 3 * 512 * 1376


@pytest.mark.parametrize(
    "bf16, weights, means",
    [(True, "auto", "fp32_master"), (True, "bf16", "bf16"), (False, "auto", "fp32"), (False, "fp32", "fp32")],
)
def test_weights(good, bf16, weights, means):
    good["bf16"] = {"enabled": bf16}
    good["sltrain"]["precision"] = {"weights": weights}
    run = from_dict(good)
    assert run.weights == means and run.sltrain.precision.backend == "torch"


@pytest.mark.parametrize(
    "precision, weights, backend",
    [
        ({"states": "8bit"}, "bf16_stochastic", "ours"),
        ({"states": "4bit"}, "bf16_stochastic", "ours"),
        ({"states": "8bit", "weights": "fp32_master"}, "fp32_master", "ours"),
        ({"states": "8bit", "weights": "bf16"}, "bf16", "ours"),
        ({"states": "8bit", "backend": "bitsandbytes"}, "fp32_master", "bitsandbytes"),
    ],
)
def test_weights_under_narrow_states(good, precision, weights, backend):
    good["sltrain"]["precision"] = precision
    run = from_dict(good)
    assert (run.weights, run.sltrain.precision.backend) == (weights, backend)


def test_narrow_states_without_bf16(good):
    good["bf16"] = {"enabled": False}
    assert from_dict(good).weights == "fp32"


def test_whole_numbers_in_scientific_form(good):
    good["zero_optimization"]["reduce_bucket_size"] = 5e8
    size = from_dict(good).deepspeed["zero_optimization"]["reduce_bucket_size"]
    assert size == 500_000_000 and isinstance(size, int)


def test_the_optimizers_spelling_is_deepspeeds(good):
    good["optimizer"]["type"] = "adamw"
    assert from_dict(good).deepspeed["optimizer"]["type"] == "AdamW"
