"""What a LLaMA's fields must hold beyond their sizes: types, rotary embedding, special tokens."""

from pydantic import ValidationError

from sltrain_ds.errors import UserError

from .block import LlamaFields
from .jsonfile import shown
from .messages import field_line

# transformers' rope types (modeling_rope_utils.py of 5.23) and the keys each must have
ROPE_TYPES = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "yarn": ("factor",),
    "longrope": ("short_factor", "long_factor"),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
}
_LISTS = ("short_factor", "long_factor")
# the fields that other architectures share, which are computed with here
_SIZES = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "head_dim", "max_position_embeddings",
)  # fmt: skip
_TOKENS = ("pad_token_id", "bos_token_id", "eos_token_id")


def check_types(fields, where):
    """The types of a model directory's fields, as read from its config.json. UserError begins with ``where``."""
    known = LlamaFields.model_fields if fields.get("model_type", "llama") == "llama" else _SIZES
    # transformers takes lists of end tokens, and older files -1 for no padding
    given = {key: fields[key] for key in known if key in fields and key not in _TOKENS}
    try:
        LlamaFields.model_validate(given)
    except ValidationError as error:
        for problem in error.errors(include_url=False):
            if problem["type"] != "missing":
                raise UserError(field_line(problem, where)) from None
    for key in _TOKENS:
        ids = fields.get(key)
        for token in ids if isinstance(ids, list) else [ids]:
            if token is not None and (isinstance(token, bool) or not isinstance(token, int)):
                raise UserError(f"{where}: {key} must be a whole number or null; got {shown(ids)}")


def check_values(fields, where, ours):
    """Special tokens and rotary embedding against the sizes; ``ours``: written for sltrain_ds, not by transformers."""
    if fields.get("model_type", "llama") != "llama":
        return
    vocab = fields.get("vocab_size")
    for key in _TOKENS:
        ids = fields.get(key)
        for token in ids if isinstance(ids, list) else [ids]:
            if vocab and token is not None and token >= vocab:
                raise UserError(
                    f"{where}: {key} {token} is beyond vocab_size {vocab}; set at most {vocab - 1}, or null"
                )
    rope = fields.get("rope_parameters") or (None if ours else fields.get("rope_scaling"))
    if rope is not None:
        _check_rope(rope, fields, where, ours)


def _check_rope(rope, fields, where, ours):
    if not isinstance(rope, dict):
        raise UserError(f"{where}: rope_parameters must be an object {{...}}; got {shown(rope)}")
    types = ", ".join(f'"{name}"' for name in ROPE_TYPES)
    kind = rope.get("rope_type")
    if kind is None and not ours:  # transformers fills in what older files lack
        kind = rope.get("type", "default")
    if not isinstance(kind, str) or kind not in ROPE_TYPES:
        said = "has no rope_type" if kind is None else f"rope_type {shown(kind)} is not known"
        raise UserError(f"{where}: rope_parameters {said}; set it to one of {types}")
    for key in ROPE_TYPES[kind]:
        if key not in rope:
            raise UserError(f'{where}: rope_parameters of rope_type "{kind}" need {key}; write it, a number above 0')
    for key, value in rope.items():
        optional = key not in ("rope_theta", *ROPE_TYPES[kind])
        if key in ("rope_type", "type") or (optional and (value is None or isinstance(value, bool))):
            continue
        if key in _LISTS:
            _check_list(key, value, fields, where)
        elif not _positive(value):
            raise UserError(f"{where}: rope_parameters.{key} must be a number above 0; got {shown(value)}")


def _check_list(key, value, fields, where):
    hidden, heads = fields.get("hidden_size"), fields.get("num_attention_heads")
    head = fields.get("head_dim") or (hidden // heads if hidden and heads else None)
    if not (isinstance(value, list) and all(map(_positive, value)) and head in (None, 2 * len(value))):
        length = f"{head // 2} " if head else ""
        raise UserError(
            f"{where}: rope_parameters.{key} must be a list of {length}numbers above 0, half a head's width of them; "
            f"got {shown(value)}"
        )


def _positive(value):
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < float("inf")
