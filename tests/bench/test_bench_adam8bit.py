import json

import pytest

from sltrain_ds.bench import adam8bit
from sltrain_ds.cli import main


def test_rows_hold_rates_ratios_and_the_share_of_a_copy():
    contenders = {
        "ours": {"times": [0.001, 0.002, 0.001], "bytes": 10_000_000},
        "bitsandbytes": {"times": [0.003, 0.004, 0.004], "bytes": 10_000_000},
        "fused AdamW": {"times": [0.002, 0.002, 0.002], "bytes": 14_000_000},
        "copy": {"times": [0.0005, 0.001, 0.0005], "bytes": 4_000_000},
    }
    rows = {
        row[2]: row[3:] for row in adam8bit.table_rows({"numel": 1_000_000, "dtype": "bf16", "contenders": contenders})
    }
    # 1 ms; 1e9 elements/s; 3, 2, 4; 2, 1, 2; 10 bytes; 10 GB/s; copy: 8 GB/s
    assert rows["ours"] == pytest.approx([1.0, 1000.0, 3.0, 2.0, 10.0, 10.0, 1.25])
    assert rows["copy"][2:4] == [None, None] and rows["copy"][-1] == 1.0


def test_bench_adam8bit_measures_everyone(tmp_path, capsys):
    command = ["bench", "adam8bit", "--numel", "5000", "--pairs", "2", "--out", str(tmp_path)]
    assert main([*command, "--device", "cpu"]) == 0
    assert capsys.readouterr().out == (tmp_path / "adam8bit.md").read_text()
    fp32, bf16 = json.loads((tmp_path / "adam8bit.json").read_text())["cases"]
    assert set(fp32["contenders"]) == {"ours", "bitsandbytes", "fused AdamW", "copy"}
    assert set(bf16["contenders"]) == {*fp32["contenders"], "ours, stochastic"}
    assert all(len(one["times"]) == 2 for one in bf16["contenders"].values())
    # bf16: weight read and written, gradient read, two bytes of moments read and written, absmax of 20 blocks
    assert bf16["contenders"]["ours"]["bytes"] == 5000 * (3 * 2 + 4) + 20 * 2 * 4 * 2
