# Sourced by the other scripts: the virtual environment, the device, the threads. Nothing here is run by itself.
#   VENV=DIR      use (or make) this virtual environment instead of .venv
#   PYTHON=PATH   the Python that makes it (3.11 to 3.13)
#   DEVICE=cpu    leave GPUs alone
set -euo pipefail
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$ROOT"
VENV=${VENV:-$ROOT/.venv}
stop() { echo "sltrain-ds: error: $*" >&2; exit 2; }

find_python() {
  local name
  for name in ${PYTHON:-python3 python3.12 python3.11 python3.13 python}; do
    if command -v "$name" >/dev/null && "$name" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))'; then
      command -v "$name"
      return
    fi
  done
  stop "no Python 3.11 to 3.13 found; set PYTHON=/path/to/python"
}

# Makes $VENV where it is missing and installs the project into it; a no-op once that is done.
install() {
  local stamp=$VENV/.sltrain_ds-installed wanted constraints=constraints.txt
  wanted=$(cat "$ROOT/setup.py" "$ROOT/constraints.txt" | cksum)
  if [ ! -x "$VENV/bin/python" ]; then
    local python own=()
    python=$(find_python)
    # a cluster's own torch, built for its drivers, is better than any we could install
    if "$python" -c 'import torch' 2>/dev/null; then own=(--system-site-packages); fi
    echo "making $VENV with $("$python" --version)"
    "$python" -m venv "${own[@]}" "$VENV" || stop "'$python -m venv $VENV' failed; install Python's venv module or set VENV="
  fi
  export PATH=$VENV/bin:$PATH # the deepspeed launcher starts the first python it finds
  [ "$(cat "$stamp" 2>/dev/null)" = "$wanted" ] && return
  if "$VENV/bin/python" -c 'import torch' 2>/dev/null; then
    constraints=$VENV/constraints.txt
    { grep -v '^torch==' constraints.txt
      "$VENV/bin/python" -c 'import torch; print("torch==" + torch.__version__.split("+")[0])'; } >"$constraints"
  fi
  echo "installing (torch, deepspeed, transformers, ...)"
  "$VENV/bin/python" -m pip install --quiet --disable-pip-version-check -c "$constraints" -e '.[dev]' ||
    stop "pip could not install the project; see the lines above"
  echo "$wanted" >"$stamp"
}

# Sets RANKS (how many ranks this node runs by default) and prepares CPU runs.
choose_device() {
  local gpus
  gpus=$(nvidia-smi -L 2>/dev/null | grep -c '^GPU' || true)
  if [ "${DEVICE:-}" = cpu ] || [ "$gpus" = 0 ]; then
    export DS_ACCELERATOR=cpu CUDA_VISIBLE_DEVICES=
    RANKS=${RANKS:-2}
    # large blocks stay in the heap: a training step frees and takes the same ones again
    export MALLOC_MMAP_THRESHOLD_=${MALLOC_MMAP_THRESHOLD_:-1073741824} MALLOC_TRIM_THRESHOLD_=${MALLOC_TRIM_THRESHOLD_:-4294967296}
    export MALLOC_TOP_PAD_=${MALLOC_TOP_PAD_:-67108864}
    return
  fi
  "$VENV/bin/python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2>/dev/null ||
    stop "the driver shows $gpus GPU(s) but torch cannot use them; install a CUDA build of torch into $VENV, or set DEVICE=cpu"
  RANKS=${RANKS:-$((gpus < 2 ? gpus : 2))}
}
