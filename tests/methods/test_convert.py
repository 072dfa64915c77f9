import pytest
import torch
from torch import nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from sltrain_ds import SLTrainConfig, SLTrainLinear, convert
from sltrain_ds.errors import UserError
from sltrain_ds.methods.layer import MethodLinear
from sltrain_ds.methods.registry import get
from sltrain_ds.ops import workspace

SMALL = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 64,
}
NEOX = {key: value for key, value in SMALL.items() if key != "num_key_value_heads"}
CONFIG = SLTrainConfig(rank=4, density=0.1, alpha=8)
MLP_AND_ATTENTION = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"]
MLP_AND_ATTENTION += ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]
ARCHITECTURES = {
    "llama": (lambda: LlamaForCausalLM(LlamaConfig(**SMALL)), "model.layers", MLP_AND_ATTENTION),
    "qwen2": (lambda: Qwen2ForCausalLM(Qwen2Config(**SMALL)), "model.layers", MLP_AND_ATTENTION),
    "qwen3": (lambda: Qwen3ForCausalLM(Qwen3Config(**SMALL, head_dim=8)), "model.layers", MLP_AND_ATTENTION),
    "gpt_neox": (
        lambda: GPTNeoXForCausalLM(GPTNeoXConfig(**NEOX)),
        "gpt_neox.layers",
        ["attention.query_key_value", "attention.dense", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h"],
    ),
}


def llama(**change):
    return LlamaForCausalLM(LlamaConfig(**{**SMALL, **change}))


def converted_names(model):
    return {name for name, module in model.named_modules() if isinstance(module, MethodLinear)}


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("method", ["sltrain", "low_rank"])
def test_architectures_convert_run_and_train(name, method):
    build, prefix, children = ARCHITECTURES[name]
    model = build()
    linears = {
        n: (m.in_features, m.out_features, m.bias is not None) for n, m in model.named_modules() if type(m) is nn.Linear
    }
    config = CONFIG if method == "sltrain" else get(method)(rank=4, alpha=8)
    assert convert(model, config) is model
    assert converted_names(model) == {f"{prefix}.{i}.{child}" for i in range(2) for child in children}
    for module_name in converted_names(model):
        layer = model.get_submodule(module_name)
        assert layer.layer_name == module_name
        assert (layer.in_features, layer.out_features, layer.bias is not None) == linears[module_name]
    ids = torch.randint(0, 64, (2, 8))
    model(input_ids=ids, labels=ids).loss.backward()
    for module_name in converted_names(model):
        layer = model.get_submodule(module_name)
        trained = layer.B if method == "low_rank" else layer.S_values
        assert trained.grad.abs().sum() > 0


def test_layers_differ_and_rebuild_the_same():
    one, two = convert(llama(), CONFIG), convert(llama(), CONFIG)
    infos = [
        {n: m.support_info()["checksum"] for n, m in model.named_modules() if isinstance(m, SLTrainLinear)}
        for model in (one, two)
    ]
    assert infos[0] == infos[1] and len(set(infos[0].values())) == len(infos[0]) == 14


def test_meta_models_convert_and_materialise():
    with torch.device("meta"):
        model = llama()
    convert(model, CONFIG)
    assert all(p.is_meta for p in model.parameters()) and len(converted_names(model)) == 14
    ids = torch.zeros(2, 8, dtype=torch.long, device="meta")
    assert model(input_ids=ids).logits.shape == (2, 8, 64)
    model.to_empty(device="cpu")
    plain = convert(llama(), CONFIG)
    for name in converted_names(model):
        layer = model.get_submodule(name)
        layer.reset_parameters(torch.Generator().manual_seed(0))
        assert layer.support_info() == plain.get_submodule(name).support_info()
        layer(torch.randn(2, layer.in_features))


def test_dtype_and_training_mode_are_kept():
    model = convert(llama().bfloat16().eval(), CONFIG)
    layer = model.model.layers[0].mlp.up_proj
    assert layer.A.dtype == layer.S_values.dtype == torch.bfloat16 and not layer.training


def test_targets_by_component_and_path():
    model = convert(llama(), SLTrainConfig(rank=4, density=0.1, alpha=8, target_modules=("mlp.down_proj", "q_proj")))
    assert converted_names(model) == {
        f"model.layers.{i}.{c}" for i in (0, 1) for c in ("mlp.down_proj", "self_attn.q_proj")
    }


def test_full_rank_leaves_the_model_as_it_is():
    model = llama()
    before = dict(model.named_parameters())
    assert convert(model, get("full_rank")()) is model
    assert all(p is before[name] for name, p in model.named_parameters()) and not converted_names(model)


def test_model_trains_with_both_kinds_of_checkpointing():
    model, ids = convert(llama(), CONFIG), torch.randint(0, 64, (2, 8))
    grads = []
    for reentrant in (None, True, False):
        if reentrant is not None:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        grads.append({n: p.grad.clone() for n, p in model.named_parameters()})
    workspace.release()
    for other in grads[1:]:
        assert all(torch.equal(grads[0][n], other[n]) for n in grads[0])


class ConvertedLlama(LlamaForCausalLM):
    def __init__(self, config):
        super().__init__(config)
        convert(self, CONFIG)


def test_save_pretrained_and_from_pretrained(tmp_path):
    model = convert(llama(), CONFIG)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.02)
    model.save_pretrained(tmp_path)
    ids = torch.randint(0, 64, (2, 8))
    expected = model(input_ids=ids).logits
    again, loading = ConvertedLlama.from_pretrained(tmp_path, output_loading_info=True)
    assert not loading["missing_keys"] and not loading["unexpected_keys"]
    layer, original = again.model.layers[1].mlp.up_proj, model.model.layers[1].mlp.up_proj
    assert torch.equal(again(input_ids=ids).logits, expected)
    assert layer.support_info() == original.support_info()


