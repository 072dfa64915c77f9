#!/usr/bin/env bash
# From a fresh clone to a trained, evaluated, exported LLaMA with SLTrain layers: bash launch/quickstart.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
[ $# = 0 ] || stop "quickstart takes no arguments; for your own settings: bash launch/single_node.sh CONFIG.json --set a.b.c=value"
install
choose_device 2
if [ "${DS_ACCELERATOR:-}" = cpu ]; then
  # large blocks stay in the heap: a training step frees and takes the same ones again
  export MALLOC_MMAP_THRESHOLD_=1073741824 MALLOC_TRIM_THRESHOLD_=4294967296 MALLOC_TOP_PAD_=67108864
fi
PREPARED=prepared/austen RUN=runs/quickstart CORPUS=sltrain_ds/data/austen.txt.xz
LOG=$(mktemp) building=
trap 'rm -f "$LOG"; [ -z "$building" ] || kill "$building" 2>/dev/null || true' EXIT

echo "== compiling the ops, and preparing tokenizer and data from the shipped corpus"
sltrain-ds doctor --build >"$LOG" 2>&1 &
building=$!
[ -e $PREPARED/tokenizer/tokenizer_config.json ] ||
  sltrain-ds tokenizer train --input $CORPUS --vocab-size 2048 --out $PREPARED/tokenizer
sltrain-ds data prepare --input $CORPUS --tokenizer $PREPARED/tokenizer --out $PREPARED/data --val-fraction 0.05
wait $building || { cat "$LOG" >&2; stop "the ops could not be prepared; see the lines above"; }
building=

echo "== training on $RANKS rank(s)"
"${LAUNCHER[@]}" --module sltrain_ds.train ds_configs/quickstart.json --overwrite

echo "== exporting, evaluating the exported model, drawing the report"
sltrain-ds export $RUN/checkpoints $RUN/export
sltrain-ds eval $RUN/export --data $PREPARED/data --sequence-length 128 --tokens 65536
sltrain-ds summary $RUN >/dev/null # baselines.json, which the report shows
sltrain-ds report $RUN --out $RUN/report
sltrain-ds summary $RUN
