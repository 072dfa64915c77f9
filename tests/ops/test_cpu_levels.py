"""Every CPU level that this processor has, forced in turn: the operators against float64 and the references."""

import os
import subprocess
import sys
from pathlib import Path

import cpu_level_worker as worker
import pytest
import torch
from bounds import check_sums

from sltrain_ds.errors import UserError
from sltrain_ds.ops import builder, cpu_level, reference, support

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(builder.status()[0] == "reference", reason=f"needs the C++ ops: {builder.status()[1]}")
# PyTorch's products, which gemm_ may call, held to the same level
PYTORCH = {
    "portable": {"ATEN_CPU_CAPABILITY": "default", "ONEDNN_MAX_CPU_ISA": "SSE41"},
    "avx2": {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2"},
    "avx512": {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE"},
    "avx512_bf16": {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_BF16"},
    "amx": {},
}


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """A function of a level that gives what the operators gave at it; a level that is not here is skipped."""
    folder, known = tmp_path_factory.mktemp("levels"), {}

    def at(level):
        assert builder.load()
        if level not in cpu_level.available():
            pytest.skip(f"this processor has no {level}")
        if level not in known:
            file = folder / f"{level}.pt"
            environment = {**os.environ, "PYTHONPATH": str(ROOT), "SLTRAIN_CPU": level, **PYTORCH[level]}
            subprocess.run([sys.executable, worker.__file__, str(file)], env=environment, check=True, timeout=600)
            known[level] = torch.load(file)
        return known[level]

    return at


def each(found, kind):
    return {key: value for key, value in found.items() if key[0] == kind}


@pytest.mark.parametrize("level", cpu_level.LEVELS)
def test_the_operators_are_right(results, level):
    found = results(level)
    assert found["level"] == level
    for (_, shape, dtype), (W, picked) in each(found, "scatter and gather").items():
        rows, columns, values, before = worker.inputs_of_support(*shape, dtype)
        index = support.to_flat_index(rows, columns, shape[1])
        expected = before.float() + reference.dense_sparse(values.float(), index, before.shape)
        assert torch.equal(W, expected.to(dtype)) and torch.equal(picked, before.view(-1)[index])
    for (_, shape, tokens, dtype), (y, dx, dvalues) in each(found, "spmm").items():
        rows, columns, values, _ = worker.inputs_of_support(*shape, dtype)
        x, y_before, dy, dx_before = (t.double() for t in worker.inputs_of_spmm(tokens, *shape[:2], dtype))
        index = support.to_flat_index(rows, columns, shape[1])
        S = reference.dense_sparse(values.double(), index, shape[:2])
        check_sums(y, y_before + x @ S.T, y_before.abs() + x.abs() @ S.abs().T)
        check_sums(dx, dx_before + dy @ S, dx_before.abs() + dy.abs() @ S.abs())
        picked = index // shape[1], index % shape[1]
        products = dy.T[picked[0]] * x.T[picked[1]]
        check_sums(dvalues, products.sum(1), products.abs().sum(1))
    for (_, shape, by_columns, dtype), (out,) in each(found, "gemm").items():
        a, b, bias = (t.double() for t in worker.inputs_of_gemm(*shape, dtype, by_columns))
        check_sums(out, 0.5 * (a @ b) + bias, 0.5 * (a.abs() @ b.abs()) + bias.abs())
    for (_, dtype), (total,) in each(found, "norm").items():
        exact = worker.input_of_norm(dtype).double().square().sum()
        check_sums(total, exact, exact)
    for (_, dtype), (total,) in each(found, "column sum").items():
        x = worker.input_of_norm(dtype)[:7000].view(1000, 7).double()
        check_sums(total, x.sum(0), x.abs().sum(0))


@pytest.mark.parametrize("level", cpu_level.LEVELS)
def test_what_is_promised_bit_for_bit_is_so(results, level, monkeypatch):
    """The Adam steps and the support: the references' bits, at any level."""
    found = results(level)
    for (_, shape, _), drawn in each(found, "support").items():
        monkeypatch.setattr(builder, "load", lambda: False)
        expected = support.sample(*shape, 7, "layer")
        assert all(torch.equal(a, b) for a, b in zip(drawn, expected, strict=True))
    for key, expected in worker.adams().items():
        assert all(torch.equal(a, b) for a, b in zip(found[key], expected, strict=True)), key


@pytest.mark.parametrize(("low", "high"), [("portable", "avx2"), ("avx2", "avx512")])
def test_a_forced_level_runs_other_code(results, low, high):
    """Portable code has no fused multiply-add, and AVX-512 has twice the sums in flight: their last bits differ."""
    above, below = each(results(high), "spmm"), each(results(low), "spmm")
    fp32 = [key for key in above if key[-1] == torch.float32]
    assert fp32 and not all(torch.equal(above[key][0], below[key][0]) for key in fp32)


def test_a_level_that_is_none_is_refused(monkeypatch):
    assert builder.load()
    monkeypatch.setattr(builder, "_state", None)
    lacking = [level for level in cpu_level.LEVELS if level not in cpu_level.available()]
    unsupported = [(level, "is not supported by this processor") for level in lacking]
    for level, told in [("sse9", "is not known"), *unsupported]:
        monkeypatch.setenv("SLTRAIN_CPU", level)
        with pytest.raises(UserError, match=rf"^SLTRAIN_CPU = '{level}' {told}; set it to one of portable, [^\n]*$"):
            builder.load()
