"""One clear line out of a pydantic error."""

from .block import METHODS, LlamaFields, SLTrainBlock
from .jsonfile import shown
from .tree import nearest, unknown

_WHAT = {
    "int_type": "must be a whole number",
    "int_from_float": "must be a whole number",
    "float_type": "must be a number",
    "bool_type": "must be true or false",
    "string_type": "must be a string",
    "list_type": "must be a list [...]",
    "dict_type": "must be an object {...}",
    "model_type": "must be an object {...}",
    "model_attributes_type": "must be an object {...}",
    "string_too_short": "must not be empty",
    "too_short": "must not be empty",
    "finite_number": "must be a finite number",
    "greater_than": "must be above %(gt)s",
    "greater_than_equal": "must be at least %(ge)s",
    "less_than": "must be below %(lt)s",
    "less_than_equal": "must be at most %(le)s",
}


def first_line(error, whole, block=SLTrainBlock):
    """The first problem of a ValidationError of the block: its key, what is wrong, what would work.

    ``whole`` is the tree of all key names, for keys that belong elsewhere; ``block`` the type that was asked for.
    """
    problem = error.errors(include_url=False)[0]
    loc, kind, value, context = problem["loc"], problem["type"], problem["input"], problem.get("ctx", {})
    names = _names(loc)
    path, meaning = ".".join(["sltrain", *names]), _description(loc, block)
    if kind == "extra_forbidden":
        return _unknown(names, loc, whole, block)
    if kind == "missing":
        return f"{path}: is missing; write it ({meaning})"
    if kind == "union_tag_not_found":
        return f"{path}.name: is missing; write one of {_quoted(METHODS)}"
    if kind == "union_tag_invalid":
        return (
            f"{path}.name: unknown method {shown(context['tag'])}; {_near(context['tag'], METHODS)}{_quoted(METHODS)}"
        )
    if kind == "literal_error":
        choices = context["expected"].replace("'", '"').replace("False", "false")
        near = _near(value, [word.strip('" ') for word in choices.replace(" or ", ", ").split(",")])
        return f"{path}: {near}must be {choices}; got {shown(value)}"
    if kind in _WHAT:
        return f"{path}: {_WHAT[kind] % context}; got {shown(value)}{_hint(kind, value)} ({meaning})"
    return f"{path}: {problem['msg']}".replace("\n", " ")


def field_line(problem, where):
    """The same for a problem with a field of a file that is not ours; ``where`` names the file."""
    kind, context = problem["type"], problem.get("ctx", {})
    what = _WHAT[kind] % context if kind in _WHAT else f"{problem['msg'][0].lower()}{problem['msg'][1:]}"
    return f"{where}: {problem['loc'][0]} {what}; got {shown(problem['input'])}"


def _near(value, names):
    near = nearest(value, names) if isinstance(value, str) else None
    return f'did you mean "{near}"? ' if near else ""


def _names(loc):
    """The loc without the tag that pydantic puts behind a discriminated union."""
    return [str(part) for i, part in enumerate(loc) if not (i == 1 and loc[0] == "method" and part in METHODS)]


def _unknown(names, loc, whole, block):
    *parents, name = names
    node = whole["sltrain"]
    for parent in parents:
        node = node.get(parent) or {}
    own_method = "name" in getattr(block.model_fields["method"].annotation, "model_fields", {})
    if own_method and parents[:1] == ["method"]:
        fields = block.model_fields["method"].annotation.model_fields
        if parents == ["method", "lr_scale"]:
            fields = fields["lr_scale"].annotation.model_fields
        return unknown(name, ".".join(["sltrain", *parents]), dict.fromkeys(fields))
    if parents == ["method"]:
        method = loc[1]
        own = METHODS[method].model_fields
        if name in node:
            return (
                f"sltrain.method.{name}: method {method} does not take it; remove it, or replace the whole of "
                f'sltrain.method (--set \'sltrain.method={{"name": "{method}", ...}}\')'
            )
        node = {key: node[key] for key in own}
    if parents[:2] == ["method", "lr_scale"]:
        node = METHODS[loc[1]].model_fields["lr_scale"].annotation.model_fields
    return unknown(name, ".".join(["sltrain", *parents]), node, whole)


def _field(loc, block):
    model, field = block, None
    for i, part in enumerate(loc):
        if i == 1 and loc[0] == "method" and part in METHODS:
            model = METHODS[part]
            continue
        field = getattr(model, "model_fields", {}).get(part)
        if field is None:
            return None
        model = LlamaFields if loc[:2] == ("model", "config") and i == 1 else field.annotation
    return field


def _description(loc, block):
    field = _field(loc, block)
    return field.description if field else "see docs/config.md"


def _hint(kind, value):
    if isinstance(value, str) and kind in ("int_type", "float_type", "bool_type"):
        return ", a string: drop the quotes" if value != "auto" else ', and "auto" is not known here'
    return ""


def _quoted(names):
    return ", ".join(f'"{name}"' for name in names)
