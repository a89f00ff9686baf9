#!/usr/bin/env bash
# Installs what the tests need into .venv and runs all checks: lint, types, import rules, tests. Arguments go to pytest
# (`tests/run.sh tests/launch -k slurm`); the soak tests run with `tests/run.sh -m slow`.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
launch/venv.sh test
export PATH=$PWD/.venv/bin:$PATH
ruff check .
mypy
lint-imports
exec python -m pytest -m "not slow and not gpu" -n 2 --dist loadfile "$@"