def test_gpt2_conv1d_is_refused():
    model = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=64))
    for targets in (("attn",), None):
        with pytest.raises(UserError, match=r"transformer\.h\.0\.\S+ is a Conv1D"):
            convert(model, SLTrainConfig(rank=4, density=0.1, alpha=8, target_modules=targets))


def test_fused_experts_are_refused():
    model = MixtralForCausalLM(MixtralConfig(**SMALL, num_local_experts=2, num_experts_per_tok=1))
    with pytest.raises(UserError, match=r"model\.layers\.0\.\S+ holds fused experts in one 3-D parameter"):
        convert(model, CONFIG)
    only_attention = SLTrainConfig(rank=4, density=0.1, alpha=8, target_modules=("self_attn",))
    assert len(converted_names(convert(model, only_attention))) == 8


def test_tied_targets_are_refused():
    with pytest.raises(UserError, match=r"lm_head\.weight is tied to another parameter"):
        convert(
            llama(tie_word_embeddings=True), SLTrainConfig(rank=4, density=0.1, alpha=8, target_modules=("lm_head",))
        )
    model = llama()
    model.model.layers[1].mlp.up_proj = model.model.layers[0].mlp.up_proj
    with pytest.raises(UserError, match=r"up_proj\.weight is tied"):
        convert(model, CONFIG)
    with torch.device("meta"):
        model = llama(tie_word_embeddings=True)
    with pytest.raises(UserError, match=r"lm_head\.weight is tied to another parameter"):
        convert(model, SLTrainConfig(rank=4, density=0.1, alpha=8, target_modules=("lm_head",)))


def test_quantised_linears_are_refused():
    class Linear8bit(nn.Linear):
        pass

    model = llama()
    model.model.layers[0].mlp.up_proj = Linear8bit(32, 48)
    with pytest.raises(UserError, match=r"model\.layers\.0\.mlp\.up_proj is a Linear8bit"):
        convert(model, CONFIG)


def test_patterns_that_match_nothing_are_named_with_what_there_is():
    for targets, missing in ((("attention",), r"\['attention'\]"), (("mlp", "k_projj"), r"\['k_projj'\]")):
        with pytest.raises(UserError, match=rf"target_modules {missing} match no nn.Linear.*down_proj.*lm_head"):
            convert(llama(), SLTrainConfig(rank=4, density=0.1, alpha=8, target_modules=targets))
    with pytest.raises(UserError, match=r"list of names, not the string 'mlp'"):
        convert(llama(), SLTrainConfig(rank=4, density=0.1, alpha=8, target_modules="mlp"))
    with pytest.raises(UserError, match=r"no nn\.Linear.*none at all"):
        convert(nn.ReLU(), CONFIG)


def test_converting_twice_is_refused():
    model = convert(llama(), CONFIG)
    with pytest.raises(UserError, match=r"q_proj is a SLTrainLinear already"):
        convert(model, CONFIG)


def test_nothing_is_converted_when_something_is_refused():
    model = llama()
    with pytest.raises(
        UserError, match=r"rank = 20 exceeds min\(in, out\) = 16 of model\.layers\.0\.self_attn\.k_proj"
    ):
        convert(model, SLTrainConfig(rank=20, density=0.1, alpha=8))
    assert not converted_names(model)
