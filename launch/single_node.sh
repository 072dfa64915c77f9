#!/usr/bin/env bash
# Trains from your own file on this node: bash launch/single_node.sh CONFIG.json [--set a.b.c=value ...] [--resume latest]
# RANKS=N sets the number of GPUs (default: all that fit below).
CONFIG=${1:?usage: launch/single_node.sh CONFIG.json [--set a.b.c=value ...] [--resume latest|PATH]}
[ -e "$CONFIG" ] && CONFIG=$(realpath "$CONFIG")
CALLER=$PWD
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
install
gpus=$(nvidia-smi -L 2>/dev/null | grep -c '^GPU' || true)
[ "$gpus" -gt 0 ] && [ "${DEVICE:-}" != cpu ] && RANKS=${RANKS:-$gpus}
choose_device
sltrain-ds doctor --build >/dev/null
cd "$CALLER" # relative paths in the file are the caller's
exec deepspeed --num_gpus "$RANKS" --module sltrain_ds.train "$CONFIG" "${@:2}"
