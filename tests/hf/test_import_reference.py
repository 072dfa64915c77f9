"""Reference checkpoints become converted directories with the same logits."""

import json

import pytest
import torch
from bounds import same_logits
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

from sltrain_ds.cli import main
from sltrain_ds.errors import UserError
from sltrain_ds.hf.import_reference import import_sltrain
from sltrain_ds.models.converted import is_converted, load_converted, save_converted

RANK, ALPHA, DENSITY = 4, 6.0, 0.07
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
CONFIG = {
    "vocab_size": 61,
    "hidden_size": 24,
    "intermediate_size": 38,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "max_position_embeddings": 64,
}


def dense_model(**changes):
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**CONFIG, **changes)).eval()


def reference_state(model, targets=TARGETS, rank=RANK, alpha=ALPHA, density=DENSITY, dtype=torch.float32):
    """Random factors and sparse values as the reference code names them; the model's own weights become its formula."""
    generator = torch.Generator().manual_seed(1)
    state = {}
    for name, weight in model.state_dict().items():
        layer = name.removesuffix(".weight")
        if not layer.endswith(targets):
            state[name] = weight.to(dtype).clone()
            continue
        rows, columns = weight.shape
        B = torch.randn(rows, rank, generator=generator).to(dtype) / 8
        A = torch.randn(rank, columns, generator=generator).to(dtype) / 8
        index = torch.randperm(rows * columns, generator=generator)[: int(density * rows * columns)]
        value = torch.randn(len(index), generator=generator).to(dtype) / 8
        W = (alpha / rank * B.float() @ A.float()).flatten().scatter_add_(0, index, value.float()).view(rows, columns)
        weight.copy_(W)
        parts = {"lora_A": A, "lora_B": B, "sparse_value": value, "sparse_index": index}
        state |= {f"{layer}.{part}": tensor for part, tensor in parts.items()}
    return state


def write(folder, model, state, said=None, file="pytorch_model.bin"):
    folder.mkdir(exist_ok=True)
    model.config.save_pretrained(folder)
    if file.endswith(".bin"):
        torch.save(state, folder / file)
    else:
        save_file(state, folder / file, metadata={"format": "pt"})
    if said is not None:
        (folder / "training_state.json").write_text(json.dumps(said))
    return folder


def logits(model):
    torch.manual_seed(2)
    with torch.no_grad():
        return model.eval()(torch.randint(0, 61, (2, 17))).logits


@pytest.fixture
def dense():
    return dense_model()


@pytest.fixture
def state(dense):
    return reference_state(dense)


@pytest.mark.parametrize("file", ["pytorch_model.bin", "model.safetensors"])
def test_logits_equal_the_formulas(tmp_path, dense, state, file):
    source = write(tmp_path / "source", dense, state, {"r": RANK, "lora_alpha": ALPHA, "global_step": 7}, file)
    method = import_sltrain(source, tmp_path / "out")
    assert (method["density"], method["alpha"]) == (DENSITY, ALPHA)
    assert method["target_modules"] == ["self_attn", "mlp"]
    model = load_converted(tmp_path / "out")
    layer = model.model.layers[1].mlp.down_proj
    assert type(layer).__name__ == "SLTrainLinear" and layer.support_info()["kind"] == "stored"
    same_logits(logits(model), logits(dense), CONFIG)


