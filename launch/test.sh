#!/usr/bin/env bash
# Runs the tests: bash launch/test.sh [pytest arguments]
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
install
choose_device
unset MALLOC_MMAP_THRESHOLD_ MALLOC_TRIM_THRESHOLD_ MALLOC_TOP_PAD_
sltrain-ds doctor --build
exec python -m pytest "$@"
