#!/usr/bin/env bash
# Ten minutes on a new node before a long run: bash launch/verify_cluster.sh
# Per-layer equals plain, overlap on equals off, supports, resume, estimate and rehearsal against measured memory: pass or
# fail a line, with versions; exit code 1 when one fails. All GPUs take part (RANKS=N: so many); without GPUs 2 CPU ranks.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
[ $# = 0 ] || stop "verify_cluster takes no arguments; RANKS=N sets the number of ranks"
install
choose_device 8
sltrain-ds doctor --build >/dev/null
exec python -m sltrain_ds.cli.verify --ranks "$RANKS"
