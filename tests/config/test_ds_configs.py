"""The shipped files: the paper's recipes, read on every number of GPUs they are meant for."""

import json
import math
from pathlib import Path

import pytest
import torch
from deepspeed.runtime.lr_schedules import WarmupCosineLR
from transformers import LlamaConfig

from sltrain_ds.config import load
from sltrain_ds.config.block import LlamaFields
from sltrain_ds.config.presets import PRESETS

FOLDER = Path(__file__).resolve().parents[2] / "ds_configs"
SHIPPED = sorted(path.stem for path in FOLDER.glob("*.json"))

# rank, density, alpha, steps, warm-up, states, clipping; learning rate 3e-3, 512 sequences of 256 tokens everywhere
PAPER = {
    "llama_60m": (128, 0.03, 32, 11_000, 1_100, "32bit", 0.0),
    "llama_130m": (256, 0.03, 16, 22_000, 2_200, "32bit", 0.0),
    "llama_350m": (256, 0.03, 16, 65_000, 6_500, "32bit", 0.0),
    "llama_1b": (512, 0.03, 8, 140_000, 10_000, "32bit", 0.0),
    "llama_7b": (1024, 0.05, 8, 150_000, 15_000, "8bit", 1.0),
}
ALSO_7B = {"llama_7b_zero2": 256, "llama_7b_zero3": 256, "llama_7b_2048": 2048, "llama_7b_4096": 4096}
PER_LAYER = {"llama_350m_per_layer": 1, "llama_1b_per_layer": 1, "llama_7b_per_layer": 1}  # sequences a step
PER_LAYER |= {"llama_7b_zero2_per_layer": 512, "llama_7b_zero3_per_layer": 512}


def test_what_is_shipped():
    assert set(SHIPPED) >= {"quickstart", *PAPER, *ALSO_7B, *PER_LAYER}


@pytest.mark.parametrize("name", PER_LAYER)
def test_the_per_layer_recipes_are_the_papers_with_fewer_bytes(name):
    run = load(FOLDER / f"{name}.json", check_files=False)
    size = "_".join(name.split("_")[:2])
    paper = load(FOLDER / f"{size}.json", check_files=False)
    assert (run.train_batch_size, run.sequence_length) == (PER_LAYER[name], 256)
    assert run.zero_stage == (3 if "zero3" in name else 2)
    assert run.sltrain.method == paper.sltrain.method and run.model_fields == paper.model_fields
    for key in ("optimizer", "scheduler"):
        assert run.deepspeed[key] == paper.deepspeed[key]
    block = run.sltrain
    assert (block.per_layer_update, block.clipping, run.gradient_clipping) == (True, "lagged", 1.0)
    assert (block.precision.states, run.weights, block.loss) == ("8bit", "bf16_stochastic", "chunked")
    assert block.model.activation_checkpointing == "non_reentrant"


@pytest.mark.parametrize("world", [1, 2, 4, 8])
@pytest.mark.parametrize("name", [*PAPER, *ALSO_7B])
def test_the_papers_recipes(name, world):
    run = load(FOLDER / f"{name}.json", world_size=world, check_files=False)
    paper = PAPER.get(name, PAPER["llama_7b"])
    method, scheduler = run.sltrain.method, run.deepspeed["scheduler"]["params"]
    found = (method.rank, method.density, method.alpha, run.sltrain.steps, scheduler["warmup_num_steps"])
    assert (*found, run.sltrain.precision.states, run.gradient_clipping) == paper
    assert run.bf16 and run.sequence_length == ALSO_7B.get(name, 256) and run.tokens_per_step == 512 * 256
    assert run.zero_stage == (3 if name.endswith("zero3") else 2)
    adam = run.deepspeed["optimizer"]["params"]
    assert (adam["lr"], adam["weight_decay"], adam["torch_adam"]) == (3e-3, 0.0, True)
    assert method.lr_scale.model_dump() == {"dense": 1.0, "factors": 1.0, "sparse": 1.0}
    assert scheduler["total_num_steps"] == run.sltrain.steps
    assert run.model_fields == PRESETS["_".join(name.split("_")[:2])]


@pytest.mark.parametrize("world", [1, 2])
def test_quickstart(world):
    run = load(FOLDER / "quickstart.json", world_size=world, check_files=False)
    assert (run.zero_stage, run.bf16, run.sltrain.precision.states) == (2, True, "8bit")
    assert run.sltrain.method.name == "sltrain" and str(run.run_dir) == "runs/quickstart"


@pytest.mark.parametrize("name", SHIPPED)
def test_nothing_is_left_to_plain_deepspeed(name):
    """Plain DeepSpeed knows no "auto", and would build its fused Adam at the start."""
    config = json.loads((FOLDER / f"{name}.json").read_text())
    config.pop("sltrain")
    assert '"auto"' not in json.dumps(config)
    assert config["optimizer"]["params"]["torch_adam"] is True and "gradient_accumulation_steps" not in config
    assert config["$schema"] == "../sltrain_ds/config/sltrain.schema.json"


def test_the_schedule_is_the_papers():
    """A line up to lr over the warm-up, a cosine down to a tenth of it: at most two steps from the formula."""
    run = load(FOLDER / "llama_60m.json", check_files=False)
    steps, warmup = run.sltrain.steps, 1_100
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=3e-3)
    scheduler = WarmupCosineLR(optimizer, **run.deepspeed["scheduler"]["params"])
    rates = []
    for _ in range(steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert rates[:3] == [0.0, 0.0, pytest.approx(3e-3 / warmup)]
    for step, rate in enumerate(rates):
        cosine = 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))
        formula = 3e-3 * (step / warmup if step < warmup else cosine)
        assert rate == pytest.approx(formula, abs=2 * 3e-3 / warmup)
    assert max(rates) == pytest.approx(3e-3, rel=1e-4) and rates[-1] == pytest.approx(3e-4, rel=1e-4)


def test_the_models_fields_are_llamaconfigs():
    """Names and defaults of `sltrain.model.config` agree with transformers."""
    defaults = LlamaConfig()
    for name, field in LlamaFields.model_fields.items():
        assert hasattr(defaults, name), name
        theirs = {"num_key_value_heads": None, "head_dim": None, "rope_parameters": None, "use_cache": False}
        if not field.is_required():
            assert field.default == theirs.get(name, getattr(defaults, name)), name
    for fields in PRESETS.values():
        LlamaFields.model_validate(fields)
