#!/usr/bin/env bash
# Trains from your own file on this node: bash launch/single_node.sh CONFIG.json [--set a.b.c=value ...] [--resume latest]
# All GPUs take part, or those of CUDA_VISIBLE_DEVICES, or the first RANKS; without GPUs 2 ranks on the CPU.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
[ $# -gt 0 ] || stop "usage: launch/single_node.sh CONFIG.json [--set a.b.c=value ...] [--resume latest|PATH]"
CONFIG=$1
install
choose_device 1000
sltrain-ds doctor --build >/dev/null
cd "$CALLER" # relative paths, of the file and in it, are the caller's
exec "${LAUNCHER[@]}" --module sltrain_ds.train "$CONFIG" "${@:2}"
