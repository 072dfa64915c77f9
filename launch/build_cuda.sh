#!/usr/bin/env bash
# Builds the CUDA kernels once, into the package: sltrain_ds/ops/libsltrain_cuda.so, for A100 (sm_80) and H100/H200
# (sm_90a), later devices by PTX. It needs nvcc, no GPU and no torch; a wheel built afterwards takes the library along,
# and a node without nvcc runs it.
#   PYTHON=PATH     any Python from 3.11        CUDA_HOME=DIR   another CUDA than the nvcc on PATH
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
PYTHONPATH=$PWD exec "${PYTHON:-python3}" -m sltrain_ds.ops.cuda_build
