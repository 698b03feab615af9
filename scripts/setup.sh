#!/usr/bin/env bash
# Makes .venv if there is none and installs the project into it, unless that was done already.
#
#   bash scripts/setup.sh        what running needs
#   bash scripts/setup.sh dev    and what the tests and checks need
#
# PYTHON names the interpreter to make .venv with; without it the first of python3, python3.13 ... that is new enough.
set -euo pipefail

extra="${1:-run}"
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
venv_python="$root/.venv/bin/python"

fail() {
  echo "setup: $*" >&2
  exit 1
}

# Succeeds for an interpreter that runs, is new enough and can make virtual environments.
is_usable() {
  "$1" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1
}

find_python() {
  local candidate
  for candidate in ${PYTHON:+"$PYTHON"} python3 python3.13 python3.12 python3.11 python; do
    if is_usable "$candidate"; then
      echo "$candidate"
      return
    fi
    # An interpreter asked for by name is never replaced silently.
    if [ "$candidate" = "${PYTHON:-}" ]; then
      fail "PYTHON=$PYTHON does not run, is older than 3.11 or lacks the venv module: name another one"
    fi
  done
  fail "no Python 3.11 or newer with the venv module was found (python3 is $(python3 --version 2>/dev/null || echo missing)):" \
    "install one, or name it: PYTHON=/path/to/python3.11 bash scripts/quickstart.sh"
}

# One line that changes whenever an installation would: files, interpreter, place of the checkout.
fingerprint() {
  "$venv_python" - "$root" <<'PYTHON'
import hashlib, pathlib, sys

root = pathlib.Path(sys.argv[1])
digest = hashlib.sha256(f"{root} {sys.version}".encode())
for name in ("pyproject.toml", "constraints.txt"):
    digest.update((root / name).read_bytes())
print(digest.hexdigest())
PYTHON
}

case "$extra" in
  run) target="$root" ;;
  dev) target="${root}[dev]" ;;
  *) fail "unknown argument $extra: use no argument, or dev" ;;
esac

if [ ! -e "$root/.venv" ]; then
  python="$(find_python)"
  echo "setup: making .venv with $("$python" --version)" >&2
  "$python" -m venv "$root/.venv"
fi
is_usable "$venv_python" || fail "$root/.venv holds no working Python 3.11 or newer: remove that folder and run this again"

wanted="$(fingerprint)"
# The tools of dev come on top of what running needs, so that either stamp serves `run`.
for stamp in "$root/.venv/lost-installed-dev" "$root/.venv/lost-installed-$extra"; do
  if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$wanted" ]; then
    exit 0
  fi
done

echo "setup: installing into .venv (the first time takes some minutes)" >&2
"$venv_python" -m pip install --disable-pip-version-check --quiet -e "$target" -c "$root/constraints.txt"
echo "$wanted" >"$root/.venv/lost-installed-$extra"