def test_wrapped_names_a_part_of_the_layers_tied_head_and_bias(tmp_path):
    dense = dense_model(tie_word_embeddings=True, attention_bias=True)
    state = reference_state(dense, targets=("q_proj", "v_proj"))
    state.pop("lm_head.weight")
    state = {f"module.wrapped_model.{name}": tensor for name, tensor in state.items()}
    state["module.wrapped_model.model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    source = write(tmp_path / "source", dense, state, {"splora": {"lora_r": RANK, "lora_alpha": 6}})
    method = import_sltrain(source, tmp_path / "out", rank=RANK)
    assert method["target_modules"] == ["q_proj", "v_proj"]
    model = load_converted(tmp_path / "out")
    assert model.lm_head.weight is model.model.embed_tokens.weight
    same_logits(logits(model), logits(dense), CONFIG)


def test_bf16_stays_bf16(tmp_path, dense):
    state = reference_state(dense, dtype=torch.bfloat16)
    import_sltrain(write(tmp_path / "source", dense, state), tmp_path / "out", alpha=ALPHA)
    model = load_converted(tmp_path / "out")
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    name = "model.layers.0.mlp.up_proj"
    assert torch.equal(model.get_submodule(name).A, state[f"{name}.lora_A"])
    torch.testing.assert_close(model.get_submodule(name).float().dense_weight(), dense.get_submodule(name).weight)


def test_the_command_copies_the_tokenizer_and_a_converted_model_saves_again(tmp_path, dense, state, capsys):
    source = write(tmp_path / "source", dense, state)
    (source / "tokenizer_config.json").write_text("{}")
    (source / "vocab.json").write_text('{"r": 5, "lora_alpha": 3}')  # tokens, not settings
    assert main(["import", str(source), str(tmp_path / "out"), "--from", "sltrain", "--alpha", "6"]) == 0
    assert "rank 4, density 0.07, alpha 6.0" in capsys.readouterr().out
    assert (tmp_path / "out" / "tokenizer_config.json").exists()
    model = load_converted(tmp_path / "out")
    method = json.loads((tmp_path / "out" / "sltrain_method.json").read_text())["method"]
    save_converted(model, tmp_path / "again", method)
    assert torch.equal(logits(load_converted(tmp_path / "again")), logits(model))


def test_generated_supports_are_drawn_again_and_checked(tmp_path, dense):
    from sltrain_ds import SLTrainConfig, convert

    method = {"name": "sltrain", "rank": 3, "density": 0.1, "alpha": 2, "lr_scale": {"dense": 1.0}}
    model = convert(dense, SLTrainConfig(rank=3, density=0.1, alpha=2))
    save_converted(model, tmp_path / "out", method)
    assert torch.equal(logits(load_converted(tmp_path / "out")), logits(model))
    file = tmp_path / "out" / "sltrain_method.json"
    content = json.loads(file.read_text())
    content["method"]["support_seed"] = 1
    file.write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"support of model.layers.0.self_attn.q_proj has checksum"):
        load_converted(tmp_path / "out")


class Evil:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return (open, (str(self.marker), "w"))


Q = "model.layers.0.self_attn.q_proj"


def swap(state, part, change):
    return {**state, f"{Q}.{part}": change(state[f"{Q}.{part}"])}


def put(position, value):
    return lambda index: index.clone().index_fill_(0, torch.tensor(position), value)


def without(state, *ends):
    return {name: tensor for name, tensor in state.items() if not name.endswith(ends)}


