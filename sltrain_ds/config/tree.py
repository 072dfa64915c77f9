"""A tree of known keys with their types: one walk finds unknown keys, wrong types and values out of range."""

import difflib
import math
from dataclasses import dataclass

from sltrain_ds.errors import UserError
from sltrain_ds.formats import INT64

from .jsonfile import kind, shown


@dataclass(frozen=True)
class Key:
    """One leaf. ``type``: bool, int, number, string, list, names (strings), object, any; only ``gt`` is exclusive."""

    type: str
    ge: float | None = None
    gt: float | None = None
    le: float | None = None
    choices: tuple = ()
    auto: bool = False  # "auto" is resolved by config/auto.py
    null: bool = False


BOOL, TEXT, ANY, NAMES = Key("bool"), Key("string"), Key("any"), Key("names")
COUNT, SIZE = Key("int", ge=0, le=INT64), Key("int", ge=1, le=INT64)


def check(value, node, path, whole=None):
    """Return ``value`` with whole numbers like 5e8 as int. UserError names the key, the fault and what would work."""
    if isinstance(node, dict):
        if not isinstance(value, dict):
            raise UserError(
                f"{path}: must be an object {{...}} with keys like {', '.join(list(node)[:3])}; got {shown(value)}"
            )
        for name in value:
            if name not in node:
                raise UserError(unknown(name, path, node, whole))
        here = f"{path}." if path else ""
        return {name: check(item, node[name], here + name, whole) for name, item in value.items()}
    if (value is None and node.null) or (value == "auto" and node.auto) or node.type == "any":
        return value
    if value == "auto" and node.type != "string" and "auto" not in node.choices:
        raise UserError(f'{path}: "auto" is not resolved here; write {expected(node)} or leave the key out')
    if node.type in ("int", "number") and isinstance(value, int | float) and not isinstance(value, bool):
        finite = math.isfinite(value)
        if finite and node.type == "int" and value == int(value):
            value = int(value)
        ok = finite and (node.type == "number" or isinstance(value, int))
        ok = ok and (node.ge is None or value >= node.ge) and (node.gt is None or value > node.gt)
        ok = ok and (node.le is None or value <= node.le)
    elif node.type == "names":
        ok = isinstance(value, list) and all(isinstance(item, str) for item in value)
    else:
        types = {"bool": bool, "string": str, "list": list, "object": dict}
        ok = node.type in types and isinstance(value, types[node.type])
    if not ok or (node.choices and value not in node.choices):
        raise UserError(f"{path}: must be {expected(node)}; got {shown(value)}" + _quoted(value, node))
    return value


_WORDS = {
    "bool": "true or false",
    "int": "a whole number",
    "number": "a number",
    "string": "a string",
    "list": "a list [...]",
    "names": "a list of strings",
    "object": "an object {...}",
}


def expected(node):
    """What a key takes, in words."""
    if node.choices:
        words = [shown(choice) for choice in node.choices]
        text = " or ".join(words) if len(words) < 3 else "one of " + ", ".join(words)
    else:
        text = _WORDS[node.type]
    bounds = [
        f"{sign} {bound}" for sign, bound in ((">", node.gt), (">=", node.ge), ("<=", node.le)) if bound is not None
    ]
    return text + (" " + " and ".join(bounds) if bounds else "") + (' or "auto"' if node.auto else "")


def unknown(name, path, node, whole=None):
    """The line for a key that is not known: the place where that very name is known, else the nearest one beside it."""
    here = f"{path}.{name}" if path else name
    elsewhere = [place for place in _places(name, whole, "") if place != here] if whole else []
    if len(elsewhere) == 1:
        return f"{here}: unknown key here; it belongs at {elsewhere[0]}"
    near = nearest(name, node)
    if near:
        return f"{here}: unknown key; did you mean {f'{path}.{near}' if path else near}?"
    names = sorted(node) if len(node) <= 12 else None
    return f"{here}: unknown key; remove it" + (f" (known here: {', '.join(names)})" if names else "")


def nearest(name, names):
    """The known name closest to ``name``, or None."""
    lower = {known.lower(): known for known in names}
    found = difflib.get_close_matches(name.lower(), lower, n=1, cutoff=0.6)
    return lower[found[0]] if found else None


def _places(name, node, path):
    for key, child in node.items():
        here = f"{path}.{key}" if path else key
        if key == name:
            yield here
        if isinstance(child, dict):
            yield from _places(name, child, here)


def _quoted(value, node):
    if isinstance(value, str) and node.type in ("bool", "int", "number"):
        return " (a string: drop the quotes)"
    return f" ({kind(value)})" if isinstance(value, bool) else ""
