"""Exported models are plain Hugging Face models with the run's own loss."""

import json
import math
import re
from types import SimpleNamespace

import pytest
import torch
from bounds import same_logits
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from sltrain_ds.checkpoint.step_folders import STATE_FILE
from sltrain_ds.cli import main
from sltrain_ds.config.block import SLTrainBlock
from sltrain_ds.errors import UserError
from sltrain_ds.hf.export import export
from sltrain_ds.methods.supports import supports
from sltrain_ds.models.build import build

CONFIG = {
    "vocab_size": 97,
    "hidden_size": 36,
    "intermediate_size": 50,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "max_position_embeddings": 64,
}
METHODS = {
    "sltrain": {"name": "sltrain", "rank": 5, "density": 0.07, "alpha": 10},
    "low_rank": {"name": "low_rank", "rank": 5, "alpha": 10},
    "full_rank": {"name": "full_rank"},
}


def block(method="sltrain", **model):
    return {
        "model": model or {"config": CONFIG},
        "method": METHODS[method],
        "tokenizer": "nowhere",
        "data": {"dir": "nowhere"},
        "steps": 9,
    }


def trained(settings, bf16=False):
    """A model of the settings whose tensors all hold something."""
    model = build(SimpleNamespace(sltrain=SLTrainBlock.model_validate(settings), bf16=bf16)).eval()
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model


def write(folder, model, settings, stage=2, world=1):
    """The checkpoint of `model` in DeepSpeed's layout: whole at stage 2, sliced over `world` ranks at stage 3."""
    step = folder / "step_00000009"
    step.mkdir(parents=True)
    parameters = dict(model.named_parameters())
    buffers = sorted(set(model.state_dict()) - set(dict(model.named_parameters(remove_duplicate=False))))
    if stage == 2:
        torch.save({"module": model.state_dict(), "buffer_names": buffers}, step / "mp_rank_00_model_states.pt")
    for rank in range(world if stage == 3 else 0):
        slices = []
        for parameter in parameters.values():
            length = math.ceil(parameter.numel() / world)
            flat = parameter.detach().float().flatten()
            padded = torch.nn.functional.pad(flat, (0, length * world - len(flat)))
            slices.append(padded[rank * length : (rank + 1) * length])
        module = {name: t if name in buffers else t.new_empty(0) for name, t in model.state_dict().items()}
        states = {"module": module, "buffer_names": buffers, "shared_params": {}, "frozen_param_shapes": {}}
        states["param_shapes"] = [{name: parameter.shape for name, parameter in parameters.items()}]
        torch.save(states, step / f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt")
        flat = {"optimizer_state_dict": {"fp32_flat_groups": [torch.cat(slices)]}}
        torch.save(flat, step / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt")
    state = {"format": 1, "config": {"sltrain": settings}, "step": 9, "tokens": 0, "zero_stage": stage}
    (step / STATE_FILE).write_text(json.dumps(state | {"world_size": world, "supports": supports(model)}))
    (folder / "latest").write_text(step.name)
    return step


def logits(model, dtype=torch.float32):
    torch.manual_seed(4)
    with torch.no_grad():
        return model.to(dtype).eval()(torch.randint(0, 97, (2, 19))).logits


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("stage", "world"), [(2, 1), (3, 1), (3, 3)])
def test_plain_transformers_computes_the_same(tmp_path, method, stage, world):
    settings = block(method)
    model = trained(settings)
    write(tmp_path / "run", model, settings, stage, world)
    (tmp_path / "new").touch()
    done = export(tmp_path / "run", tmp_path / "out")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert type(plain).__name__ == "LlamaForCausalLM" and plain.config.use_cache
    assert not [name for name in plain.state_dict() if name.endswith((".A", ".B"))]
    usual = (tmp_path / "new").stat().st_mode
    assert all(file.stat().st_mode == usual for file in (tmp_path / "out").iterdir())
    assert done.parameters == sum(p.numel() for p in plain.parameters()) and done.bytes == 4 * done.parameters
    same_logits(logits(plain), logits(model), CONFIG)


def test_bf16_runs_export_the_weights_they_computed_with(tmp_path):
    settings = block()
    model = trained(settings, bf16=True)
    write(tmp_path / "run", model, settings, stage=3, world=2)
    assert export(tmp_path / "run", tmp_path / "auto").dtype == torch.bfloat16
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "auto")
    assert plain.dtype == torch.bfloat16
    name = "model.layers.1.mlp.down_proj"
    assert torch.equal(plain.get_submodule(name).weight, model.get_submodule(name).dense_weight())
    bf16 = torch.bfloat16
    same_logits(logits(plain, bf16), logits(model, bf16), CONFIG, bf16)


