"""The type of `sltrain.op_mode`: a mode for all layers, or modes by shape."""

import json
import re

from pydantic_core import PydanticCustomError

MODES = ("auto", "compose", "factored", "factored_dense", "keep", "keep_step")


def check_op_mode(value):
    """A mode, or {"OUTxIN": mode, ...}; a pydantic error says what is wrong."""
    by_shape = value if isinstance(value, dict) else {}
    for shape in by_shape:
        if not re.fullmatch(r"[1-9]\d*x[1-9]\d*", shape):
            raise PydanticCustomError("op_shape", 'key "{shape}" must be a shape, "OUTxIN"', {"shape": shape})
    for mode in by_shape.values() if by_shape else [value]:
        if mode not in MODES:
            known = ", ".join(f'"{name}"' for name in MODES)
            raise PydanticCustomError(
                "op_mode", 'must be one of {known}, or {form}, not {mode}',
                {"known": known, "form": '{"OUTxIN": mode, ...}', "mode": json.dumps(mode)},
            )  # fmt: skip
    return value


SCHEMA = {
    "anyOf": [
        {"enum": list(MODES)},
        {
            "type": "object",
            "minProperties": 1,
            "patternProperties": {"^[1-9][0-9]*x[1-9][0-9]*$": {"enum": list(MODES)}},
            "additionalProperties": False,
        },
    ]
}
