"""The JSON Schema and the table in the docs follow the types."""

import json
from pathlib import Path

import jsonschema
import pytest

from sltrain_ds.config import schema

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def validator():
    rules = json.loads(schema.PATH.read_text(encoding="utf-8"))
    jsonschema.Draft202012Validator.check_schema(rules)
    return jsonschema.Draft202012Validator(rules)


def test_the_schema_file_is_in_sync():
    assert schema.PATH.read_text(encoding="utf-8") == schema.text(), "run python -m sltrain_ds.config.schema"


def test_the_table_in_the_docs_is_in_sync():
    page = (ROOT / "docs" / "config.md").read_text(encoding="utf-8")
    assert schema.with_table(page) == page, "run python -m sltrain_ds.config.schema"
    for key in ("method.density", "precision.states", "data.dir", "checkpoint.keep", "steps"):
        assert f"| `{key}` |" in page


@pytest.mark.parametrize("path", sorted((ROOT / "ds_configs").glob("*.json")), ids=lambda path: path.stem)
def test_shipped_files_validate(validator, path):
    validator.validate(json.loads(path.read_text(encoding="utf-8")))


def test_a_good_file_validates(validator, good):
    validator.validate(good)
    good["sltrain"]["data"]["dir"] = {"a": 1, "b": 0.5}
    good["optimizer"]["params"]["lr"] = "auto"
    good["sltrain"]["method"] = {"name": "full_rank"}
    validator.validate(good)


@pytest.mark.parametrize(
    "block, key, value",
    [
        ("zero_optimization", "stage", 4),
        ("zero_optimization", "stages", 2),
        ("sltrain", "stpes", 1),
        ("sltrain", "steps", "1"),
        ("sltrain", "clipping", "layer"),
        ("sltrain", "model", {"preset": "llama_60m", "path": "x"}),
        ("sltrain", "model", {"config": {"vocab_size": 3}}),
        ("sltrain", "method", {"name": "sltrain", "rank": 4, "density": 0, "alpha": 1}),
        ("sltrain", "data", {"dir": {"a": 0}}),
        ("optimizer", "type", "Adam8bit"),
        ("scheduler", "params", {"warmup": 1}),
    ],
)
def test_bad_files_do_not(validator, good, block, key, value):
    good[block][key] = value
    with pytest.raises(jsonschema.ValidationError):
        validator.validate(good)


def test_every_key_of_the_block_says_what_it_is():
    rules = schema.schema()
    for place in [rules["properties"]["sltrain"], *rules["$defs"].values()]:
        for name, rule in place["properties"].items():
            assert rule.get("description"), name
