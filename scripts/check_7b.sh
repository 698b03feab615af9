#!/usr/bin/env bash
# Initialises LOST's llama_7b (2.9 billion parameters) layer by layer in bfloat16, saves it in files of 1 GB, loads it in
# another process and computes one forward; prints times and peak memory, which must stay under 16 GiB.
#     bash scripts/check_7b.sh [draw|gram] [key=value ...]
# On two cores draw (the default) takes half an hour, gram one to two; model=llama_60m is a quick try. 6 GB of disk are needed
# in TMPDIR or /tmp, and freed at the end.
set -euo pipefail

init="${1:-draw}"
if [[ "$init" != draw && "$init" != gram ]]; then
  echo "$init: the first argument is draw or gram" >&2
  exit 2
fi
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
python="$root/.venv/bin/python"
[[ -x "$python" ]] || python=python3
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT

"$python" "$root/scripts/check_7b.py" make "$folder" model=llama_7b "parameterization.init=$init" "${@:2}"
"$python" "$root/scripts/check_7b.py" run "$folder"
