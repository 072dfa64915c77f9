"""Shapes of a LLaMA's linear layers, from its config fields alone: what a rank or a density must fit."""

import json
from pathlib import Path

from sltrain_ds.errors import UserError
from sltrain_ds.methods.options import DEFAULT_TARGETS
from sltrain_ds.methods.registry import method_of

from . import llama
from .presets import PRESETS


def model_fields(model):
    """`LlamaConfig` fields of a `sltrain.model` block; UserError where `path` holds no readable config.json."""
    if model.path is None:
        return dict(PRESETS[model.preset] if model.preset is not None else model.config)
    file = Path(model.path) / "config.json"
    if not file.is_file():
        raise UserError(f"sltrain.model.path: {file} does not exist; give a Hugging Face or converted model directory")
    try:
        fields = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(
            f"sltrain.model.path: {file} is not readable JSON ({str(error).splitlines()[0]}); write it anew"
        ) from None
    if not isinstance(fields, dict):
        raise UserError(f"sltrain.model.path: {file} holds no JSON object; write it anew")
    llama.check_types(fields, f"sltrain.model.path: {file}")
    return fields


def linear_shapes(fields):
    """{dotted name: (out, in)} of a LLaMA's nn.Linear layers, the first block's standing for all the blocks alike.

    Empty where the fields describe another architecture.
    """
    needed = ("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads")
    if fields.get("model_type", "llama") != "llama" or not all(isinstance(fields.get(key), int) for key in needed):
        return {}
    vocab, hidden, inner, heads = (fields[key] for key in needed)
    head = fields.get("head_dim") or hidden // heads
    query, key_value = heads * head, (fields.get("num_key_value_heads") or heads) * head
    block = {
        "self_attn.q_proj": (query, hidden),
        "self_attn.k_proj": (key_value, hidden),
        "self_attn.v_proj": (key_value, hidden),
        "self_attn.o_proj": (hidden, query),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
    }
    shapes = {f"model.layers.0.{name}": shape for name, shape in block.items()}
    return {**shapes, "lm_head": (vocab, hidden)}


def check_model(fields, where):
    """Head and embedding sizes that cannot be built."""
    hidden, heads = fields.get("hidden_size"), fields.get("num_attention_heads")
    if hidden and heads and not fields.get("head_dim") and hidden % heads:
        near = max(n for n in range(1, min(heads, 10_000) + 1) if hidden % n == 0)
        raise UserError(
            f"{where}: hidden_size {hidden} is not a multiple of num_attention_heads {heads}; {near} heads would do"
        )
    groups = fields.get("num_key_value_heads")
    if heads and groups and heads % groups:
        raise UserError(
            f"{where}: num_attention_heads {heads} is not a multiple of num_key_value_heads {groups}; set it to {heads}"
        )
    head = fields.get("head_dim") or (hidden // heads if hidden and heads else 2)
    if head % 2:
        raise UserError(
            f"{where}: a head is {head} wide, and rotary positions need an even width; change num_attention_heads"
        )


def check_method(block, fields):
    """The `sltrain.method` block against every target layer; names the first layer that does not fit."""
    shapes, method = linear_shapes(fields), method_of(block)
    if not shapes or method.layer is None:
        return
    targets = method.target_modules or DEFAULT_TARGETS
    for target in targets:
        if not any(_targeted(name, target) for name in shapes):
            raise UserError(
                f'sltrain.method.target_modules: "{target}" matches no linear layer of the model; write parts of '
                'dotted names, such as "self_attn", "mlp" or "q_proj"'
            )
    for name, (out, width) in shapes.items():
        if not any(_targeted(name, target) for target in targets):
            continue
        if name == "lm_head" and fields.get("tie_word_embeddings"):
            raise UserError(
                "sltrain.method.target_modules: lm_head shares the embedding's weight (tie_word_embeddings), which "
                "cannot be converted; leave lm_head out, or set tie_word_embeddings false"
            )
        misfit = method.misfit(out, width)
        if misfit:
            key, message = misfit
            raise UserError(f"sltrain.method.{key}: " + message.format(layer=f"{name} ({out} x {width})"))


def check_op_mode(block, fields):
    """Shapes that op_mode names against the shapes of the target layers."""
    shapes = linear_shapes(fields)
    method = method_of(block.method)
    if not method.composes or not shapes or isinstance(block.op_mode, str):
        return
    targets = method.target_modules or DEFAULT_TARGETS
    found = [f"{out}x{in_}" for name, (out, in_) in shapes.items() if any(_targeted(name, t) for t in targets)]
    for shape in block.op_mode:
        if shape not in found:
            raise UserError(
                f"sltrain.op_mode: no SLTrain layer is {shape} (out x in); the model's are "
                f"{', '.join(dict.fromkeys(found))}"
            )


def _targeted(name, pattern):
    """As methods/convert.py reads it: a pattern is one or more whole components of the dotted name."""
    return f".{pattern}." in f".{name}."


def check_sequence(length, fields):
    """The sequence against the model's longest."""
    longest = fields.get("max_position_embeddings")
    if longest and length > longest:
        raise UserError(
            f"sltrain.data.sequence_length: {length} is above the model's max_position_embeddings {longest}; "
            f"set at most {longest}, or raise max_position_embeddings in sltrain.model.config"
        )
