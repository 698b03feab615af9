#!/usr/bin/env bash
# Two nodes on one machine, one of which dies in the middle of a run and comes back: the run must end as if nothing
# had happened.
#
#   bash scripts/two_nodes.sh          SIGKILL of everything on node b: its peer sees the connections close
#   bash scripts/two_nodes.sh cut      the cable first: its peer hears nothing more
#
# A node is a network namespace, the cable a veth pair; torchrun starts one process a node (gloo, CPU). Needs Linux,
# root and iproute2. Exit status 0 only if metrics.jsonl equals the unbroken run's; nothing is left behind either way.
set -euo pipefail

fault="${1:-kill}"
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
python="${PYTHON:-$root/.venv/bin/python}"
node_a="lost-$$-a"
node_b="lost-$$-b"
address_a=10.77.0.1
address_b=10.77.0.2
max_steps=150
seconds_limit=300

fail() {
  echo "two_nodes: $*" >&2
  exit 1
}

case "$fault" in
  kill | cut) ;;
  *) fail "unknown argument $fault: use kill (or nothing) or cut" ;;
esac
if [ "$(id -u)" -ne 0 ] || ! command -v ip >/dev/null; then
  fail "network namespaces need root and the ip command (package iproute2)"
fi
[ -x "$python" ] || fail "$python is missing: run bash scripts/setup.sh first"

folder="$(mktemp -d)"
now() { date +%s; }
say() { echo "[$(($(now) - started)) s] $*"; }

# Kills every process of a node. The redirection hides the shell's own lines about killed children.
kill_node() {
  local pids
  # Between listing and killing a process may have started another one.
  while pids="$(ip netns pids "$1" 2>/dev/null)" && [ -n "$pids" ]; do
    # shellcheck disable=SC2086 # one word a process
    kill -KILL $pids || true
    sleep 0.1
  done
} 2>/dev/null

clean_up() {
  local status=$? node
  trap - EXIT
  for node in "$node_a" "$node_b"; do
    kill_node "$node"
    ip netns delete "$node" 2>/dev/null || true
  done
  if [ "$status" -eq 0 ]; then rm -rf "$folder"; else echo "two_nodes: the logs are in $folder" >&2; fi
  exit "$status"
}
trap clean_up EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

make_nodes() {
  ip netns add "$node_a"
  ip netns add "$node_b"
  # Made inside the namespaces, so that nothing of this machine's own network is touched.
  ip link add eth0 netns "$node_a" type veth peer name eth0 netns "$node_b"
  ip -n "$node_a" address add "$address_a/24" dev eth0
  ip -n "$node_b" address add "$address_b/24" dev eth0
  for node in "$node_a" "$node_b"; do
    ip -n "$node" link set lo up
    ip -n "$node" link set eth0 up
  done
}

# start_node NODE ADDRESS IS_HOST LOG ARGUMENT...: torchrun on a node in the background; its process id is in $!.
start_node() {
  local node="$1" address="$2" is_host="$3" log="$4"
  shift 4
  # Without the last variable a node that comes back waits for an address that torchrun publishes only once.
  env TMPDIR="$folder" OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 GLOO_SOCKET_IFNAME=eth0 TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 \
    ip netns exec "$node" \
    "$python" -m torch.distributed.run --nnodes=2 --nproc-per-node=1 --max-restarts=3 --local-addr="$address" \
    --rdzv-backend=c10d --rdzv-endpoint="$address_a:29500" --rdzv-conf="is_host=$is_host" --rdzv-id=two-nodes \
    --monitor-interval=0.5 --shutdown-timeout=10 -m lost "$@" >>"$log" 2>&1 </dev/null &
}

# Waits for a process and fails if it does not end well in time.
finish() {
  local pid="$1" name="$2" end
  end=$(($(now) + seconds_limit))
  while kill -0 "$pid" 2>/dev/null; do
    [ "$(now)" -lt "$end" ] || fail "$name is still running after $seconds_limit s"
    sleep 0.2
  done
  wait "$pid" || fail "$name ended with exit status $?"
}

num_lines() {
  if [ -f "$1" ]; then wc -l <"$1"; else echo 0; fi
}

