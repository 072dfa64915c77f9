#!/usr/bin/env bash
# Lays ready in gpu_kit/ (git-ignored, about 12 MB) what a bare GPU node without a network lacks; launch/gpu_check.sh uses
# it there. Here it needs PyPI, g++ and nvcc; the node needs none of them:
#   *.whl                     the packages of launch/gpu_kit.txt, bitsandbytes cut to one CUDA release
#   _C.cpython-312-*.so       the C++ ops, for Python 3.12 and the torch that PYTHON312 has
#   libsltrain_cuda.so        the CUDA kernels, for any Python and torch
#
#   PYTHON312=PATH   a Python 3.12 with the node's torch (default python3.12)    KIT=DIR    another folder
#   CUDA_HOME=DIR    where nvcc is, if not on PATH                               CUDA=130   bitsandbytes' CUDA release
set -euo pipefail
CALLER=$PWD
cd "$(dirname "${BASH_SOURCE[0]}")/.."
stop() { echo "sltrain-ds: error: $*" >&2; exit 2; }
ROOT=$PWD PYTHON=${PYTHON312:-python3.12} KIT=$(cd "$CALLER" && realpath -m "${KIT:-$ROOT/gpu_kit}") CUDA=${CUDA:-130}
"$PYTHON" -c 'import sys, torch; sys.exit(sys.version_info[:2] != (3, 12))' 2>/dev/null ||
  stop "PYTHON312: $PYTHON must be a Python 3.12 with the node's torch (2.11); name another"
WORK=$(mktemp -d)
trap 'rm -rf "$WORK"' EXIT
mkdir -p "$KIT" "$WORK/whl"

echo "== kernels: nvcc and g++, a minute or two"
cp -r sltrain_ds csrc setup.py README.md pyproject.toml "$WORK"
(
  cd "$WORK"
  rm -f sltrain_ds/ops/*.so
  SLTRAIN_BUILD_OPS=1 "$PYTHON" setup.py --quiet build_ext --inplace >"$WORK/log" 2>&1 && [ -e sltrain_ds/ops/libsltrain_cuda.so ]
) || { tail -n 20 "$WORK/log" >&2; stop "the kernels could not be built (nvcc on PATH or under CUDA_HOME? g++?); see the lines above"; }
strip --strip-unneeded "$WORK"/sltrain_ds/ops/*.so

rm -f "$KIT"/*.so
mv "$WORK"/sltrain_ds/ops/*.so "$KIT"
printf '%s\n' csrc/*.* csrc/cuda/*.* | LC_ALL=C sort | xargs cat | cksum >"$KIT/sources.txt" # launch/gpu_check.sh compares
if ! cmp -s launch/gpu_kit.txt "$KIT/pins.txt"; then
  echo "== wheels"
  platforms=()
  for tag in manylinux_2_28 manylinux_2_27 manylinux_2_24 manylinux_2_17 manylinux2014; do
    platforms+=(--platform "${tag}_x86_64")
  done
  pip=("$PYTHON" -m pip --disable-pip-version-check --quiet)
  grep '==' launch/gpu_kit.txt | grep -v '^deepspeed==' >"$WORK/wheels.txt"
  "${pip[@]}" download --no-deps --only-binary=:all: --python-version 3.12 --implementation cp \
    --abi cp312 --abi abi3 --abi none "${platforms[@]}" -d "$WORK/whl" -r "$WORK/wheels.txt"
  DS_BUILD_OPS=0 "${pip[@]}" wheel --no-deps -w "$WORK/whl" "$(grep '^deepspeed==' launch/gpu_kit.txt)" # no wheel on PyPI
  "$PYTHON" - "$WORK"/whl/bitsandbytes-*.whl "$CUDA" <<'PYTHON'
"""Leave the CPU's and one CUDA release's library in a wheel that carries a dozen."""
import os, re, sys, zipfile

path, cuda = sys.argv[1:]
other = re.compile(rf"libbitsandbytes_(?!cpu|cuda{cuda}\.)\w+\.so")
with zipfile.ZipFile(path) as whole, zipfile.ZipFile(path + ".cut", "w", zipfile.ZIP_DEFLATED) as cut:
    for item in whole.infolist():
        data = whole.read(item)
        if item.filename.endswith("/RECORD"):
            data = b"".join(line for line in data.splitlines(True) if not other.search(line.decode()))
        if not other.search(item.filename):
            cut.writestr(item, data)
    if not any(f"cuda{cuda}." in name for name in cut.namelist()):
        sys.exit(f"sltrain-ds: error: CUDA={cuda}: {os.path.basename(path)} has no library for it")
os.replace(path + ".cut", path)
PYTHON
  rm -f "$KIT"/*.whl
  mv "$WORK"/whl/*.whl "$KIT"
  cp launch/gpu_kit.txt "$KIT/pins.txt" # so that the next call need not fetch them again
fi
du -sh "$KIT"
