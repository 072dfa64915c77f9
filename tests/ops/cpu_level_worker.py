"""Runs the operators at the CPU level that SLTRAIN_CPU names and saves what they gave: test_cpu_levels.py judges it.

python cpu_level_worker.py FILE
"""

import sys

import numpy as np
import torch

from sltrain_ds.ops import adam4bit, adam8bit, builder, sparse, spmm, support
from sltrain_ds.ops.gemm import column_sum_, gemm_
from sltrain_ds.zero.per_layer.clipping import sum_of_squares

FLOATS = (torch.float32, torch.bfloat16)
# odd sizes, ends of vectors and of tiles, two kinds of column index
SUPPORTS = ((33, 70, 400), (150, 96, 2000), (40, 70_000, 9000))
PRODUCTS = ((5, 33, 17), (64, 130, 96), (100, 4200, 72))
TOKENS = (1, 17, 70)
ELEMENTS = 70_001


def randn(generator, *shape) -> torch.Tensor:
    """numpy's: the last bits of PyTorch's depend on the instruction set."""
    return torch.from_numpy(generator.standard_normal(shape, dtype=np.float32))


def inputs_of_support(out, columns, nnz, dtype):
    """rows, columns, values (nnz,), W (out, in)."""
    generator = np.random.default_rng(nnz)
    values = randn(generator, nnz).to(dtype)
    return (
        *support.sample(out, columns, nnz, 7, "layer"),
        values,
        randn(generator, out, columns).to(dtype),
    )


def inputs_of_spmm(tokens, out, columns, dtype):
    """x (tokens, in), y (tokens, out), dy (tokens, out), dx (tokens, in)."""
    generator = np.random.default_rng(tokens)
    return [randn(generator, tokens, size).to(dtype) for size in (columns, out, out, columns)]


def inputs_of_gemm(m, k, n, dtype, by_columns):
    """a (m, k), b (k, n), bias (n,)."""
    generator = np.random.default_rng(m)
    a = randn(generator, k, m).t() if by_columns else randn(generator, m, k)
    return a.to(dtype), randn(generator, k, n).to(dtype), randn(generator, n).to(dtype)


def input_of_norm(dtype):
    return randn(np.random.default_rng(5), ELEMENTS).to(dtype)


def adam(module, step, dtype, stochastic):
    """[p, *states] after four steps of 1,283 values: ends of blocks, of halves and of bytes."""
    generator = np.random.default_rng(6)
    p = randn(generator, 1283).to(dtype)
    states = module.new_states(p)
    for count in range(1, 5):
        g = randn(generator, 1283) ** 3 * 1e-3  # sizes widely spread
        step(p, g.to(dtype), *states, step=count, lr=1e-2, weight_decay=0.1, stochastic=stochastic, seed=3, key=9)
    return [p, *states]


def adams() -> dict:
    steps = {"8bit": (adam8bit, adam8bit.adam8bit_step_), "4bit": (adam4bit, adam4bit.adam4bit_step_)}
    return {
        ("adam", name, dtype): adam(*pair, dtype, dtype == torch.bfloat16)
        for name, pair in steps.items()
        for dtype in FLOATS
    }


def main() -> None:
    assert builder.load()
    found = {"level": torch.ops.sltrain.cpu_level(), **adams()}
    for dtype in FLOATS:
        for shape in SUPPORTS:
            rows, columns, values, W = inputs_of_support(*shape, dtype)
            found["support", shape, dtype] = [rows, columns]
            picked = torch.empty_like(values)
            sparse.gather(W, rows, columns, picked)
            sparse.scatter_add_(W, rows, columns, values)
            found["scatter and gather", shape, dtype] = [W, picked]
            for tokens in TOKENS:
                x, y, dy, dx = inputs_of_spmm(tokens, *shape[:2], dtype)
                dvalues = torch.empty_like(values)
                spmm.add_product_(y, x, rows, columns, values)
                spmm.backward_(dy, x, rows, columns, values, dx, dvalues)
                found["spmm", shape, tokens, dtype] = [y, dx, dvalues]
        for m, k, n in PRODUCTS:
            for by_columns in (False, True):
                a, b, bias = inputs_of_gemm(m, k, n, dtype, by_columns)
                out = gemm_(torch.empty(m, n, dtype=dtype), a, b, 0.5, bias)
                found["gemm", (m, k, n), by_columns, dtype] = [out]
        x = input_of_norm(dtype)
        found["norm", dtype] = [sum_of_squares([x], "cpu")]
        found["column sum", dtype] = [column_sum_(torch.empty(7, dtype=dtype), x[:7000].view(1000, 7))]
    torch.save(found, sys.argv[1])


if __name__ == "__main__":
    main()