LAYER = ("lora_A", "lora_B", "sparse_value", "sparse_index")
BAD = {
    "duplicate": (lambda s: swap(s, "sparse_index", put([3, 4], 9)), "twice"),
    "too large": (lambda s: swap(s, "sparse_index", put([3], 24 * 24)), "out of range"),
    "negative": (lambda s: swap(s, "sparse_index", put([3], -1)), "out of range"),
    "int32 index": (lambda s: swap(s, "sparse_index", lambda t: t.int()), "in torch.int32"),
    "fewer values": (lambda s: swap(s, "sparse_value", lambda t: t[1:]), "39 values and 40 positions"),
    "another rank": (lambda s: swap(s, "lora_B", lambda t: t[:, 1:].contiguous()), r"expected \(4, 24\) and \(24, 4\)"),
    "another width": (lambda s: swap(s, "lora_A", lambda t: t[:, 1:].contiguous()), r"lora_A \(4, 23\)"),
    "part missing": (lambda s: without(s, f"{Q}.sparse_value"), f"{Q} lacks sparse_value"),
    "layer missing": (lambda s: without(s, *(f"{Q}.{part}" for part in LAYER)), f"lacks {Q}.weight"),
    "norm missing": (lambda s: without(s, "model.norm.weight"), "lacks model.norm.weight"),
    "unknown key": (lambda s: {**s, "model.extra.weight": torch.ones(2)}, "holds model.extra.weight"),
    "unknown layer": (lambda s: {**s, **{f"extra.{part}": s[f"{Q}.{part}"] for part in LAYER}}, "linear layer extra"),
    "dense beside": (lambda s: {**s, f"{Q}.weight": torch.ones(24, 24)}, "dense weight beside"),
    "plain model": (lambda s: without(s, *LAYER), "holds no lora_A"),
    "not a dict": (lambda s: [torch.ones(2)], "not a state dict"),
    "unlike density": (
        lambda s: swap(swap(s, "sparse_index", lambda t: t[:9]), "sparse_value", lambda t: t[:9]),
        "different densities",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_be_imported_is_named(tmp_path, dense, state, case):
    change, message = BAD[case]
    source = write(tmp_path / "source", dense, change(state))
    with pytest.raises(UserError, match=message) as error:
        import_sltrain(source, tmp_path / "out", alpha=ALPHA)
    assert str(source) in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "out").exists() and [p.name for p in tmp_path.iterdir()] == ["source"]


def test_a_pickle_that_runs_code_is_refused(tmp_path, dense, state, capsys):
    marker = tmp_path / "ran"
    source = write(tmp_path / "source", dense, {**state, "more": Evil(marker)})
    assert main(["import", str(source), str(tmp_path / "out"), "--from", "sltrain", "--alpha", "6"]) == 2
    assert not marker.exists()
    line = capsys.readouterr().err
    assert "pytorch_model.bin: refused" in line and line.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere", "out"], "nowhere: no such directory"),
        (["source", "out", "--from", "relora"], "--from relora: not known"),
        (["source", "out"], "give --alpha"),
        (["source", "out", "--alpha", "6", "--rank", "5"], "rank is 5 by --rank, 4 by the weights"),
        (["said", "out", "--alpha", "7"], "alpha is 7.0 by --alpha, 6.0 by training_state.json"),
        (["empty", "out"], "holds neither model.safetensors nor pytorch_model.bin"),
        (["cut", "out", "--alpha", "6"], "pytorch_model.bin: .*damaged"),
        (["noconfig", "out", "--alpha", "6"], "config.json: no such file"),
        (["oddconfig", "out", "--alpha", "6"], "config.json: not a config that transformers knows"),
        (["source", "full", "--alpha", "6"], "full: exists and is not an empty directory"),
    ],
)
def test_bad_arguments_and_directories(tmp_path, dense, state, capsys, monkeypatch, arguments, message):
    import re

    monkeypatch.chdir(tmp_path)
    write(tmp_path / "source", dense, state)
    write(tmp_path / "said", dense, state, {"lora_alpha": ALPHA})
    (tmp_path / "empty").mkdir()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    cut = write(tmp_path / "cut", dense, state) / "pytorch_model.bin"
    cut.write_bytes(cut.read_bytes()[:5000])
    (write(tmp_path / "noconfig", dense, state) / "config.json").unlink()
    (write(tmp_path / "oddconfig", dense, state) / "config.json").write_text('{"model_type": "abacus"}')
    origin = [] if "--from" in arguments else ["--from", "sltrain"]
    assert main(["import", *arguments, *origin]) == 2
    line = capsys.readouterr().err
    assert re.search(message, line) and line.count("\n") == 1, line
    assert not (tmp_path / "out").exists()


def test_a_damaged_converted_directory_is_named(tmp_path, dense, state):
    out = tmp_path / "out"
    import_sltrain(write(tmp_path / "source", dense, state), out, alpha=ALPHA)
    assert is_converted(out) and not is_converted(tmp_path / "source")
    weights = (out / "model.safetensors").read_bytes()
    for file, content, message in [
        ("sltrain_method.json", b"{", "sltrain_method.json: damaged"),
        ("sltrain_method.json", b'{"format": 2}', "format 2 is not 1"),
        ("model.safetensors", weights[:900], "model.safetensors: damaged"),
    ]:
        before = (out / file).read_bytes()
        (out / file).write_bytes(content)
        with pytest.raises(UserError, match=message):
            load_converted(out)
        (out / file).write_bytes(before)
