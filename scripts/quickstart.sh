#!/usr/bin/env bash
# Sets everything up, then pre-trains a small LOST LLaMA on Python's own standard library and shows what came out.
# Arguments go to `lost pretrain`, for instance: bash scripts/quickstart.sh parameterization=dense train.max_steps=50
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
bash "$root/scripts/setup.sh"
exec "$root/.venv/bin/python" -m lost pretrain "$@"
