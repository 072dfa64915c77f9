"""Every digit the paper prints for these rows (Table 2, and the 7B counts)."""

import pytest

from sltrain_ds.config.presets import PRESETS
from sltrain_ds.memory.count import Shape, count, nonzeros
from sltrain_ds.memory.paper import RECIPES, table

TABLE_2 = {
    "full_rank": {
        "llama_60m": "58.1 0.35",
        "llama_130m": "134.1 0.80",
        "llama_350m": "368.0 2.21",
        "llama_1b": "1339.1 8.03",
    },
    "low_rank": {
        "llama_60m": "42.8 0.26",
        "llama_130m": "94.0 0.56",
        "llama_350m": "185.2 1.11",
        "llama_1b": "609.3 3.66",
    },
    "sltrain": {
        "llama_60m": "43.5 0.27",
        "llama_130m": "96.5 0.60",
        "llama_350m": "194.3 1.24",
        "llama_1b": "645.5 4.16",
    },
    "galore": {"llama_1b": "1339.1 4.76"},
    "relora": {"llama_1b": "1339.1 6.34"},
}


def rows(preset):
    return table(Shape.of(PRESETS[preset]), *RECIPES[preset])


@pytest.mark.parametrize(("method", "preset", "printed"), [(m, p, t) for m in TABLE_2 for p, t in TABLE_2[m].items()])
def test_table_2(method, preset, printed):
    row = rows(preset)[method]
    assert f"{row.millions} {row.gigabytes}" == printed


def test_7b_counts():
    assert {m: rows("llama_7b")[m].millions for m in ("full_rank", "low_rank", "sltrain")} == {
        "full_rank": "6738.4",
        "low_rank": "2820.9",
        "sltrain": "3144.7",
    }
    shape = Shape.of(PRESETS["llama_7b"])
    assert f"{sum(nonzeros(0.05, w.out_features, w.in_features) for w in shape.linears(0)) * 32 / 1e6:.1f}" == "323.8"


def test_relora_needs_its_two_parts_rounded_apart():
    row = rows("llama_1b")["relora"]
    assert [f"{part / 1e9:.2f}" for part in row.parts.values()] == ["3.90", "2.44"]
    assert f"{row.bytes / 1e9:.2f}" == "6.33"


def test_rows_need_what_they_are_made_of():
    shape = Shape.of(PRESETS["llama_60m"])
    assert list(table(shape)) == ["full_rank"]
    assert list(table(shape, 128)) == ["full_rank", "low_rank", "galore", "relora"]


@pytest.mark.parametrize("preset", RECIPES)
def test_full_rank_is_what_the_model_holds(preset):
    shape = Shape.of(PRESETS[preset])
    assert table(shape)["full_rank"].parameters == count(shape).parameters
