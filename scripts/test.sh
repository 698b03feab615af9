#!/usr/bin/env bash
# Sets everything up, then runs every test. Arguments go to pytest, for instance: bash scripts/test.sh tests/unit -k config
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
bash "$root/scripts/setup.sh" dev
cd "$root"
# Tests start processes of their own, which would fight over the cores; one thread also fixes the order of sums.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
exec .venv/bin/python -m pytest "$@"
