#!/usr/bin/env bash
# Runs the tests: bash launch/test.sh [pytest arguments]
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
install
sltrain-ds doctor --build
exec python -m pytest "$@"
