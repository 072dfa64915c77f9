import json

import pytest

from sltrain_ds.bench import support as bench
from sltrain_ds.bench.op import Shape
from sltrain_ds.cli import main
from sltrain_ds.ops import support


@pytest.mark.parametrize("itemsize, sector", [(4, 32), (2, 32), (2, 64)])
def test_sectors_are_counted_once(itemsize, sector):
    rows, columns = support.sample(20, 72, 200, 0, "x")
    positions = support.to_flat_index(rows, columns, 72).tolist()
    expected = len({position * itemsize // sector for position in positions}) * sector
    assert bench.sectors_touched(rows, columns, 72, itemsize, sector) == expected


def test_rates_are_what_must_be_touched_over_the_time():
    operators = {
        "scatter": {"times": [0.002, 0.001, 0.004], "bytes": 1_000_000},
        "copy of W": {"times": [0.001, 0.001, 0.001], "bytes": 2_000_000},
        "draw": {"times": [0.010, 0.010, 0.010], "bytes": None},
    }
    case = {"out": 4, "in": 2, "density": 0.5, "nnz": 4, "dtype": "bf16", "operators": operators}
    rows = {row[2]: row[3:] for row in bench.table_rows(case)}
    assert rows["scatter"] == pytest.approx([4, 2.0, 500_000, 1.0, 0.5, 0.25])  # half of its time for half the bytes
    assert rows["copy of W"][2:] == [None, 2.0, 2.0, 1.0] and rows["copy of W"][1] == 1.0
    assert rows["draw"][3:] == [None, None, None]


def test_bench_support_measures_and_leaves_nothing_wrong(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(bench, "BEYOND_CACHES", 1e5)
    command = ["bench", "support", "--shapes", "24x16:r4:d0.1", "--device", "cpu", "--pairs", "2"]
    assert main([*command, "--out", str(tmp_path)]) == 0
    assert "| 24x16 d0.1 " in capsys.readouterr().out
    cases = json.loads((tmp_path / "support.json").read_text())["cases"]
    assert [case["dtype"] for case in cases] == ["fp32", "bf16"]
    for case in cases:
        assert set(case["operators"]) == {"scatter", "gather", "copy of W", "draw"} and case["nnz"] == 38
        assert all(min(found["times"]) > 0 for found in case["operators"].values())


def test_a_gpus_bytes_are_told_by_both_sizes_of_sectors(monkeypatch):
    monkeypatch.setattr(bench, "BEYOND_CACHES", 1e5)
    monkeypatch.setitem(bench.SECTORS, "cpu", bench.SECTORS["cuda"])
    shape = Shape(20, 72, 4, 0.1)
    found = bench.measure(shape, "bf16", "cpu", rounds=1)["operators"]
    rows, columns = support.sample(20, 72, 144, 0, "bench")
    for name, passes in (("scatter", 2), ("gather", 1)):
        narrow, wide = found[name], found[f"{name}, 64-byte sectors"]
        by_32, by_64 = (bench.sectors_touched(rows, columns, 72, 2, sector) for sector in (32, 64))
        assert wide["times"] == narrow["times"] and wide["bytes"] - narrow["bytes"] == passes * (by_64 - by_32) > 0


def test_a_models_supports_are_drawn_as_its_layers_draw_them(capsys, monkeypatch):
    drawn, sample = [], support.sample
    monkeypatch.setattr(support, "sample", lambda *args: drawn.append(args[4]) or sample(*args))
    found = bench.draw_model("60m")
    assert found["layers"] == 56 == len(set(drawn)) and "model.layers.7.mlp.down_proj" in drawn
    assert found["positions"] == 8 * (4 * int(0.03 * 512**2) + 3 * int(0.03 * 512 * 1376))
    assert f"{found['positions']:,} positions" in capsys.readouterr().out
    assert main(["bench", "support", "--model", "13b"]) == 2
    assert "--model 13b" in capsys.readouterr().err
