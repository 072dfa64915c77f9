"""`--set a.b.c=value`: any key of the file, DeepSpeed's too."""

import copy
import json

from sltrain_ds.errors import UserError
from sltrain_ds.extensions import is_dotted

from .block import key_tree
from .deepspeed_keys import ADAM, DEEPSPEED, SCHEDULERS
from .jsonfile import shown
from .tree import unknown


def whole_tree():
    """All key names of a file, DeepSpeed's and ours, as nested dicts."""
    scheduler = {name: key for params in SCHEDULERS.values() for name, key in params.items()}
    return {
        **DEEPSPEED,
        "optimizer": {**DEEPSPEED["optimizer"], "params": ADAM},
        "scheduler": {**DEEPSPEED["scheduler"], "params": scheduler},
        "sltrain": key_tree(),
        "$schema": None,
    }


def apply(data, overrides):
    """A copy of ``data`` with each ``key=value`` set; a value is JSON, else a string; ``key=null`` removes the key.

    UserError names an override that has no "=", an unknown key with the nearest known one, or a path through a value.
    """
    data = copy.deepcopy(data)
    for override in overrides:
        path, equals, text = override.partition("=")
        names = path.strip().split(".")
        if not equals or not all(names):
            raise UserError(f"--set {override}: must read key=value, for example --set sltrain.steps=100")
        _check_path(override, names, data)
        try:
            value = json.loads(text, parse_constant=lambda word: word)
        except ValueError:
            value = text
        parent = data
        for depth, name in enumerate(names[:-1]):
            parent = parent.setdefault(name, {})
            if not isinstance(parent, dict):
                here = ".".join(names[: depth + 1])
                raise UserError(f"--set {override}: {here} is {shown(parent)}, not an object; set {here} as a whole")
        if value is None:
            parent.pop(names[-1], None)
        else:
            parent[names[-1]] = value
    return data


def _check_path(override, names, data):
    node = whole = whole_tree()
    for depth, name in enumerate(names):
        if not isinstance(node, dict):
            return  # below a leaf: free-form objects such as data.dir are checked by their own types
        if names[:depth] == ["sltrain", "method"] and is_dotted(_method_name(data)):
            return  # the user's own method: its own type checks the keys
        if name not in node:
            raise UserError(f"--set {override}: {unknown(name, '.'.join(names[:depth]), node, whole)}")
        node = node[name]


def _method_name(data):
    block = data.get("sltrain")
    method = block.get("method") if isinstance(block, dict) else None
    return method.get("name") if isinstance(method, dict) else None
