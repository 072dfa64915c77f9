#!/usr/bin/env bash
# Checks the style of the Python and the C++ code: bash launch/lint.sh. `ruff format` and `clang-format -i` put it right.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
install
python -m ruff check .
python -m ruff format --check .
find csrc -type f \( -name '*.cpp' -o -name '*.h' -o -name '*.cu' \) -exec clang-format --dry-run --Werror {} +
