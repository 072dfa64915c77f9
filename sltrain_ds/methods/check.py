"""Checks of a method's settings, each a UserError of one line."""

import math

from sltrain_ds.errors import UserError


def check_number(key, value, integer=False, low=None, high=None, above=None):
    """Refuse a value of the wrong type or outside [low, high] or (above, ...)."""
    kinds = (int,) if integer else (int, float)
    if isinstance(value, bool) or not isinstance(value, kinds) or not math.isfinite(value):
        raise UserError(f"{key} must be {'an integer' if integer else 'a number'}, not {value!r}")
    bounds = []
    if low is not None:
        bounds.append((value >= low, f"at least {low}"))
    if high is not None:
        bounds.append((value <= high, f"at most {high}"))
    if above is not None:
        bounds.append((value > above, f"above {above}"))
    if not all(kept for kept, _ in bounds):
        raise UserError(f"{key} = {value} must be {' and '.join(text for _, text in bounds)}")


def check_rank(rank, in_features, out_features, layer_name=""):
    """A rank beyond min(in, out) holds no more than W itself."""
    if rank > min(in_features, out_features):
        where = f" of {layer_name}" if layer_name else ""
        raise UserError(f"rank = {rank} exceeds min(in, out) = {min(in_features, out_features)}{where}; lower it")
