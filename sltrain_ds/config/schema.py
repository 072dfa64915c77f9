"""JSON Schema of a whole file, for editors, and the tables of the docs; both from the types and the key list."""

import json
from pathlib import Path

from pydantic.json_schema import GenerateJsonSchema

from sltrain_ds.extensions import FORM
from sltrain_ds.formats import SIZE_LIMIT

from .block import METHODS, Checkpoint, Data, Eval, LlamaFields, Model, Precision, SLTrainBlock
from .deepspeed_keys import ADAM, DEEPSPEED, OPTIMIZERS, SCHEDULERS, VERSION

PATH = Path(__file__).with_name("sltrain.schema.json")
_BEGIN, _END = "<!-- generated: python -m sltrain_ds.config.schema -->", "<!-- /generated -->"
_TYPES = {
    "bool": "boolean",
    "int": "number",
    "number": "number",
    "string": "string",
    "list": "array",
    "names": "array",
    "object": "object",
}


def schema():
    """The JSON Schema (draft 2020-12) of a config file: known DeepSpeed keys loosely typed, the block in full."""
    block = SLTrainBlock.model_json_schema(schema_generator=_Plain)
    definitions = {**block.pop("$defs"), "LlamaFields": LlamaFields.model_json_schema(schema_generator=_Plain)}
    model = definitions["Model"]
    model["properties"]["config"] |= {"anyOf": [{"$ref": "#/$defs/LlamaFields"}, {"type": "null"}]}
    model["oneOf"] = [{"required": [name]} for name in ("preset", "config", "path")]
    own = {"type": "object", "required": ["name"], "properties": {"name": {"type": "string", "pattern": f"^{FORM}$"}}}
    known = block["properties"]["method"]
    block["properties"]["method"] = {"description": known.pop("description"), "anyOf": [known, own]}
    by_name = {"type": "string", "pattern": f"^{FORM}$"}
    block["properties"]["callbacks"]["items"] = {"anyOf": [by_name, {"$ref": "#/$defs/CallbackEntry"}]}
    deepspeed = _node(DEEPSPEED)["properties"]
    deepspeed["optimizer"]["properties"] |= {"type": {"enum": list(OPTIMIZERS)}, "params": _node(ADAM)}
    deepspeed["scheduler"]["properties"] |= {
        "type": {"enum": list(SCHEDULERS)},
        "params": {"anyOf": [{"title": name, **_node(params)} for name, params in SCHEDULERS.items()]},
    }
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "sltrain_ds config",
        "description": f"A DeepSpeed {VERSION} config with one block more, sltrain",
        "type": "object",
        "additionalProperties": False,
        "required": ["gradient_clipping", "optimizer", "sltrain"],
        "properties": {"$schema": {"type": "string"}, "sltrain": block, **deepspeed},
        "$defs": definitions,
    }


def text():
    """The schema as it is written to `sltrain.schema.json`."""
    return json.dumps(schema(), indent=1, ensure_ascii=False) + "\n"


def table():
    """Markdown: every key of the block with what it takes, its default and its meaning."""
    rows = ["| key | takes | default | meaning |", "|---|---|---|---|"]
    rows += _rows(SLTrainBlock, "", skip=("model", "method", "precision", "data", "eval", "checkpoint"))
    for title, kind, prefix in (
        ("model", Model, "model."),
        ("fields of model.config", LlamaFields, "model.config."),
        *((f"method {name}", options, "method.") for name, options in METHODS.items()),
        ("precision", Precision, "precision."),
        ("data", Data, "data."),
        ("eval", Eval, "eval."),
        ("checkpoint", Checkpoint, "checkpoint."),
    ):
        rows.append(f"| **{title}** | | | |")
        rows += _rows(kind, prefix)
    return "\n".join(rows) + "\n"


class _Plain(GenerateJsonSchema):
    """Without the titles pydantic makes of the names."""

    def field_title_should_be_set(self, schema):
        return False


def _node(node):
    if isinstance(node, dict):
        return {
            "type": "object",
            "additionalProperties": False,
            "properties": {key: _node(child) for key, child in node.items()},
        }
    if node.type == "any":
        return {}
    rule = {"enum": list(node.choices)} if node.choices else {"type": _TYPES[node.type]}
    if node.type == "names":
        rule["items"] = {"type": "string"}
    bounds = {"minimum": node.ge, "exclusiveMinimum": node.gt, "maximum": node.le}
    rule |= {key: bound for key, bound in bounds.items() if bound is not None}
    if node.type == "int" and not node.choices:
        rule["multipleOf"] = 1
    extra = ([{"const": "auto"}] if node.auto else []) + ([{"type": "null"}] if node.null else [])
    return {"anyOf": [rule, *extra]} if extra else rule


def _rows(kind, prefix, skip=()):
    properties = kind.model_json_schema(schema_generator=_Plain)
    definitions = properties.get("$defs", {})
    for name, field in kind.model_fields.items():
        if name in skip:
            continue
        takes = _takes(properties["properties"][name], definitions)
        default = "required" if field.is_required() else f"`{json.dumps(_plain(field.default))}`"
        yield f"| `{prefix}{name}` | {takes} | {default} | {field.description or ''} |"


def _plain(value):
    return value.model_dump() if hasattr(value, "model_dump") else value


def _takes(rule, definitions):
    if "$ref" in rule:
        name = rule["$ref"].rsplit("/", 1)[1]
        return "`{" + ", ".join(definitions.get(name, {})["properties"]) + "}`"
    if "anyOf" in rule:
        return " or ".join(_takes(option, definitions) for option in rule["anyOf"])
    values = rule.get("enum") or ([rule["const"]] if "const" in rule else None)
    if values is not None:
        return ", ".join(f"`{json.dumps(value)}`" for value in values)
    words = {"integer": "whole number", "boolean": "`true`, `false`", "array": "list of names", "null": "`null`"}
    word = words.get(rule["type"], rule["type"])
    signs = (("exclusiveMinimum", ">"), ("minimum", "≥"), ("exclusiveMaximum", "<"), ("maximum", "≤"))
    bounds = [f"{sign} {rule[key]:g}" for key, sign in signs if key in rule and rule[key] < SIZE_LIMIT]
    return " ".join([word, *bounds])


def with_table(document):
    """``document`` (docs/config.md) with the table between its two marks written anew."""
    before, _, rest = document.partition(_BEGIN)
    _, _, after = rest.partition(_END)
    return f"{before}{_BEGIN}\n{table()}{_END}{after}"


if __name__ == "__main__":
    PATH.write_text(text(), encoding="utf-8")
    page = PATH.parents[2] / "docs" / "config.md"
    page.write_text(with_table(page.read_text(encoding="utf-8")), encoding="utf-8")
