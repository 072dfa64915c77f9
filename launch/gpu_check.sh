#!/usr/bin/env bash
# Everything that only a GPU can tell, on one that is lent for minutes: bash launch/gpu_check.sh
# Needs Python 3.12 with torch and transformers, and gpu_kit/ of launch/gpu_kit.sh for the rest: no network, no compiler, no
# installation, and the checkout stays as it is. Results in $OUT after each part: results.md, results.json, log.txt.
#   LIMIT=SECONDS   all in all (default 520); parts come in the order of what they tell, shorter where LIMIT is
#   OUT=DIR         results (default gpu_results)      KIT=DIR      default gpu_kit
# Arguments go on: --only NAME,... runs these parts alone.
#   DEVICE=cpu      small sizes, every part            PYTHON=PATH  default python3
set -euo pipefail
CALLER=$PWD
cd "$(dirname "${BASH_SOURCE[0]}")/.."
PYTHON=${PYTHON:-python3} KIT=$(cd "$CALLER" && realpath -m "${KIT:-gpu_kit}") OUT=$(cd "$CALLER" && realpath -m "${OUT:-gpu_results}")
PYTHON=$(cd "$CALLER" && command -v "$PYTHON") || { echo "sltrain-ds: error: PYTHON=$PYTHON is no command" >&2; exit 2; }
case $PYTHON in /*) ;; *) PYTHON=$CALLER/$PYTHON ;; esac
WORK=$(mktemp -d)
trap 'rm -rf "$WORK"' EXIT
mkdir -p "$OUT" "$WORK/code" "$WORK/site"
cp -r sltrain_ds csrc tests ds_configs launch setup.py pyproject.toml constraints.txt "$WORK/code"
if ls "$KIT"/*.whl >/dev/null 2>&1; then
  "$PYTHON" -c 'import sys, zipfile; [zipfile.ZipFile(w).extractall(sys.argv[1]) for w in sys.argv[2:]]' "$WORK/site" "$KIT"/*.whl
  rm -f "$WORK"/code/sltrain_ds/ops/*.so
  cp "$KIT"/*.so "$WORK/code/sltrain_ds/ops"
  [ "$(printf '%s\n' csrc/*.* csrc/cuda/*.* | LC_ALL=C sort | xargs cat | cksum)" = "$(cat "$KIT/sources.txt")" ] ||
    echo "sltrain-ds: warning: the kernels in $KIT are of other sources than csrc/; launch/gpu_kit.sh builds them anew"
else
  echo "sltrain-ds: no kit in $KIT (launch/gpu_kit.sh makes it): going on with what is installed"
fi
export PYTHONPATH=$WORK/code:$WORK/site:$WORK/code/tests${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
export HF_HUB_OFFLINE=1 NCCL_SOCKET_IFNAME=${NCCL_SOCKET_IFNAME:-lo}
COMMIT=$(git rev-parse --short HEAD 2>/dev/null || true)
cd "$WORK/code"
"$PYTHON" -m sltrain_ds.cli.gpu_check --out "$OUT" --limit "${LIMIT:-520}" --spent "$SECONDS" --commit "$COMMIT" ${DEVICE:+--device "$DEVICE"} "$@"
