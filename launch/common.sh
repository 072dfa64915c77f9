# Sourced by the other scripts: the virtual environment, the device, the ranks. Nothing here is run by itself.
#   VENV=DIR      use (or make) this virtual environment instead of .venv
#   PYTHON=PATH   the Python that makes it (3.11 to 3.13)
#   DEVICE=cpu    leave GPUs alone
#   RANKS=N       ranks on this node; CUDA_VISIBLE_DEVICES is kept to
set -euo pipefail
CALLER=$PWD
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
VENV=$(realpath -ms "${VENV:-$ROOT/.venv}") # before any cd: a relative path is the caller's
case ${PYTHON:-} in */*) PYTHON=$(realpath -ms "$PYTHON") ;; esac
cd "$ROOT"
stop() { echo "sltrain-ds: error: $*" >&2; exit 2; }

find_python() {
  local name candidates=(python3 python3.12 python3.11 python3.13 python)
  [ -n "${PYTHON:-}" ] && candidates=("$PYTHON")
  for name in "${candidates[@]}"; do
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
  wanted="$ROOT $(cat setup.py constraints.txt | cksum)"
  if ! "$VENV/bin/python" -m pip --version >/dev/null 2>&1; then # none yet, or one whose making was cut short
    local python own=()
    python=$(find_python)
    # a cluster's own torch, built for its drivers, is better than any we could install
    if "$python" -c 'import torch' 2>/dev/null; then own=(--system-site-packages); fi
    echo "making $VENV with $("$python" --version)"
    "$python" -m venv "${own[@]}" "$VENV" ||
      stop "'$python -m venv $VENV' failed; install Python's venv module or set VENV="
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

# Chooses GPUs or CPU. choose_device MOST: at most so many ranks, where neither RANKS nor CUDA_VISIBLE_DEVICES says.
# Sets RANKS, and LAUNCHER with the deepspeed command for them.
choose_device() {
  local most=$1 gpus
  gpus=$(nvidia-smi -L 2>/dev/null | grep -c '^GPU' || true)
  if [ "${DEVICE:-}" = cpu ] || [ "$gpus" = 0 ]; then
    export DS_ACCELERATOR=cpu CUDA_VISIBLE_DEVICES=
    RANKS=${RANKS:-2}
    LAUNCHER=(deepspeed --log_level error --num_gpus "$RANKS")
    return
  fi
  "$VENV/bin/python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2>/dev/null ||
    stop "the driver shows $gpus GPU(s) but torch cannot use them; install a CUDA build of torch into $VENV, or set DEVICE=cpu"
  if [ -n "${CUDA_VISIBLE_DEVICES:-}" ]; then # the launcher drops it where --num_gpus is given
    RANKS=$(awk -F, '{print NF}' <<<"$CUDA_VISIBLE_DEVICES")
    LAUNCHER=(deepspeed --log_level error --include "localhost:$CUDA_VISIBLE_DEVICES")
  else
    RANKS=${RANKS:-$((gpus < most ? gpus : most))}
    LAUNCHER=(deepspeed --log_level error --num_gpus "$RANKS")
  fi
}
