import json

import pytest

from sltrain_ds.bench import op
from sltrain_ds.bench.op import Shape
from sltrain_ds.cli import main
from sltrain_ds.errors import UserError
from sltrain_ds.ops.modes import MODES


def test_rows_hold_speed_against_naive_and_time_against_dense():
    sizes = {"saved": 2_000_000, "saved_beyond": 0, "peak": 3_500_000}
    operators = {
        "dense": {"times": [0.010, 0.020, 0.010], **sizes},
        "naive": {"times": [0.040, 0.060, 0.030], **sizes},
        "compose": {"times": [0.020, 0.020, 0.020], "mode": "compose", **sizes},
    }
    case = {"out": 3, "in": 2, "rank": 1, "density": 0.5, "tokens": 7, "dtype": "fp32", "operators": operators}
    operators["auto"] = {**operators["compose"], "mode": "compose"}
    operators["keep"] = {"times": [0.010, 0.040, 0.016], "mode": "keep", **sizes}
    rows = {row[3]: row[5:] for row in op.table_rows(case)}
    assert rows["auto: compose"] == rows["compose"]
    # 2, 3, 1.5 and 2, 1, 2; of keep, whose median is less, 2, 0.5, 1.25
    assert rows["compose"] == pytest.approx([20.0, 2.0, 2.0, 1.25, 2.0, 0.0, 3.5])
    assert rows["keep"][3] == 1.0 and rows["dense"][3] is rows["naive"][3] is None
    assert rows["naive"][1] == 1.0 and rows["dense"][2] == 1.0
    assert rows["dense"][1] == pytest.approx(3.0)  # 4, 3, 3


def test_shapes_by_hand_and_by_preset():
    assert op.parse_shapes("512x256:r128,8x4:r2:d0.25") == [Shape(512, 256, 128, 0.03), Shape(8, 4, 2, 0.25)]
    assert op.parse_shapes("7b") == [Shape(*s, 1024, 0.05) for s in ((4096, 4096), (11008, 4096), (4096, 11008))]
    assert op.parse_shapes("60m,512x512:r128", density=0.1)[0] == Shape(512, 512, 128, 0.1)
    assert len(op.parse_shapes("60m,512x512:r128")) == 3


@pytest.mark.parametrize("wrong", ["13b", "512x512", "512x512:128", "axb:r1", ""])
def test_a_wrong_shape_is_told_in_a_line(wrong):
    with pytest.raises(UserError, match=r"--shapes .*512x512:r128"):
        op.parse_shapes(wrong)


@pytest.mark.parametrize("rank", [0, 65])
def test_a_rank_that_does_not_fit_its_shape(rank):
    with pytest.raises(UserError, match=rf"--shapes 64x96:r{rank}: .*from 1 to .* 64"):
        op.parse_shapes(f"64x96:r{rank}")


@pytest.mark.parametrize(("text", "density"), [("64x96:r8", 2.0), ("64x96:r8", 0.0), ("64x96:r8:d1.5", None)])
def test_a_density_that_is_none(text, density):
    with pytest.raises(UserError, match=r"--density \S+: must be above 0 and at most 1"):
        op.parse_shapes(text, density)


def test_bench_op_prints_its_table_and_keeps_every_time(tmp_path, capsys):
    command = ["bench", "op", "--shapes", "24x16:r4:d0.1", "--tokens", "5,6", "--dtypes", "fp32", "--pairs", "2"]
    assert main([*command, "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert printed == (tmp_path / "op.md").read_text()
    assert sum(line.startswith("| 24x16 r4 d0.1 ") for line in printed.splitlines()) == 2 * (3 + len(MODES))
    kept = json.loads((tmp_path / "op.json").read_text())
    assert kept["environment"]["torch"] and kept["environment"]["device"] and len(kept["cases"]) == 2
    for case in kept["cases"]:
        assert set(case["operators"]) == {"dense", "naive", "auto", *MODES}
        for found in case["operators"].values():
            assert len(found["times"]) == 2 and min(found["times"]) > 0 and found["peak"] > 0
        assert case["operators"]["auto"]["mode"] in MODES and case["operators"]["auto"]["chosen_in"] > 0
    compose = kept["cases"][0]["operators"]["compose"]
    assert compose["saved_beyond"] == 0 and compose["workspace"] == 4 * 24 * 16


@pytest.mark.parametrize(
    "flags, told",
    [
        (["--tokens", "0"], "--tokens 0"),
        (["--tokens", "a"], "--tokens a"),
        (["--dtypes", "fp8"], "--dtypes fp8"),
        (["--modes", "fastest"], "--modes fastest"),
        (["--device", "tpu"], "--device tpu"),
        (["--pairs", "0"], "--pairs 0"),
        (["--threads", "0"], "--threads 0"),
    ],
)
def test_wrong_options_are_told_in_a_line(flags, told, capsys):
    assert main(["bench", "op", *flags]) == 2
    assert told in capsys.readouterr().err


def test_modes_save_what_the_docs_say(tmp_path):
    """Nothing beyond x and parameters; W in keep; x A^T in factored: bytes of fp32, a layer of 24 x 16, rank 4."""
    tokens, out, in_, rank = 10, 24, 16, 4
    case = op.measure(Shape(out, in_, rank, 0.1), tokens, "fp32", "cpu", MODES, rounds=1)
    beyond = {name: found["saved_beyond"] for name, found in case["operators"].items()}
    assert beyond["dense"] == beyond["compose"] == 0
    assert beyond["keep"] == 4 * out * in_ and beyond["naive"] == 4 * rank * in_  # the scaled copy of A
    assert beyond["factored"] == beyond["factored_dense"] == 4 * tokens * rank
    columns = {row[3]: row[9:] for row in op.table_rows(case)}
    for name, found in case["operators"].items():
        assert columns[name] == [found["saved"] / 1e6, found["saved_beyond"] / 1e6, found["peak"] / 1e6]
        assert found["peak"] >= 4 * tokens * (out + in_)  # y and dx at least