def test_the_wider_type_merges(tmp_path):
    settings = block()
    name = "model.layers.0.self_attn.v_proj"
    for bf16, dtype in ((True, "float32"), (False, "bfloat16")):
        model = trained(settings, bf16)
        write(tmp_path / f"run{bf16}", model, settings)
        export(tmp_path / f"run{bf16}", tmp_path / f"out{bf16}", dtype)
        weight = load_file(tmp_path / f"out{bf16}" / "model.safetensors")[f"{name}.weight"]
        exact = model.get_submodule(name).float().dense_weight()
        assert torch.equal(weight, exact.to(getattr(torch, dtype)))


def test_a_large_model_is_cut_into_files(tmp_path):
    settings = block()
    model = trained(settings)
    write(tmp_path / "run", model, settings)
    done = export(tmp_path / "run", tmp_path / "out", shard_bytes=30_000)
    files = sorted(tmp_path.glob("out/*.safetensors"))
    assert done.files == len(files) > 3 and files[0].name == f"model-00001-of-{len(files):05d}.safetensors"
    assert all(sum(t.nbytes for t in load_file(file).values()) <= 30_000 for file in files)
    same_logits(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out")), logits(model), CONFIG)


def test_tied_weights_are_written_once(tmp_path):
    settings = block(config={**CONFIG, "tie_word_embeddings": True})
    model = trained(settings)
    write(tmp_path / "run", model, settings)
    export(tmp_path / "run", tmp_path / "out")
    assert "lm_head.weight" not in load_file(tmp_path / "out" / "model.safetensors")
    same_logits(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out")), logits(model), CONFIG)


@pytest.mark.parametrize("stage", [2, 3])
def test_stored_supports_and_biases(tmp_path, stage):
    """A run that went on from a converted directory with supports that no seed gives."""
    from sltrain_ds.models.converted import save_converted
    from sltrain_ds.ops import support

    settings = block(config={**CONFIG, "attention_bias": True})
    model = trained(settings)
    for module in model.modules():
        if hasattr(module, "set_stored_support"):
            drawn = support.sample(module.out_features, module.in_features, module.nnz, 12345, "another")
            module.set_stored_support(*drawn)
    save_converted(model, tmp_path / "converted", settings["method"])
    settings = block(path=str(tmp_path / "converted"))
    model = trained(settings)
    write(tmp_path / "run", model, settings, stage, world=stage - 1)
    export(tmp_path / "run", tmp_path / "out")
    same_logits(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out")), logits(model), CONFIG)


def test_a_run_from_a_dense_directory(tmp_path):
    settings = block("full_rank")
    trained(settings).save_pretrained(tmp_path / "dense")
    settings = block("full_rank", path=str(tmp_path / "dense"))
    model = trained(settings)
    write(tmp_path / "run", model, settings)
    export(tmp_path / "run", tmp_path / "out")
    same_logits(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out")), logits(model), CONFIG)


def test_the_command_copies_the_tokenizer_or_says_why_not(tmp_path, tiny, capsys):
    settings = block() | {"tokenizer": str(tiny["tokenizer"])}
    write(tmp_path / "run", trained(settings), settings)
    assert main(["export", str(tmp_path / "run"), str(tmp_path / "out")]) == 0
    said = capsys.readouterr().out
    assert "exported step 9: 0.0M parameters" in said and "tokenizer" not in said
    copied, original = (AutoTokenizer.from_pretrained(place) for place in (tmp_path / "out", tiny["tokenizer"]))
    assert copied("It is a truth").input_ids == original("It is a truth").input_ids
    write(tmp_path / "other", trained(block()), block())
    assert main(["export", str(tmp_path / "other"), str(tmp_path / "bare")]) == 0
    assert "no tokenizer was copied" in capsys.readouterr().out


def edit(step, change):
    state = json.loads((step / STATE_FILE).read_text())
    change(state)
    (step / STATE_FILE).write_text(json.dumps(state))


def other_checksum(step):
    edit(step, lambda state: state["supports"]["model.layers.0.mlp.up_proj"].update(checksum=1))


def lost_support(step):
    edit(step, lambda state: state["supports"].pop("model.layers.0.mlp.up_proj"))


def other_seed(step):
    edit(step, lambda state: state["config"]["sltrain"].update(method=METHODS["sltrain"] | {"support_seed": 7}))


def other_method(step):
    edit(step, lambda state: state["config"]["sltrain"].update(method=METHODS["full_rank"]))


def other_rank(step):
    edit(step, lambda state: state["config"]["sltrain"].update(method=METHODS["sltrain"] | {"rank": 6}))


def fewer_layers(step):
    config = {"config": CONFIG | {"num_hidden_layers": 1}}
    edit(step, lambda state: state["config"]["sltrain"].update(model=config))


def unknown_method(step):
    edit(step, lambda state: state["config"]["sltrain"].update(method={"name": "magic"}))


def no_model(step):
    edit(step, lambda state: state["config"]["sltrain"].pop("model"))


def lost_path(step):
    edit(step, lambda state: state["config"]["sltrain"].update(model={"path": "gone"}))


def incomplete(step):
    (step / STATE_FILE).unlink()


def damaged(step):
    file = step / "mp_rank_00_model_states.pt"
    file.write_bytes(file.read_bytes()[:-2000])


def flipped(step):
    file = step / "mp_rank_00_model_states.pt"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def full(step):
    (step.parents[1] / "out").mkdir()
    (step.parents[1] / "out" / "file").touch()


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (other_checksum, "sltrain.json: support of model.layers.0.mlp.up_proj has checksum 1, drawn was"),
        (lost_support, "support of model.layers.0.mlp.up_proj has checksum None"),
        (other_seed, "support of model.layers.0.self_attn.q_proj has checksum"),
        (other_method, "holds no parameter or buffer model.layers.0.self_attn.q_proj.weight"),
        (other_rank, r"q_proj.A is \(5, 36\), not \(6, 36\)"),
        (fewer_layers, "holds model.layers.1.self_attn.q_proj.A, which is not in its config's model"),
        (unknown_method, "magic"),
        (no_model, r"sltrain.json: its config describes no model \('model'\)"),
        (lost_path, "sltrain.model.path: gone, which the run started from, is missing"),
        (incomplete, "incomplete, it has no sltrain.json"),
        (damaged, "mp_rank_00_model_states.pt: cut short"),
        (flipped, "mp_rank_00_model_states.pt: damaged, .* does not match its checksum"),
        (full, "out: exists and is not an empty directory"),
    ],
)
def test_what_cannot_be_exported_is_said_in_one_line(tmp_path, capsys, spoil, message):
    step = write(tmp_path / "run", trained(block()), block())
    spoil(step)
    before = sorted(path.name for path in tmp_path.iterdir())
    assert main(["export", str(step.parent), str(tmp_path / "out")]) == 2
    line = capsys.readouterr().err
    assert re.search(message, line) and line.count("\n") == 1, line
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_an_unknown_dtype_is_refused(tmp_path):
    write(tmp_path / "run", trained(block()), block())
    with pytest.raises(UserError, match="--dtype float16: not known; choose auto, bfloat16 or float32"):
        export(tmp_path / "run", tmp_path / "out", "float16")
