"""A model's fields: what is taken is what transformers takes, and a directory's wrong types are told."""

import json
import typing

import pytest
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.activations import ACT2FN
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from sltrain_ds.config import from_dict
from sltrain_ds.config.block import Activation
from sltrain_ds.config.llama import ROPE_TYPES, check_values
from sltrain_ds.errors import UserError

FIELDS = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1,
          "num_attention_heads": 2, "max_position_embeddings": 512}  # fmt: skip
VALUES = {"factor": 2.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "short_factor": [1.0] * 4,
          "long_factor": [2.0] * 4}  # fmt: skip


@pytest.mark.parametrize("name", typing.get_args(Activation))
def test_activations_are_those_of_transformers(name):
    assert not list(ACT2FN[name].parameters())


def test_rope_types_are_those_of_transformers():
    assert set(ROPE_TYPES) <= {"default", *ROPE_INIT_FUNCTIONS}


@pytest.mark.parametrize("kind", ROPE_TYPES)
def test_what_a_rope_type_needs(kind):
    rope = {"rope_type": kind, **{key: VALUES[key] for key in ROPE_TYPES[kind]}}
    check_values({**FIELDS, "rope_parameters": rope}, "model", ours=True)
    LlamaForCausalLM(LlamaConfig(**FIELDS, rope_parameters=dict(rope)))
    for key in ROPE_TYPES[kind]:
        less = {name: value for name, value in rope.items() if name != key}
        with pytest.raises(UserError, match=f"need {key}"):
            check_values({**FIELDS, "rope_parameters": less}, "model", ours=True)
        with pytest.raises(KeyError, match=key):
            LlamaConfig(**FIELDS, rope_parameters=less)


@pytest.fixture
def directory(good, tmp_path):
    """A function of changed fields: the good config on a model directory that holds them."""

    def of(**changes):
        (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", **FIELDS, **changes}))
        good["sltrain"] |= {"model": {"path": str(tmp_path)}, "method": {"name": "full_rank"}}
        return from_dict(good)

    return of


@pytest.mark.parametrize(
    "key, value, says",
    [
        ("hidden_size", "48", 'hidden_size must be a whole number; got "48"'),
        ("vocab_size", "x", 'vocab_size must be a whole number; got "x"'),
        ("num_attention_heads", [1], "num_attention_heads must be a whole number; got [1]"),
        ("num_key_value_heads", 0, "num_key_value_heads must be at least 1; got 0"),
        ("max_position_embeddings", "512", "max_position_embeddings must be"),
        ("hidden_act", "swiglu", "hidden_act "),
        ("eos_token_id", ["x"], 'eos_token_id must be a whole number or null; got ["x"]'),
        ("bos_token_id", 64, "bos_token_id 64 is beyond vocab_size 64"),
        ("rope_parameters", {"rope_type": "ntk"}, 'rope_type "ntk" is not known'),
        ("rope_scaling", {"type": "linear"}, "need factor"),
        ("hidden_size", 17, "hidden_size 17 is not a multiple of num_attention_heads 2"),
    ],
)
def test_a_directory_with_wrong_fields(directory, tmp_path, key, value, says):
    with pytest.raises(UserError) as caught:
        directory(**{key: value})
    message = str(caught.value)
    assert message.startswith(f"sltrain.model.path: {tmp_path / 'config.json'}: ") and says in message
    assert "\n" not in message


def test_sizes_of_another_architecture(directory):
    assert directory(model_type="other", hidden_act="its own").model_fields["hidden_act"] == "its own"
    with pytest.raises(UserError, match="hidden_size must be a whole number"):
        directory(model_type="other", hidden_size="48")


@pytest.mark.parametrize(
    "changes",
    [
        {"eos_token_id": [2, 3], "pad_token_id": -1},
        {"rope_scaling": None, "head_dim": None},
        {"rope_scaling": {"type": "linear", "factor": 2}},
        {"rope_parameters": {"rope_theta": 10000.0}},
        {"architectures": ["LlamaForCausalLM"], "rope_theta": 10000.0},
    ],
)
def test_what_transformers_writes_passes(directory, changes):
    assert directory(**changes).model_fields["hidden_size"] == 16
