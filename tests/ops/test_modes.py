"""The cost model: its fit, its choice under a memory budget, its files."""

import json
import math
import random

import pytest
import torch

from sltrain_ds.config import op_mode
from sltrain_ds.errors import UserError
from sltrain_ds.methods import SLTrainLinear
from sltrain_ds.ops import modes

WIDE, TALL = "64x32", "32x64"
SIZES = {WIDE: (64, 32, 8, 100), TALL: (32, 64, 8, 100)}


def constants(**seconds):
    """Every mode takes so many seconds a call, and what else is told as mode__term."""
    table = {f"cpu.float32.{mode}.{term}": 0.0 for mode, terms in modes.TERMS.items() for term in terms}
    for key, value in seconds.items():
        mode, _, term = key.rpartition("__") if "__" in key else (key, "", "layer")
        table[f"cpu.float32.{mode}.{term}"] = value
    return table


SECONDS = {"compose": 4.0, "factored": 3.0, "factored_dense": 5.0, "keep": 2.0}


@pytest.mark.parametrize("mode", modes.TERMS)
def test_a_fit_finds_the_constants_that_made_the_times(mode):
    draw = random.Random(0)
    sizes = [(*(draw.randint(50, 5000) for _ in range(5)),) for _ in range(40)]
    unit = {"layer": 1e-3, "nonzero": 0.0}  # a term that costs nothing is found to be nothing
    wanted = {term: unit.get(term, draw.uniform(1, 3) * 10.0 ** draw.randint(-12, -9)) for term in modes.TERMS[mode]}
    times = [sum(wanted[term] * modes.counts(*size)[term] for term in wanted) for size in sizes]
    found = modes.fit(mode, sizes, times)
    assert min(found.values()) >= 0
    for size, seconds in zip(sizes, times, strict=True):
        predicted = sum(found[term] * modes.counts(*size)[term] for term in found)
        assert predicted == pytest.approx(seconds, rel=1e-2)


def test_keep_is_chosen_only_where_its_weight_fits():
    table, size = constants(**SECONDS), SIZES[WIDE]
    assert modes.choose(*size, 16, constants=table) == "factored"
    assert modes.choose(*size, 16, constants=table, keep_bytes=64 * 32 * 4 - 1) == "factored"
    assert modes.choose(*size, 16, constants=table, keep_bytes=64 * 32 * 4) == "keep"
    assert modes.choose(*size, 16, constants=constants(**SECONDS | {"keep": 9.0}), keep_bytes=math.inf) == "factored"


def test_a_budget_goes_where_a_byte_saves_most():
    # factored grows with T n, so the shape with more non-zeros gains more from keep
    table = constants(**SECONDS, factored__sparse=1e-3)
    sizes = {WIDE: (64, 32, 8, 100), TALL: (32, 64, 8, 90)}
    weight, three = 64 * 32 * 4, {WIDE: 3, TALL: 3}

    def plan(keep_bytes, micro_batches=1, alive=three):
        return modes.plan(sizes, alive, three, 16, torch.float32, "cpu", micro_batches, table, keep_bytes)

    others = {WIDE: "compose", TALL: "compose"}
    assert plan(0) == others == plan(3 * weight - 1)
    table["cpu.float32.compose.sparse"] = 0.0
    table["cpu.float32.compose.nonzero"] = 1e-3
    assert plan(3 * weight) == others | {WIDE: "keep"} == plan(6 * weight - 1)
    assert plan(6 * weight) == {WIDE: "keep", TALL: "keep"}
    assert plan(2 * weight, alive={WIDE: 1, TALL: 1}) == {WIDE: "keep", TALL: "keep"}  # under checkpointing
    # W and dW of every layer, if that is faster still
    assert plan(12 * weight, 4, alive=three | {WIDE: 6, TALL: 6}) == {WIDE: "keep_step", TALL: "keep_step"}
    table["cpu.float32.keep.nonzero"] = 1e-3
    assert modes.keep_step_seconds(*sizes[WIDE], 16, torch.float32, "cpu", 4, table) == pytest.approx(2.0 + 0.1 / 4)
    assert plan(12 * weight, 4) == {WIDE: "keep_step", TALL: "keep_step"}
    assert plan(9 * weight, 4) == {WIDE: "keep_step", TALL: "keep"} and plan(9 * weight, 1)[WIDE] == "keep"


def test_the_built_in_constants_know_every_mode_on_the_cpu_and_on_cuda():
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        assert set(modes.estimate(4096, 4096, 512, 10**6, 4096, dtype)) == set(modes.TERMS)
        on_gpu = modes.estimate(4096, 4096, 512, 10**6, 4096, dtype, "cuda")
        assert set(on_gpu) == set(modes.TERMS) - {"factored"} and min(on_gpu.values()) > 0
    # the field's rule: below T = (4/3) m n / (m + n) the factors are cheaper than W, far above they are not
    assert modes.choose(4096, 4096, 1024, 800_000, 256, torch.bfloat16, "cuda") == "factored_dense"
    assert modes.choose(4096, 4096, 1024, 800_000, 32768, torch.bfloat16, "cuda") == "compose"


@pytest.mark.parametrize(
    "content, told",
    [
        ("{", "no constants could be read"),
        ("[]", '"constants"'),
        ({"cpu.float32.gemm": 1.0}, '"cpu.float32.gemm" is no constant'),
        ({"cpu.float32.keep.thin": 1.0}, "is no constant"),
        ({"cpu.float32.keep.layer": -1.0}, "cpu.float32.keep.layer = -1.0"),
        ({"cpu.float32.keep.layer": "fast"}, "'fast'"),
        ({"cpu.float32.keep.layer": 1.0}, "is missing"),
    ],
)
def test_a_file_that_cannot_be_used_is_told_in_a_line(tmp_path, content, told):
    path = tmp_path / "op_constants.json"
    path.write_text(content if isinstance(content, str) else json.dumps({"constants": content}))
    with pytest.raises(UserError) as raised:
        modes.load(path)
    assert told in str(raised.value) and str(path) in str(raised.value) and "\n" not in str(raised.value)


def test_a_file_takes_the_place_of_what_it_names(tmp_path):
    own = {f"cpu.float32.keep.{term}": 7.0 for term in modes.TERMS["keep"]}
    (tmp_path / "c.json").write_text(json.dumps({"constants": own}))
    found = modes.load(tmp_path / "c.json")
    assert found == modes.load() | own != modes.load()


def test_the_config_knows_the_same_modes():
    assert set(op_mode.MODES) == set(modes.CHOICES)


def test_modes_by_shape():
    def layer(out, in_):
        return SLTrainLinear(in_, out, rank=2, density=0.1, alpha=2)

    model = torch.nn.ModuleList([layer(8, 6), layer(6, 8), layer(8, 6)])
    modes.set_op_mode(model, {"8x6": "keep"})
    assert [x.op_mode for x in modes.layers(model)] == ["keep", "auto", "keep"]
    modes.set_op_mode(model, "factored")
    assert {x.current_mode for x in model} == {"factored"}
    with pytest.raises(UserError, match="op_mode"):
        modes.set_op_mode(model, {"8x6": "fast"})