# arguments_of RUN_DIR: what follows `lost`, one argument a line.
arguments_of() {
  "$python" - "$1" "$folder" "$max_steps" <<'PYTHON'
import sys
from pathlib import Path
from lost.testing.runs import tiny_run, write_corpus

run_dir, folder, max_steps = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
corpus = folder / "corpus.jsonl"
if not corpus.exists():
    write_corpus(folder)
settings = ["runtime.device=cpu", "runtime.precision=fp32", f"train.max_steps={max_steps}"]
intervals = ["checkpoint.every_steps=10", "evaluation.every_steps=50"]
print(*tiny_run(run_dir, corpus, *settings, *intervals), sep="\n")
PYTHON
}

started="$(now)"
make_nodes
ip netns exec "$node_a" "$python" - "$address_b" <<'PYTHON' || fail "node a does not reach node b"
import socket, sys

# Refused, not timed out or without a route: the other node answered.
try:
    socket.create_connection((sys.argv[1], 9), timeout=5)
except ConnectionRefusedError:
    pass
PYTHON
say "node a $address_a, node b $address_b, joined by a veth pair"

mapfile -t unbroken < <(arguments_of "$folder/unbroken")
start_node "$node_a" "$address_a" 1 "$folder/unbroken_a.log" "${unbroken[@]}"
torchrun_a=$!
start_node "$node_b" "$address_b" 0 "$folder/unbroken_b.log" "${unbroken[@]}"
torchrun_b=$!
finish "$torchrun_a" "node a, unbroken run"
finish "$torchrun_b" "node b, unbroken run"
say "the unbroken run of $max_steps steps is done"

mapfile -t broken < <(arguments_of "$folder/broken")
metrics="$folder/broken/metrics.jsonl"
start_node "$node_a" "$address_a" 1 "$folder/broken_a.log" "${broken[@]}"
torchrun_a=$!
start_node "$node_b" "$address_b" 0 "$folder/broken_b.log" "${broken[@]}"
torchrun_b=$!
end=$(($(now) + seconds_limit))
while [ "$(num_lines "$metrics")" -lt $((max_steps / 3)) ]; do
  if ! kill -0 "$torchrun_a" "$torchrun_b" 2>/dev/null; then fail "a node ended before it was to be killed"; fi
  [ "$(now)" -lt "$end" ] || fail "no third of the steps within $seconds_limit s"
  sleep 0.05
done
if [ "$fault" = cut ]; then
  ip -n "$node_b" link set eth0 down
  kill_node "$node_b"
else
  kill_node "$node_b"
  ip -n "$node_b" link set eth0 down
fi
wait "$torchrun_b" 2>/dev/null || true
cp "$metrics" "$folder/at_death.jsonl"
lines_at_death="$(num_lines "$metrics")"
say "node b is dead ($fault: SIGKILL of torchrun and its process, cable out) after $lines_at_death lines of metrics"

sleep 3
kill -0 "$torchrun_a" 2>/dev/null || fail "torchrun of node a did not survive the death of node b"
[ ! -e "$folder/broken/final" ] || fail "the run was finished before node b died"
ip -n "$node_b" link set eth0 up
start_node "$node_b" "$address_b" 0 "$folder/broken_b2.log" "${broken[@]}"
torchrun_b=$!
say "node b is back"
finish "$torchrun_a" "node a"
finish "$torchrun_b" "node b, started again"
say "both nodes ended with exit status 0"

"$python" - "$folder" "$max_steps" <<'PYTHON' || fail "the trace is not that of the unbroken run"
import itertools, json, sys
from pathlib import Path
from lost.testing.runs import losses, read_metrics

folder, max_steps = Path(sys.argv[1]), int(sys.argv[2])
broken, unbroken = folder / "broken", folder / "unbroken"
assert len(losses(unbroken)) == max_steps
assert json.loads((broken / "status.json").read_text())["state"] == "finished"
for ours, theirs in zip(read_metrics(broken), read_metrics(unbroken), strict=True):
    assert ours == theirs, f"{ours} != {theirs}"

# Lines kept to the byte, clocks and all, were not computed again.
pairs = zip((folder / "at_death.jsonl").open(), (broken / "metrics.jsonl").open(), strict=False)
kept = [json.loads(old)["step"] for old, new in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs)]
assert kept and 0 < kept[-1] < max_steps, "the run began anew"
print(f"it went on from step {kept[-1]}; all {len(read_metrics(broken))} lines of metrics.jsonl equal the unbroken run's;")
print(f"loss of step {max_steps}: {losses(broken)[-1]:.6f}, unbroken {losses(unbroken)[-1]:.6f}")
PYTHON
