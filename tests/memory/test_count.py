import pytest

torch = pytest.importorskip("torch")
from transformers import AutoConfig, AutoModelForCausalLM  # noqa: E402

from sltrain_ds.errors import UserError  # noqa: E402
from sltrain_ds.memory.count import Shape, count, targeted  # noqa: E402
from sltrain_ds.methods import registry  # noqa: E402
from sltrain_ds.methods.convert import convert  # noqa: E402
from sltrain_ds.methods.full_rank import FullRankConfig  # noqa: E402
from sltrain_ds.methods.low_rank import LowRankConfig  # noqa: E402
from sltrain_ds.methods.sltrain import SLTrainConfig  # noqa: E402
from sltrain_ds.optim.build import parameter_groups  # noqa: E402

LLAMA = {"vocab_size": 97, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2, "num_attention_heads": 4}
MODELS = {
    "llama": LLAMA,
    "grouped": {**LLAMA, "num_key_value_heads": 2, "head_dim": 16},
    "biases": {**LLAMA, "attention_bias": True, "mlp_bias": True},
    "tied": {**LLAMA, "tie_word_embeddings": True},
    "qwen2": {**LLAMA, "model_type": "qwen2", "num_key_value_heads": 2, "tie_word_embeddings": False},
    "qwen3": {**LLAMA, "model_type": "qwen3", "num_key_value_heads": 2, "head_dim": 12, "tie_word_embeddings": False},
    "mistral": {**LLAMA, "model_type": "mistral", "num_key_value_heads": 2, "tie_word_embeddings": False},
}
METHODS = {
    "sltrain": SLTrainConfig(rank=6, density=0.05, alpha=8, target_modules=("self_attn", "mlp")),
    "low_rank": LowRankConfig(rank=5, alpha=8, target_modules=("mlp.down_proj", "q_proj")),
    "full_rank": FullRankConfig(),
}
METHODS["head too"] = SLTrainConfig(rank=6, density=0.05, alpha=8, target_modules=("mlp", "lm_head"))


def named(config, name):
    """The config as a `sltrain.method` block: the fields and a name."""
    return type("Block", (), {**getattr(config, "__dict__", {}), "name": name})()


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("method", METHODS)
def test_counts_what_the_model_holds(kind, method):
    if (kind, method) == ("tied", "head too"):
        pytest.skip("a tied head cannot be converted")
    config = METHODS[method]
    name = {"head too": "sltrain"}.get(method, method)
    fields = dict(MODELS[kind])
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(fields.pop("model_type", "llama"), **fields))
        model = convert(model, config)
    ours = count(Shape.of(MODELS[kind]), named(config, name))
    assert {t.name: t.shape for t in ours.tensors} == {n: tuple(p.shape) for n, p in model.named_parameters()}

    groups = {g["name"]: sum(p.numel() for p in g["params"]) for g in parameter_groups(model, 1.0, 0.0, object())}
    assert {g: sum(t.numel for t in ts) for g, ts in ours.by_group().items()} == groups

    buffers = [b for n, b in model.named_buffers() if n.endswith(("S_rows", "S_columns"))]
    assert sum(s.bytes for s in ours.supports) == sum(b.numel() * b.element_size() for b in buffers)


def test_every_method_can_be_counted():
    assert {name for name, *_ in METHODS.items()} - {"head too"} == set(registry.METHODS)


def test_wide_inputs_take_int32_columns():
    fields = {**LLAMA, "intermediate_size": 65_540}
    config = SLTrainConfig(rank=1, density=0.001, alpha=1, target_modules=("down_proj",))
    support = count(Shape.of(fields), named(config, "sltrain")).supports[0]
    assert support.bytes == 4 * 49 + 4 * int(0.001 * 48 * 65_540)


def test_patterns_are_whole_components():
    assert targeted("model.layers.0.mlp.up_proj", ["mlp"]) and targeted("a.mlp.up_proj", ["mlp.up_proj"])
    assert not targeted("model.layers.0.mlp.up_proj", ["up"])


def test_unknown_architecture_is_refused_by_name():
    with pytest.raises(UserError, match=r'"gpt_neox".*llama'):
        Shape.of({"model_type": "gpt_neox"})
